"""One step of a gradual pruning: curvature of the batch, longer masks, and zeros that are held."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fishleg_jax import _tree
from fishleg_jax.fisher import Curvature
from fishleg_jax.inverse.base import InverseFisher, apply_mask
from fishleg_jax.pruning._counting import Asked, Sparsity, asked_at
from fishleg_jax.pruning._gradual_state import GradualState
from fishleg_jax.pruning._independent import Compensation
from fishleg_jax.pruning._regrowth import revived
from fishleg_jax.pruning.masks import _keep
from fishleg_jax.pruning.saliency import obs_saliency


class Plan(NamedTuple):
    """What all steps have in common; see `gradual_prune`."""

    estimator: InverseFisher
    sparsity: Sparsity
    compensation: Compensation
    prunable: _tree.Selection
    scope: str
    aux_every: Any
    mask_every: Any
    renew: Any | None
    regrow: Any | None


class Seen(NamedTuple):
    """What a step sees.

    Attributes:
        updates: what the optimiser would add to the parameters.
        params: the parameters before.
        batch: None where no curvature is looked at.
        curvature: the loss on the batch, None without one.
        assimilate: see `gradual_prune`.
        emit: False where the step is going to be thrown away.
    """

    updates: Any
    params: Any
    batch: Any | None
    curvature: Curvature | None
    assimilate: bool | jax.Array | None
    emit: bool | jax.Array


def groups_of(params: Any, prunable: _tree.Selection, scope: str) -> list[list[int]]:
    """The leaves, by their numbers, that share a threshold."""
    chosen = [i for i, yes in enumerate(_tree.select(params, prunable, "prunable")) if yes]
    return [[i] for i in chosen] if scope == "layer" else [chosen]


def make_step(plan: Plan, seen: Seen, state: GradualState) -> tuple[Any, GradualState]:
    """The updates that keep pruned weights at 0.0, and the state after the step."""
    params = seen.params
    step = state.count + 1
    leaves = jax.tree.leaves(params)
    groups = groups_of(params, plan.prunable, plan.scope)
    sizes = [sum(leaves[i].size for i in group) for group in groups]
    ahead = (step // plan.mask_every + 1) * plan.mask_every
    asked = asked_at(plan.sparsity, sizes, step, ahead, state.asked)
    pruned = _pruned(state.masks, groups)
    regular = step % plan.mask_every == 0
    share = _share(plan.regrow, step)

    more = jnp.stack([c > n for c, n in zip(asked.counts, pruned, strict=True)]).any()
    finished = asked.final & ~more & ~_regrows_later(plan.regrow)
    violations = _violations(params, state.masks)

    state = _assimilated(plan, seen, state, step, finished)
    ready = jnp.array(True)
    if plan.estimator.updates != 0:
        ready = state.assimilated > 0
        if plan.estimator.ready is not None:
            ready &= plan.estimator.ready(state.estimate)
    due = (more & (regular | asked.flat)) | (regular & _comes_back(plan.regrow, share, pruned))
    moved, masks, refused = jax.lax.cond(
        due & ready & seen.emit,
        lambda: _extended(plan, seen, state, groups, asked, pruned, share),
        lambda: (_cast(seen.updates, params), state.masks, jnp.array(False)),
    )
    out = jax.tree.map(
        lambda u, p, old, new: jnp.where(old & new, u, -p), moved, params, state.masks, masks
    )
    unsound = jnp.isnan(asked.sparsity)
    return out, state._replace(
        count=optax.safe_increment(state.count),
        masks=masks,
        asked=asked.sparsity,
        violations=_add(state.violations, violations),
        failures=_add(state.failures, refused.astype(jnp.int32) + unsound),
    )


def _assimilated(
    plan: Plan, seen: Seen, state: GradualState, step: jax.Array, finished: jax.Array
) -> GradualState:
    """The state with the batch in its estimate, where that is due."""
    estimator = plan.estimator
    if estimator.updates == 0 or seen.assimilate is False or seen.batch is None:
        return state
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), step)

    def run(estimate, assimilated, failures):
        if plan.renew is not None:
            fresh = (step + plan.renew - 1) % plan.mask_every == 0
            estimate = _tree.keep_where(fresh, estimator.init(seen.params), estimate)
            assimilated = jnp.where(fresh, 0, assimilated)
        new = estimator.update(estimate, seen.params, seen.batch, key, state.masks)
        sound = _stays_finite(estimate, new) & _finite_numbers(seen.batch)
        refused = ~sound | (_skipped(new) > _skipped(estimate))
        return (
            _tree.keep_where(sound, new, estimate),
            assimilated + sound,
            _add(failures, refused.astype(jnp.int32)),
        )

    parts = state.estimate, state.assimilated, state.failures
    if seen.assimilate is True:
        due = seen.emit
    else:
        due = _by_counter(plan, state, step) & ~finished & seen.emit
        due &= True if seen.assimilate is None else seen.assimilate
    # where it is known beforehand there is no conditional: XLA for the CPU runs gradients of
    # convolutions in one far slower
    estimate, assimilated, failures = (
        run(*parts) if due is True else jax.lax.cond(due, run, lambda *same: same, *parts)
    )
    return state._replace(estimate=estimate, assimilated=assimilated, failures=failures)


def _by_counter(plan: Plan, state: GradualState, step: jax.Array) -> jax.Array:
    """Whether the step is one of those whose batch is assimilated."""
    if plan.renew is not None:
        return -step % plan.mask_every < plan.renew
    due = (step % plan.aux_every == 0) | (state.assimilated == 0)
    if plan.estimator.ready is not None:
        due |= ~plan.estimator.ready(state.estimate)
    return due


def _extended(
    plan: Plan,
    seen: Seen,
    state: GradualState,
    groups: list[list[int]],
    asked: Asked,
    pruned: list[jax.Array],
    share: jax.Array | None,
) -> tuple[Any, Any, jax.Array]:
    """Updates with the compensation in them, longer masks, and whether these were refused.

    Where they are refused the updates and the masks are as they came.
    """
    estimator, old = plan.estimator, state.masks
    updates = _tree.widen(seen.updates)
    target = jax.tree.map(
        lambda p, u, m: jnp.where(m, p + u, 0), _tree.widen(seen.params), updates, old
    )
    diagonal = estimator.diagonal(state.estimate, seen.params, old)
    # pruned weights have no curvature, and need no score
    safe = jax.tree.map(lambda q, m: jnp.where(m, q, 1), diagonal, old)
    scores = jax.tree.leaves(obs_saliency(target, safe))
    kept, tree = jax.tree.flatten(old)
    backs = [jnp.zeros_like(m) for m in kept]
    sound = jnp.stack([jnp.all(jnp.isfinite(scores[i])) for g in groups for i in g]).all()
    if plan.regrow is not None:
        backs, finite = revived(
            estimator, state.estimate, seen.params, seen.curvature, old, groups,
            asked.counts, pruned, share,
        )  # fmt: skip
        sound &= finite

    new = list(kept)
    for group, count, before in zip(groups, asked.counts, pruned, strict=True):
        # what has just come back is not the first to go again
        ranked = [jnp.where(backs[i], jnp.inf, scores[i]) for i in group]
        candidates = [kept[i] | backs[i] for i in group]
        for i, mask in zip(
            group, _keep(ranked, candidates, jnp.maximum(count, before)), strict=True
        ):
            new[i] = mask
    masks = tree.unflatten(new)
    delta, info = plan.compensation(
        target, old, masks, seen.curvature, estimator, state.estimate
    )  # fmt: skip
    sound &= _tree.all_finite(apply_mask(delta, masks))
    if "losses" in info:  # a check by which nothing was found
        sound &= jnp.any(jnp.isfinite(jnp.asarray(info["losses"])))
    moved = jax.tree.map(
        lambda u, d, m: jnp.where(m & sound, u + d, u), updates, delta, masks
    )  # fmt: skip
    return _cast(moved, seen.params), _tree.keep_where(sound, masks, old), ~sound


def _pruned(masks: Any, groups: list[list[int]]) -> list[jax.Array]:
    leaves = jax.tree.leaves(masks)
    return [sum(jnp.sum(~leaves[i], dtype=jnp.int32) for i in group) for group in groups]


def _violations(params: Any, masks: Any) -> jax.Array:
    wrong = jax.tree.map(lambda p, m: jnp.sum(~m & (p != 0), dtype=jnp.int32), params, masks)
    return sum(jax.tree.leaves(wrong))


def _cast(updates: Any, params: Any) -> Any:
    # in the parameters' dtype, or p + (-p) might be rounded
    return jax.tree.map(lambda u, p: u.astype(p.dtype), updates, params)


def _add(total: jax.Array, more: jax.Array) -> jax.Array:
    """A sum of counts that stays at the largest number instead of going round."""
    return total + jnp.minimum(more, jnp.iinfo(total.dtype).max - total)


def _finite_numbers(tree: Any) -> jax.Array:
    inexact = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    return _tree.all_finite(inexact) if inexact else jnp.array(True)


def _stays_finite(old: Any, new: Any) -> jax.Array:
    """Whether everything that was finite still is; a fresh state may have NaNs of its own."""
    pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    kinds = [(a, b) for a, b in pairs if jnp.issubdtype(a.dtype, jnp.inexact)]
    kept = [jnp.all(jnp.isfinite(b) | ~jnp.isfinite(a)) for a, b in kinds]
    return jnp.stack(kept).all() if kept else jnp.array(True)


def _skipped(estimate: Any) -> jax.Array:
    """How many batches or gradients an estimate says it has left out."""
    found = optax.tree_utils.tree_get_all_with_path(estimate, "skipped")
    return sum((x for _, x in found), jnp.zeros((), jnp.int32))


def _share(regrow: Any | None, step: jax.Array) -> jax.Array | None:
    if regrow is None:
        return None
    return jnp.asarray(regrow(step) if callable(regrow) else regrow, jnp.float32)


def _regrows_later(regrow: Any | None) -> bool:
    return callable(regrow)


def _comes_back(regrow: Any | None, share: jax.Array | None, pruned: list[jax.Array]) -> jax.Array:
    """Whether masks change though the sparsity does not: by a schedule of weights that return."""
    if not callable(regrow):
        return jnp.array(False)
    return (share > 0) & (sum(pruned) > 0)


Update = Callable[..., tuple[Any, GradualState]]
