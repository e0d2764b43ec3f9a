"""Whether numbers that a pruning is about to go by mean anything: curvature, losses, examples."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fishleg_jax import _chunks, _tree
from fishleg_jax._curvature import Curvature
from fishleg_jax._devices import mesh, placement
from fishleg_jax._jit import jitted
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.model import BatchLike, Model, predict, split_batch

FEW = 32  # examples that are predicted to see whether they depend on each other
NEIGHBOURS = 0.05  # of how much outputs vary between examples: a change that is no rounding
ROUNDING = 8  # units in the last place of an output


class UnsoundCurvature(ValueError, FloatingPointError):
    """An inverse Fisher that says nothing about the weights to be pruned.

    A ValueError, as it is nearly always the input's fault; and a FloatingPointError, so that it
    ends a pruning in a later stage like other numbers that are of no use.
    """


def some_curvature(
    estimator: InverseFisher, chosen: Sequence[bool], state: Any, params: Any, masks: Any
) -> tuple[jax.Array, jax.Array]:
    """Whether any surviving weight of the chosen leaves has a positive finite curvature.

    Returns:
        That, a boolean scalar, and whether all the others have a curvature of 0.
    """
    found = jax.tree.leaves(estimator.fisher_diagonal(state, params, masks))
    leaves = zip(found, jax.tree.leaves(masks), chosen, strict=True)
    own = [(f, m) for f, m, yes in leaves if yes]
    some = jnp.stack([jnp.any((f > 0) & jnp.isfinite(f) & m) for f, m in own]).any()
    zero = jnp.stack([jnp.all((f == 0) | ~m) for f, m in own]).all()
    return some, zero


def check_curvature(
    estimator: InverseFisher, chosen: Sequence[bool], state: Any, params: Any, masks: Any
) -> None:
    """Raises unless some prunable weight that survives has a curvature.

    Args:
        estimator: the inverse Fisher; one without `fisher_diagonal` is not looked at.
        chosen: which leaves are prunable.
        state: of the estimator, fitted.
        params: the weights.
        masks: which of them survive.

    Raises:
        UnsoundCurvature: none has: scores would be those of magnitude pruning, or nothing.
    """
    if estimator.fisher_diagonal is None:
        return
    look = jitted(some_curvature, estimator, tuple(chosen))
    some, zero = map(bool, look(state, params, masks))
    if some:
        return
    count, skipped = _seen(state)
    if count and skipped == count:
        raise UnsoundCurvature(
            f"the model's gradients are not finite: all {count} that the estimate was fitted to "
            "were NaN or infinite; look at the model's loss and labels"
        )
    if zero:
        raise UnsoundCurvature(
            "the estimate's Fisher is zero for every prunable weight, so that it would prune by "
            "magnitude: predict must be in evaluation mode, some labels must not be ignored, and "
            "the loss must depend on the weights; for magnitude pruning use inverse.identity()"
        )
    raise UnsoundCurvature(
        "the estimate's Fisher is not finite for any prunable weight; look for NaN and infinity in "
        "the model's outputs and gradients"
    )


def _seen(state: Any) -> tuple[int, int]:
    """How many gradients came, and how many of them were skipped, where the state says so."""
    skipped = getattr(state, "skipped", None)
    return (0, 0) if skipped is None else (int(state.count), int(skipped))


def check_ready(estimator: InverseFisher, state: Any) -> None:
    """Raises an UnsoundCurvature for a state that has seen too little, by the estimate itself."""
    if estimator.ready is None or bool(estimator.ready(state)):
        return
    needed, count = estimator.gradients, getattr(state, "count", None)
    came = "" if count is None else f" after {int(count)} {'gradients' if needed else 'batches'}"
    lacks = "more batches" if needed is None else f"{needed} gradients"
    skipped = int(getattr(getattr(state, "guard", None), "skipped", 0))
    lost = f"; {skipped} batches were left out as NaN or infinite" if skipped else ""
    raise UnsoundCurvature(f"state of the estimator is not ready{came}: it needs {lacks}{lost}")


def check_enough(
    estimator: InverseFisher, batches: Sequence[BatchLike], stages: int, per_stage: int
) -> None:
    """Raises a ValueError where a stage's batches have too few gradients for the estimate.

    Args:
        estimator: the inverse Fisher.
        batches: all batches.
        stages: number of stages.
        per_stage: number of batches in each, which take turns.
    """
    needed, each = estimator.gradients, estimator.examples_per_gradient or 1
    if needed is None:
        return
    sizes = [_chunks.number_of_examples(batch) // each for batch in batches]
    updates = per_stage if estimator.updates is None else estimator.updates
    for stage in range(stages):
        first = stage * per_stage
        came = sum(sizes[(first + i % per_stage) % len(sizes)] for i in range(updates))
        if came < needed:
            where = "" if stages == 1 else f" of stage {stage + 1}"
            raise ValueError(
                f"the batches{where} have {came} gradients, but the estimator waits for {needed}: "
                f"hand in more examples, or set gradients={came} (inverse.woodfisher)"
            )


def check_single_examples(
    estimator: InverseFisher, model: Model, params: Any, batches: Sequence[BatchLike]
) -> None:
    """Raises a ValueError where outputs depend on neighbours, and the estimate bars that.

    An example is predicted in its batch and among copies of itself: what it makes of batch
    statistics changes, and all else is the same to the last bit, as the shapes are.
    """
    if estimator.examples_per_gradient != 1:
        return
    batch = next((b for b in batches if _chunks.number_of_examples(b) > 1), None)
    if batch is None or mesh.explicit_mesh((params, batch)) is not None:
        return
    inputs, targets, constants = split_batch(batch)
    whole = all(mesh.sharding_of(x) is None for x in jax.tree.leaves((params, inputs)))
    if whole:
        inputs, targets = jax.tree.map(lambda x: x[:FEW], (inputs, targets))
    copies = placement.like(jitted(_copies)(inputs), inputs)
    run = jitted(predict, model)
    together, apart = (run(params, (x, targets, *constants)) for x in (inputs, copies))
    coarsest = max(
        (
            float(jnp.finfo(x.dtype).eps)
            for x in jax.tree.leaves((params, inputs, together))
            if jnp.issubdtype(jnp.result_type(x), jnp.floating)
        ),
        default=0.0,
    )
    examples = len(jax.tree.leaves(inputs)[0])
    moved, varied, size = map(float, jitted(_moved, examples)(together, apart))
    if moved > max(NEIGHBOURS * varied, ROUNDING * coarsest * size):
        raise ValueError(
            "model.predict must predict every example by itself, but outputs of the first example "
            f"move by {moved:.2g} with the others of its batch: use evaluation mode, with the "
            "statistics of batch norm as constants of the batches (examples differ by up to "
            f"{varied:.2g})"
        )


def _copies(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), tree)


def _moved(examples: int, together: Any, apart: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """How far outputs of the first example move, how far examples are apart, and the largest."""
    moved, varied, size = [], [], []
    for x, y in zip(jax.tree.leaves(together), jax.tree.leaves(apart), strict=True):
        if x.ndim == 0 or len(x) != examples or not jnp.issubdtype(x.dtype, jnp.floating):
            continue
        x, y = _tree.widen((x, y))
        moved.append(jnp.max(jnp.abs(x[0] - y[0]), initial=0))
        varied.append(jnp.max(jnp.abs(x - x[:1]), initial=0))
        size.append(jnp.max(jnp.abs(x), initial=0))
    # an output that is not finite is refused elsewhere, and compares as no movement
    return tuple(jnp.max(jnp.stack(x)) if x else jnp.zeros(()) for x in (moved, varied, size))


def check_losses(
    curvature_on: Callable[[Sequence[BatchLike]], Curvature],
    params: Any,
    batches: Sequence[BatchLike],
    argument: str,
) -> None:
    """Raises a FloatingPointError where the loss of the weights that came in is not finite.

    Args:
        curvature_on: makes the loss on some batches.
        params: the weights.
        batches: where it is going to be measured.
        argument: the name of these.
    """
    wide = _tree.widen(params)
    if any(split_batch(batch)[1] is None for batch in batches):
        return  # it can't be measured there
    for i, batch in enumerate(batches):
        loss = float(curvature_on([batch]).loss(wide))
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss on {argument}[{i}] is {loss} before anything is pruned, so that no "
                "change of it can be measured; look at its labels and the model's outputs"
            )


def require_finite_loss(losses: Sequence[float]) -> None:
    """Raises a FloatingPointError where all losses that a step was to be chosen by are invalid."""
    if not any(map(math.isfinite, losses)):
        raise FloatingPointError(
            f"the loss of the pruned weights is not finite, whatever the step: {losses}"
        )
