"""State of a gradual pruning, and how to find and read it in an optimiser's state."""

from typing import Any, NamedTuple

import jax
import numpy as np

from fishleg_jax import _text, _tree


class GradualState(NamedTuple):
    """State of `gradual_prune` and `fishleg_prune`; arrays only.

    Attributes:
        count: Number of steps made.
        masks: Booleans like the parameters, False for pruned.
        estimate: State of the inverse Fisher.
        key: Data of a random key, which together with `count` gives the key of every step.
        assimilated: Number of batches assimilated by the estimate.
        latest: Step of the last of these batches; 0 before the first.
        asked: Sparsity requested at the last step; NaN before the first.
        pruned: Number of pruned weights below every threshold: one for all prunable leaves, or one
            for each of them (for each layer of a stacked one).  With a pattern the number that was
            requested, of which whole groups may leave a few.
        weights: Number of weights of every prunable leaf, by its key path; of a stacked leaf, of
            each layer.  The keys are the leaves that `prunable` chose in `init`.
        adjustable: Keys are the leaves that a compensation may move; None for all.
        violations: Number of pruned weights found not to be 0.0, summed over the steps.
        failures: Number of batches and mask updates refused because numbers were not finite, or the
            curvature of every prunable weight was 0.
        overdue: Number of times a due mask update was not made, because the estimate was not ready,
            the step was one with `hold` or the update was refused; 0 again once the masks have the
            requested sparsity.
        chosen: Number of mask updates that each candidate won, by its name; None unless
            `saliency` is `auto`.
        shadow: Like the parameters, with None for leaves that are not prunable: for pruned weights
            the value at which they would come back, for kept ones 0.  None unless `regrow` is given
            and the scores are magnitudes.
    """

    count: jax.Array  # shape=(), int32
    masks: Any
    estimate: Any
    key: jax.Array  # shape=(2,), uint32 with the default generator
    assimilated: jax.Array  # shape=(), int32
    latest: jax.Array  # shape=(), int32
    asked: jax.Array  # shape=(), float32
    pruned: jax.Array  # shape=(thresholds,), int32
    weights: dict[str, jax.Array]  # shape=() or (layers,), int32
    adjustable: dict[str, jax.Array] | None
    violations: jax.Array  # shape=(), int32
    failures: jax.Array  # shape=(), int32
    overdue: jax.Array  # shape=(), int32
    chosen: dict[str, jax.Array] | None = None  # shape=(), int32
    shadow: Any | None = None

    def __repr__(self) -> str:
        """Returns one line, without the entries of arrays."""
        return _text.one_line(self)


class Check(NamedTuple):
    """Health of a gradual pruning, as `check` returns it.

    Attributes:
        ok: Whether nothing went wrong and no mask update is overdue.
        violations: Number of pruned weights found not to be 0.0, summed over the steps.
        failures: Number of batches and mask updates refused because numbers were not finite, or the
            curvature of every prunable weight was 0.
        overdue: Number of times a due mask update was not made; 0 again once the masks have the
            requested sparsity.
        sparsity: Fraction of the prunable weights that is pruned.
        asked: Sparsity that the schedule requested at the last step.  It exceeds `sparsity` between
            two mask updates, which is fine, and while one is overdue, which is not.
        message: All of this, and what to do about it, in words.
    """

    ok: bool
    violations: int
    failures: int
    overdue: int
    sparsity: float
    asked: float
    message: str


def _is_gradual(node: Any) -> bool:
    return isinstance(node, GradualState)


def holds_state(tree: Any) -> bool:
    """Whether a tree contains the state of a gradual pruning."""
    return any(map(_is_gradual, jax.tree.leaves(tree, is_leaf=_is_gradual)))


def find_state(state: Any) -> GradualState:
    """State of the gradual pruning inside that of a chain or a wrapper.

    Raises:
        ValueError: There is none, or more than one.
    """
    found = [x for x in jax.tree.leaves(state, is_leaf=_is_gradual) if _is_gradual(x)]
    if len(found) != 1:
        raise ValueError(
            "state must contain the state of one gradual pruning (fishleg_prune, gradual_prune or "
            f"prune), found {len(found)} in {type(state).__name__}"
        )
    return found[0]


def masks(state: Any) -> Any:
    """Returns the masks of a gradual pruning.

    Args:
        state: Its state, or the state of an optimiser that contains it.

    Returns:
        A pytree of booleans like the parameters, False for pruned.

    Raises:
        ValueError: The state contains no gradual pruning, or more than one.

    Example:
        >>> import jax.numpy as jnp, optax, fishleg_jax as flj
        >>> tx = optax.chain(optax.sgd(0.1), flj.gradual_prune(flj.inverse.identity(), 0.5))
        >>> flj.masks(tx.init(jnp.ones((2, 2)))).all()
        Array(True, dtype=bool)
    """
    return find_state(state).masks


def check(state: Any) -> Check:
    """Reports whether pruned weights stayed 0.0, numbers were finite and no mask update is overdue.

    A compiled step can't raise, so it counts: every step counts the pruned weights that are not
    0.0, where the step before had put a zero.  A mask update that was due and could not be made is
    reported until it is made: with a number for a sparsity from the first step on, until the
    estimate is ready.

    Args:
        state: Concrete state of a gradual pruning, or of an optimiser that contains one.

    Returns:
        A `Check`; its `message` says what went wrong and what to do.

    Raises:
        ValueError: The state contains no gradual pruning, or more than one; or it is that of
            several under `vmap`, or traced.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> tx = flj.gradual_prune(flj.inverse.identity(), 0.5)
        >>> flj.check(tx.init(jnp.ones((2, 2)))).message
        'sparsity 0 after 0 steps; all pruned weights were 0.0 and all numbers finite'
    """
    found = find_state(state)
    if isinstance(found.count, jax.core.Tracer) or np.ndim(found.count):
        raise ValueError(
            "state must be the concrete state of one pruning, got "
            + ("one inside jit or scan" if np.ndim(found.count) == 0 else "several, under vmap")
        )
    # Read the counters.
    requested = int(np.asarray(found.pruned, np.int64).sum())
    pruned = requested  # of which whole groups may leave a few, so count where there are masks
    if found.masks is not None:
        named = _tree.named_leaves(found.masks)
        pruned = sum(int(_tree.count(~mask)) for name, mask in named if name in found.weights)
    weights = sum(int(np.asarray(x, np.int64).sum()) for x in found.weights.values())
    sparsity = pruned / weights
    violations, failures, overdue = map(int, (found.violations, found.failures, found.overdue))
    asked = float(found.asked)
    # Say what went wrong, and what to do about it.
    parts = []
    if violations:
        parts.append(
            f"{violations} times a pruned weight was found not to be 0.0: the pruning must be "
            "last in the chain, and copies of the weights (schedule-free, averages, lookahead) "
            "need apply_masks(params, state)"
        )
    if failures:
        parts.append(
            f"{failures} times a batch or a mask update was refused because of NaN, infinity, a "
            "sparsity outside [0, 1), or a curvature that is 0 for every prunable weight (predict "
            "in training mode, labels outside the classes); NaN weights make every update refused"
        )
    if overdue:
        parts.append(
            f"the requested {asked:.6g} is not reached: {overdue} times a mask update was due but "
            f"not made: the estimate was not ready (after {int(found.assimilated)} batches), the "
            "step had hold=True or the update was refused; FishLeg needs 32 batches to be ready"
        )
    # Sum up in one sentence.
    health = "; ".join(parts) or "all pruned weights were 0.0 and all numbers finite"
    message = f"sparsity {sparsity:.6g} after {int(found.count)} steps; {health}"
    if not overdue and asked > (requested + 1) / weights:
        message += f"; the next mask update will prune to the requested {asked:.6g}"
    return Check(not parts, violations, failures, overdue, sparsity, asked, message)
