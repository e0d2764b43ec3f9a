"""Compensations that change nothing, or add up single-weight corrections."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fishleg_jax import _tree
from fishleg_jax._checks.numbers import check_flag, check_number
from fishleg_jax._curvature import Curvature
from fishleg_jax._jit import is_traced, jitted
from fishleg_jax._tree import apply_mask
from fishleg_jax.inverse._placed import prepared
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.pruning._soundness import require_finite_loss

# (params, old_mask, new_mask, curvature, estimator, state) -> (delta, info)
Compensation = Callable[[Any, Any, Any, Any, Any, Any], tuple[Any, dict[str, Any]]]
STEPS = (1.0, 0.5, 0.25, 0.0)  # shares of a change that a check of the step compares


def to_zero(params: Any, delta: Any, new_mask: Any) -> Any:
    """Replaces the change of every pruned weight by `-w`."""
    return jax.tree.map(lambda w, d, m: jnp.where(m, d, -w), params, delta, new_mask)


def none() -> Compensation:
    """Keeps the kept weights as they are.

    Returns:
        A compensation.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> keep = flj.compensation.none()
        >>> mask = jnp.array([True, False])
        >>> keep(jnp.array([1.0, 2.0]), jnp.array([True, True]), mask, None, None, None)[0]
        Array([ 0., -2.], dtype=float32)
    """

    def compensate(
        params: Any,
        old_mask: Any,
        new_mask: Any,
        curvature: Curvature | None,
        estimator: InverseFisher,
        state: Any,
        adjustable: Any | None = None,
    ) -> tuple[Any, dict]:
        del old_mask, curvature, estimator, state, adjustable
        params = _tree.widen(params)
        return to_zero(params, jax.tree.map(jnp.zeros_like, params), new_mask), {}

    return compensate


def independent(
    scale: float = 1.0, first_order: bool = False, check_step: bool | None = None
) -> Compensation:
    """Adds up the Optimal Brain Surgeon corrections of the pruned weights, each taken by itself.

    `δ = −F⁻¹ (1_S ⊙ w / diag F⁻¹)`, and then the pruned set S is set to zero exactly, as in
    WoodFisher, M-FAC and FLS (Singh & Alistarh 2020, section 4).  With the identity as the inverse
    no kept weight changes.

    Args:
        scale: Share of the change of kept weights, in [0, 1]: 1, the default, is Optimal Brain
            Surgeon, 0 Optimal Brain Damage, which leaves them as they are.
        first_order: Whether to use the gradient (WoodTaylor), here and in the scores of one-shot
            pruning, False by default: the weights head for `t = w − F⁻¹g`, and
            `δ = −F⁻¹ (g + 1_S ⊙ t / diag F⁻¹)`.
        check_step: Whether to choose between all, a half, a quarter or none of the change of kept
            weights by the lowest loss: on held-out batches if `prune_one_shot` has them, else on
            the curvature's.  None checks if `first_order`, as an unchecked first-order step can
            destroy a model.

    Returns:
        A compensation.  With a check its `info` has the chosen `step`, a share of `scale`, and the
        `losses` of all of `STEPS`, in nats per example.

    Raises:
        ValueError: An argument out of its range; when called, or by `prune_one_shot` before the
            fit, batches without labels for a gradient or a check.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> identity, correct = flj.inverse.identity(), flj.compensation.independent()
        >>> old, new = jnp.array([True, True]), jnp.array([True, False])
        >>> correct(jnp.array([1.0, 2.0]), old, new, None, identity, ())[0]
        Array([-0., -2.], dtype=float32)
    """
    scale = check_number(scale, "scale", lambda x: 0 <= x <= 1, "a number in [0, 1]")
    first_order = check_flag(first_order, "first_order")
    check_step = first_order if check_step is None else check_flag(check_step, "check_step")

    def check(curvature: Curvature | None, estimator: InverseFisher, state: Any) -> None:
        if curvature is None and (first_order or check_step):
            raise ValueError("curvature is needed for the gradient and for the check of the step")
        require_labels(curvature, first_order, check_step)

    def compensate(
        params: Any,
        old_mask: Any,
        new_mask: Any,
        curvature: Curvature | None,
        estimator: InverseFisher,
        state: Any,
        adjustable: Any | None = None,
    ) -> tuple[Any, dict]:
        params = _tree.widen(params)
        check(curvature, estimator, state)
        gradient = curvature.gradient(params) if first_order else None
        correct = jitted(corrections, estimator)
        support = support_of(old_mask, new_mask, adjustable)
        # Add up the corrections of all pruned weights.
        delta = correct(state, params, support, new_mask, gradient)
        delta = apply_mask(delta, None if adjustable is None else may_move(new_mask, adjustable))
        if not check_step:
            return jitted(scaled)(params, delta, new_mask, scale), {}
        # Choose the share of the change with the lowest loss.
        candidates = [scaled(params, delta, new_mask, scale * step) for step in STEPS]
        best, losses = lowest_loss(curvature, params, candidates)
        if isinstance(best, int):
            require_finite_loss(losses)
        step = pick(STEPS, best)
        return scaled(params, delta, new_mask, scale * step), {"step": step, "losses": losses}

    if first_order or check_step:
        compensate.check, compensate.measures_loss = check, check_step
    compensate.first_order = first_order
    return compensate


def may_move(new_mask: Any, adjustable: Any | None) -> Any:
    """Masks of the kept weights in adjustable leaves; of all kept ones if `adjustable` is None."""
    if adjustable is None:
        return new_mask
    return jax.tree.map(lambda m, yes: m if yes else jnp.zeros_like(m), new_mask, adjustable)


def support_of(old_mask: Any, new_mask: Any, adjustable: Any | None) -> Any:
    """Masks of the weights that a correction covers: those to be pruned, and those that may move.

    Other leaves stay as they are, so a correction must not rely on them.
    """
    if adjustable is None:
        return old_mask
    free = may_move(new_mask, adjustable)
    return jax.tree.map(lambda old, new, f: old & (f | ~new), old_mask, new_mask, free)


def require_labels(curvature: Curvature | None, gradient: bool, check_step: bool) -> None:
    """Raises a ValueError if a gradient or a check is requested and labels are missing."""
    if curvature is None:
        return
    if gradient and "gradient" in curvature.missing:
        raise ValueError("batches must have labels for first_order=True, got targets of None")
    if check_step and curvature.check is None and "loss" in curvature.missing:
        raise ValueError(
            "batches must have labels for check_step=True, got targets of None; use "
            "check_step=False without labels"
        )


def lowest_loss(
    curvature: Curvature, params: Any, deltas: Sequence[Any]
) -> tuple[int | jax.Array, list[float] | jax.Array]:
    """Index of the change with the lowest finite loss, and the losses of all changes.

    If no loss is finite the last index, that of no change of kept weights in `STEPS`.  Losses are
    those on held-out data if the curvature has any to check on.  Under `jit` they are arrays.
    """
    loss = curvature.check or curvature.loss
    losses = [loss(jax.tree.map(jnp.add, params, d)) for d in deltas]
    if is_traced(losses):
        losses = jnp.stack(losses)
        finite = jnp.isfinite(losses)
        best = jnp.argmin(jnp.where(finite, losses, jnp.inf))
        return jnp.where(finite.any(), best, len(losses) - 1), losses
    losses = list(map(float, losses))
    finite = [i for i, x in enumerate(losses) if math.isfinite(x)]
    return min(finite, key=losses.__getitem__, default=len(losses) - 1), losses


def pick(values: Sequence[float], index: int | jax.Array) -> float | jax.Array:
    """Number at an index, which may be traced."""
    return values[index] if isinstance(index, int) else jnp.asarray(values)[index]


def scaled(params: Any, delta: Any, new_mask: Any, scale: float | jax.Array) -> Any:
    """Share of the change of kept weights, with the whole change of pruned ones."""
    share = jax.tree.map(lambda d: jnp.asarray(scale, d.dtype) * d, delta)
    return to_zero(params, share, new_mask)


def corrections(
    estimator: InverseFisher,
    state: Any,
    params: Any,
    old_mask: Any,
    new_mask: Any,
    gradient: Any | None,
) -> Any:
    """Formula of `independent`, over all weights; a gradient of None counts as zero."""
    state = prepared(estimator, state, params)
    diagonal = estimator.diagonal(state, params, old_mask)
    target = params
    if gradient is not None:
        target = jax.tree.map(jnp.subtract, params, estimator.multiply(state, gradient, old_mask))
    multipliers = jax.tree.map(
        lambda t, q, old, new: jnp.where(old & ~new, t / jnp.where(old, q, 1), 0),
        target,
        diagonal,
        old_mask,
        new_mask,
    )
    if gradient is not None:
        multipliers = jax.tree.map(jnp.add, multipliers, gradient)
    return jax.tree.map(jnp.negative, estimator.multiply(state, multipliers, old_mask))
