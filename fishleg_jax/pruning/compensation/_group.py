"""Group update: the exact minimiser of the quadratic model over all kept weights."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from fishleg_jax import _tree
from fishleg_jax._checks.numbers import check_count, check_flag, check_positive, check_tolerance
from fishleg_jax._conjugate_gradients import conjugate_gradients
from fishleg_jax._curvature import Curvature
from fishleg_jax._jit import is_traced, jitted
from fishleg_jax._tree import apply_mask
from fishleg_jax.inverse._placed import prepared
from fishleg_jax.inverse.base import InverseFisher, with_damping
from fishleg_jax.pruning._soundness import require_finite_loss
from fishleg_jax.pruning.compensation._damping_search import SHORT, Trial, search, search_traced
from fishleg_jax.pruning.compensation._independent import (
    STEPS,
    Compensation,
    corrections,
    lowest_loss,
    may_move,
    pick,
    require_labels,
    scaled,
    support_of,
    to_zero,
)

FISHERS = ("exact", "estimate")


def group(
    *,
    damping: float | None = None,
    first_order: bool = False,
    iterations: int = 25,
    tolerance: float = 1e-3,
    attempts: int = 3,
    check_step: bool = True,
    fisher: str = "exact",
) -> Compensation:
    """Moves the kept weights K to make up for all pruned weights S at once.

    `δ_K = F_KK⁻¹ (F_KS w_S − g_K)` with the damped Fisher: the lowest point of the quadratic model
    `gᵀδ + ½ δᵀF_γδ` on the kept support, by conjugate gradients with exact Fisher products on the
    curvature's batches.  They start at the `independent` correction, and are preconditioned by the
    estimate of the inverse Fisher, cut to K.  No matrix is formed.

    If part of the step lowers the loss by a tenth more than the whole, the damping was too small
    for so long a step: a fourfold one is tried, and the solve continues from its current point.  A
    damping that was not given is searched for: upwards also if the loss was poorly predicted, else
    downwards, and in the other direction if the first trial is worse.  A candidate wins only if it
    gains a tenth more than the quadratic model predicts for the solve.  Without held-out batches
    the damping is only raised, as the curvature's own batches always favour the smaller one.

    Args:
        damping: Damping γ of the solve, in units of the Fisher per example; None, the default,
            searches by the loss, from that of the estimate's state.
        first_order: Whether to use the gradient, here and in the scores of one-shot pruning; False,
            the default, takes g as zero.
        iterations: Largest number of iterations of a solve, 25 by default; each is a Fisher product
            over all batches.
        tolerance: Residual at which a solve ends, relative to the right side, 0.001 by default.
        attempts: Largest number of dampings to try, 3 by default.
        check_step: Whether to choose between all, a half, a quarter or none of the change of kept
            weights by the lowest loss, True by default: on held-out batches if `prune_one_shot` has
            them.  False makes the whole change, in one attempt.
        fisher: `exact`, the default, for Fisher products on the curvature's batches; `estimate` for
            the Fisher of the gradients that the estimate holds in memory (`mfac`), cut to K and
            solved through its m×m system, without iterations.

    Returns:
        A compensation.  Its `info`: `iterations`, `residual` and `damping` of the chosen solve;
        `predicted`, `gᵀδ + ½ δᵀFδ` always with the gradient, and the `actual` change of the loss in
        nats per example; their difference over `½ δᵀF_γδ` is `ratio`, far above one where the model
        can't be trusted so far out.  `held_out` is the change on held-out batches if there are any,
        and then `losses` are theirs.  `raised` is the factor by which the estimate's damping was
        raised, None if the damping was given; a check adds the `step` and the `losses` of `STEPS`.
        Batches without labels need `check_step=False`; `predicted` and `actual` are then missing,
        and `ratio` is NaN.  Under `jit`, `predicted`, `actual`, `ratio`, `held_out` and `raised`
        are missing.

    Raises:
        ValueError: An argument out of its range; when called, or by `prune_one_shot` before the
            fit, an estimate without damping if none is given, or missing labels that are needed.

    References:
        Yu, Serra, Ramalingam & Zhe, The combinatorial brain surgeon, ICML 2022, section 4;
        Benbaki et al., Fast as CHITA, ICML 2023.

    Example:
        >>> import jax, jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
        >>> batches = [(jnp.array([[1.0, 1.0], [1.0, 0.0]]), jnp.array([3.0, 2.0]))]
        >>> result = flj.prune_one_shot(
        ...     model, jnp.array([[2.0], [1.0]])[:, 0], flj.inverse.identity(), batches,
        ...     sparsity=0.5, prunable=lambda name, w: True,
        ...     compensation=flj.compensation.group(damping=1e-6))
        >>> result.params.round(3)  # 2.5 makes up for 1.0 on half of the examples
        Array([2.5, 0. ], dtype=float32)
    """
    if damping is not None:
        damping = check_positive(damping, "damping", " or None")
    iterations, attempts = check_count(iterations, "iterations"), check_count(attempts, "attempts")
    tolerance, first_order = check_tolerance(tolerance), check_flag(first_order, "first_order")
    check_step = check_flag(check_step, "check_step")
    if fisher not in FISHERS:
        raise ValueError(f"fisher must be one of {', '.join(FISHERS)}, got {fisher!r}")
    steps = STEPS if check_step else STEPS[:1]

    def check(curvature: Curvature | None, estimator: InverseFisher, state: Any) -> None:
        if curvature is None:
            raise ValueError("curvature is needed for the Fisher products of a group update")
        if damping is None and getattr(state, "damping", None) is None:
            raise ValueError("damping must be given, because the estimator's state has none")
        if fisher == "estimate" and estimator.product is None:
            raise ValueError(
                "fisher='estimate' needs an estimate with its gradients in memory, such as "
                "inverse.mfac"
            )
        if fisher == "exact" and "product" in curvature.missing:
            raise ValueError(
                "group needs Fisher products, but the model's likelihood has fisher=None: pass "
                "one, or use another compensation"
            )
        require_labels(curvature, first_order, check_step)

    def compensate(
        params: Any,
        old_mask: Any,
        new_mask: Any,
        curvature: Curvature,
        estimator: InverseFisher,
        state: Any,
        adjustable: Any | None = None,
    ) -> tuple[Any, dict]:
        check(curvature, estimator, state)
        # Gradient and Fisher products at these weights.
        lowest = state.damping if damping is None else damping
        params = _tree.widen(params)
        gradient = None if "gradient" in curvature.missing else curvature.gradient(params)
        measurable = "loss" not in curvature.missing

        def fisher_product(v):
            if fisher == "estimate":
                return jitted(estimator.product)(state, v)
            return curvature.product(params, v)

        # Start at the corrections of single weights.
        zero = jax.tree.map(jnp.zeros_like, params)
        pruned = to_zero(params, zero, new_mask)
        factored = prepared(estimator, state, params)
        support = support_of(old_mask, new_mask, adjustable)
        change = jitted(corrections, estimator)(
            factored, params, support, new_mask, gradient if first_order else None
        )
        # K, the kept weights that may move, and the right side of their system.
        free = may_move(new_mask, adjustable)
        x = apply_mask(change, free)
        kept_gradient = gradient if first_order else zero
        right = jitted(right_side)(fisher_product(pruned), kept_gradient, free)

        def solve(x: Any, raised: float) -> Trial:
            # Solve the damped system on K.
            gamma = jnp.asarray(lowest * raised)

            def product(v):
                return jitted(damped)(fisher_product(v), v, gamma, free)

            if fisher == "estimate":
                x = jitted(_direct, estimator)(state, free, gamma, right)
            # the exact solution needs no iterations
            solved = conjugate_gradients(
                product,
                jitted(precondition, estimator),
                (factored, free),
                right,
                x,
                iterations=iterations if fisher == "exact" else 0,
                tolerance=tolerance,
            )
            x = solved.x
            # Choose the share of the step by its loss.
            deltas = [scaled(params, x, new_mask, step) for step in steps]
            i, losses = 0, [0.0]
            if measurable or curvature.check is not None:
                i, losses = lowest_loss(curvature, params, deltas)
            loss, step = losses[i], pick(steps, i)
            delta = deltas[i] if isinstance(i, int) else scaled(params, x, new_mask, step)
            # gain of the quadratic model on K, from no change to its lowest point
            gain = _tree.dot(right, x) / 2
            # on the host these are Python booleans, for which ~ is always true
            too_long = jnp.logical_not(losses[0] - loss <= SHORT * (losses[-1] - loss))
            # Report; under `jit` without the numbers that need the host.
            info = {"damping": gamma, "iterations": solved.iterations, "residual": solved.relative}
            if check_step:
                info |= {"step": step, "losses": losses}
            if not traced:
                info = {name: _plain(value) for name, value in info.items()}
                info["raised"] = raised if damping is None else None
                info |= measured(loss, delta, gamma)
                loss = loss if math.isfinite(loss) else math.inf
                too_long, gain = bool(too_long), float(gain)
            return Trial(raised, x, delta, loss, info, too_long, gain)

        def measured(loss: float, delta: Any, gamma: jax.Array) -> dict:
            info = {}
            if curvature.check is not None:  # then `loss` is measured on held-out batches
                info["held_out"] = loss - float(curvature.check(params))
                if measurable:
                    loss = float(curvature.loss(jax.tree.map(jnp.add, params, delta)))
            if not measurable or gradient is None:
                return info | {"ratio": math.nan}
            actual = loss - float(curvature.loss(params))
            return info | _told(gradient, delta, fisher_product(delta), gamma, actual)

        # Search for the damping, by the loss.
        number = attempts if check_step else 1
        traced = is_traced((right, state))
        if traced:
            found = search_traced(solve, x, attempts=number)
        else:
            lower = curvature.check is not None
            found = search(solve, x, attempts=number, chosen=damping is None, lower=lower)
            require_finite_loss(found.info.get("losses", [found.loss]))
        return found.delta, found.info

    compensate.check, compensate.measures_loss = check, True
    compensate.first_order = first_order
    return compensate


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, jax.Array) else value


def _told(gradient: Any, delta: Any, image: Any, gamma: jax.Array, actual: float) -> dict:
    first, second = float(_tree.dot(gradient, delta)), float(_tree.dot(delta, image)) / 2
    scale = second + float(gamma * _tree.dot(delta, delta)) / 2
    ratio = abs(actual - first - second) / scale if scale > 0 else 0.0
    return {"predicted": first + second, "actual": actual, "ratio": ratio}


def _direct(estimator: InverseFisher, state: Any, mask: Any, gamma: jax.Array, right: Any) -> Any:
    """Product of `(F_KK + γ)⁻¹`, by the estimate's own gradients, with the right side."""
    kept = with_damping(estimator.restrict(state, mask), gamma)
    return estimator.multiply(kept, right, mask)


def right_side(image: Any, gradient: Any, mask: Any) -> Any:
    """Right side `F_KS w_S − g_K`, from the image `−F E_S w_S` of pruning S and the gradient."""
    return apply_mask(jax.tree.map(lambda f, g: -f - g, image, gradient), mask)


def damped(image: Any, vector: Any, gamma: jax.Array, mask: Any) -> Any:
    """Damped product `F_KK v + γ v`, from the image `F v`."""
    return apply_mask(jax.tree.map(lambda f, v: f + gamma * v, image, vector), mask)


def precondition(estimator: InverseFisher, state: Any, mask: Any, residual: Any) -> Any:
    """Product of the estimate of the inverse, cut to K, with a residual."""
    return estimator.multiply(state, residual, mask)
