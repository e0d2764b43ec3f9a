"""Checks that the numbers behind a pruning are meaningful: curvature, losses, examples."""

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

FEW = 32  # number of examples to predict when testing whether they depend on each other
NEIGHBOURS = 0.05  # share of the variation between examples from which a change is not rounding
ROUNDING = 8  # units in the last place of an output


class UnsoundCurvature(ValueError, FloatingPointError):
    """Raised for an inverse Fisher that carries no information on the weights to be pruned.

    A ValueError, as it is nearly always the input's fault; and a FloatingPointError, so that it
    ends a pruning in a later stage like other invalid numbers.
    """


def some_curvature(
    estimator: InverseFisher, chosen: Sequence[bool], state: Any, params: Any, masks: Any
) -> tuple[jax.Array, jax.Array]:
    """Whether any kept weight of the chosen leaves has a positive finite curvature.

    Returns:
        That, a boolean scalar, and whether all others have a curvature of 0.
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
    """Raises unless some kept prunable weight has a curvature.

    Args:
        estimator: Estimate of the inverse Fisher; not checked without `fisher_diagonal`.
        chosen: Whether each leaf is prunable.
        state: Fitted state of the estimator.
        params: Weights.
        masks: Masks of the weights, False for pruned.

    Raises:
        UnsoundCurvature: No weight has one: scores would be those of magnitude pruning, or
            meaningless.
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
            f"the model's gradients are not finite: all {count} gradients of the fit were NaN or "
            "infinite; check the model's loss and labels"
        )
    if zero:
        raise UnsoundCurvature(
            "the estimate's Fisher is zero for every prunable weight, so scores would be "
            "magnitudes: predict must run in evaluation mode, some labels must not be ignored, and "
            "the loss must depend on the weights; for magnitude pruning use inverse.identity()"
        )
    raise UnsoundCurvature(
        "the estimate's Fisher is not finite for any prunable weight; check the model's outputs "
        "and gradients for NaN and infinity"
    )


def _seen(state: Any) -> tuple[int, int]:
    """Number of gradients received, and of those skipped, if the state reports it."""
    skipped = getattr(state, "skipped", None)
    return (0, 0) if skipped is None else (int(state.count), int(skipped))


def check_ready(estimator: InverseFisher, state: Any) -> None:
    """Raises an UnsoundCurvature for a state that is not ready, by the estimate's own test."""
    if estimator.ready is None or bool(estimator.ready(state)):
        return
    needed, count = estimator.gradients, getattr(state, "count", None)
    came = "" if count is None else f" after {int(count)} {'gradients' if needed else 'batches'}"
    lacks = "more batches" if needed is None else f"{needed} gradients"
    skipped = int(getattr(getattr(state, "guard", None), "skipped", 0))
    lost = f"; {skipped} batches with NaN or infinity were skipped" if skipped else ""
    raise UnsoundCurvature(f"state of the estimator is not ready{came}: it needs {lacks}{lost}")


def check_enough(
    estimator: InverseFisher, batches: Sequence[BatchLike], stages: int, per_stage: int
) -> None:
    """Raises a ValueError if a stage's batches have too few gradients for the estimate.

    Args:
        estimator: Estimate of the inverse Fisher.
        batches: All batches.
        stages: Number of stages.
        per_stage: Number of batches in each, which take turns.
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
                f"the batches{where} give {came} gradients, but the estimator needs {needed}: pass "
                f"more examples, or set gradients={came} (inverse.woodfisher)"
            )


def check_single_examples(
    estimator: InverseFisher, model: Model, params: Any, batches: Sequence[BatchLike]
) -> None:
    """Raises a ValueError if outputs depend on neighbours and the estimate needs single examples.

    An example is predicted in its batch and among copies of itself: outputs that use batch
    statistics change, and all others are the same to the last bit, as the shapes are.
    """
    if estimator.examples_per_gradient != 1:
        return
    # Find a batch of several examples; models that name axes are not tested.
    batch = next((b for b in batches if _chunks.number_of_examples(b) > 1), None)
    if batch is None or mesh.explicit_mesh((params, batch)) is not None:
        return
    inputs, targets, constants = split_batch(batch)
    whole = all(mesh.sharding_of(x) is None for x in jax.tree.leaves((params, inputs)))
    if whole:
        inputs, targets = jax.tree.map(lambda x: x[:FEW], (inputs, targets))
    # Predict the first example in its batch, and among copies of itself.
    copies = placement.like(jitted(_copies)(inputs), inputs)
    run = jitted(predict, model)
    together, apart = (run(params, (x, targets, *constants)) for x in (inputs, copies))
    # Compare the change with the variation between examples, and with rounding.
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
            "model.predict must treat every example independently, but outputs of the first "
            f"example change by {moved:.2g} with the other examples of its batch: use evaluation "
            "mode, with batch-norm statistics as constants of the batches (examples differ by up "
            f"to {varied:.2g})"
        )


def _copies(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), tree)


def _moved(examples: int, together: Any, apart: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Largest change of the first example's outputs, distance of examples, and output."""
    moved, varied, size = [], [], []
    for x, y in zip(jax.tree.leaves(together), jax.tree.leaves(apart), strict=True):
        if x.ndim == 0 or len(x) != examples or not jnp.issubdtype(x.dtype, jnp.floating):
            continue
        x, y = _tree.widen((x, y))
        moved.append(jnp.max(jnp.abs(x[0] - y[0]), initial=0))
        varied.append(jnp.max(jnp.abs(x - x[:1]), initial=0))
        size.append(jnp.max(jnp.abs(x), initial=0))
    # an output that is not finite is rejected elsewhere, and compares as no movement
    return tuple(jnp.max(jnp.stack(x)) if x else jnp.zeros(()) for x in (moved, varied, size))


def check_losses(
    curvature_on: Callable[[Sequence[BatchLike]], Curvature],
    params: Any,
    batches: Sequence[BatchLike],
    argument: str,
) -> None:
    """Raises a FloatingPointError if the loss of the initial weights is not finite.

    Args:
        curvature_on: Function from batches to their curvature.
        params: Weights.
        batches: Batches on which the loss will be measured.
        argument: Name of the argument that holds the batches.
    """
    wide = _tree.widen(params)
    if any(split_batch(batch)[1] is None for batch in batches):
        return  # it can't be measured without labels
    for i, batch in enumerate(batches):
        loss = float(curvature_on([batch]).loss(wide))
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss on {argument}[{i}] is {loss} before pruning, so its change cannot be "
                "measured; check the labels and the model's outputs"
            )


def require_finite_loss(losses: Sequence[float]) -> None:
    """Raises a FloatingPointError if all losses that a step was to be chosen by are invalid."""
    if not any(map(math.isfinite, losses)):
        raise FloatingPointError(
            f"the loss of the pruned weights is not finite for any size of the step: {losses}"
        )
