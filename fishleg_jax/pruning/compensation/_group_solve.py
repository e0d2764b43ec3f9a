"""The solve behind the group update: right side, damping, iterations, and the loss that ends it."""

import functools
import logging
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _random, _tree
from fishleg_jax._conjugate_gradients import Solve, conjugate_gradients
from fishleg_jax._curvature import Curvature
from fishleg_jax._devices import sharding
from fishleg_jax._jit import is_traced, jitted
from fishleg_jax._tree import apply_mask
from fishleg_jax.inverse._placed import prepared
from fishleg_jax.inverse.base import InverseFisher, movable_damping, with_damping
from fishleg_jax.pruning._soundness import require_finite_loss
from fishleg_jax.pruning.compensation._damping_search import SHORT, Trial, search, search_traced
from fishleg_jax.pruning.compensation._independent import (
    STEPS,
    corrections,
    lowest_loss,
    may_move,
    pick,
    scaled,
    support_of,
    to_zero,
)

RELATIVE_DAMPING = 0.2  # first damping of a search, relative to the Fisher's mean diagonal
EVERY = 3  # iterations between two looks at the held-out loss
PATIENCE = 2  # looks without a new lowest loss that end a solve
_LOG = logging.getLogger("fishleg_jax")


class Settings(NamedTuple):
    """Arguments of `compensation.group`."""

    damping: float | None
    first_order: bool
    iterations: int
    tolerance: float
    attempts: int
    seconds: float | None
    check_step: bool
    fisher: str


def solve_group(
    settings: Settings,
    params: Any,
    old_mask: Any,
    new_mask: Any,
    curvature: Curvature,
    estimator: InverseFisher,
    state: Any,
    adjustable: Any | None,
) -> tuple[Any, dict]:
    """Change of the weights and numbers to report; arguments as those of a compensation."""
    exact, first_order = settings.fisher == "exact", settings.first_order
    # Gradient and Fisher products at these weights.
    params = _tree.widen(params)
    gradient = None if "gradient" in curvature.missing else curvature.gradient(params)
    measurable = "loss" not in curvature.missing
    products = 0

    def fisher_product(v):
        nonlocal products
        products += 1
        return curvature.product(params, v) if exact else jitted(estimator.product)(state, v)

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
    right = jitted(right_side)(fisher_product(pruned), gradient if first_order else zero, free)
    traced = is_traced((right, state))
    # The first damping, and a statement of the work beforehand.
    number = settings.attempts if settings.check_step else 1
    first, begin = settings.damping, time.perf_counter()
    if first is None and not exact:
        first = state.damping
    if first is None:
        signs = jitted(random_signs)(params, free)
        if not traced:
            jax.block_until_ready((right, signs))
        begin = time.perf_counter()
        first = jitted(mean_diagonal)(signs, fisher_product(signs), free) * RELATIVE_DAMPING
    if not traced and exact and settings.damping is None:
        jax.block_until_ready(first)
        most = number * (settings.iterations + 2)  # with those of the start and the prediction
        budget = most * (time.perf_counter() - begin)
        limit = "" if settings.seconds is None else f", within {settings.seconds:g} s"
        _LOG.info("group: at most %d Fisher products, about %.3g s%s", most, budget, limit)
    deadline = math.inf if settings.seconds is None else begin + settings.seconds

    steps = STEPS if settings.check_step else STEPS[:1]
    judged = settings.check_step and curvature.check is not None and not traced and exact

    def solve(x: Any, raised: float) -> Trial:
        # Solve the damped system on K, preconditioned at the same damping where that is cheap.
        gamma = jnp.asarray(first * raised)
        inverse = factored
        if not traced and movable_damping(state):
            inverse = prepared(estimator, with_damping(state, gamma), params)

        def product(v):
            return jitted(damped)(fisher_product(v), v, gamma, free)

        if not exact:
            x = jitted(_direct, estimator)(state, free, gamma, right)
        best = Best()

        def look(now: Solve) -> bool:
            """Notes the held-out loss of an iterate; whether to end the solve."""
            late = time.perf_counter() > deadline
            if not judged or int(now.iterations) % EVERY:
                return late
            return noted(now) or late

        def noted(now: Solve) -> bool:
            moved = jax.tree.map(jnp.add, params, scaled(params, now.x, new_mask, 1.0))
            return best.noted(now, float(curvature.check(moved)))

        solved = conjugate_gradients(
            product,
            jitted(precondition, estimator),
            (inverse, free),
            right,
            x,
            iterations=settings.iterations if exact else 0,  # the exact solution needs none
            tolerance=settings.tolerance,
            on_iteration=look,
        )
        if judged:
            if int(solved.iterations) % EVERY:
                noted(solved)
            solved = best.solve or solved
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
        too_long = jnp.logical_not(losses[0] - loss <= SHORT * (losses[-1] - loss))
        # Report; under `jit` without the numbers that need the host.
        info = {"damping": gamma, "iterations": solved.iterations, "residual": solved.relative}
        if settings.check_step:
            info |= {"step": step, "losses": losses}
        if not traced:
            info = {name: _plain(value) for name, value in info.items()}
            info |= measured(loss, delta, gamma)
            loss = loss if math.isfinite(loss) else math.inf
            too_long, gain = bool(too_long), float(gain)
        return Trial(raised, x, delta, loss, info, too_long, gain)

    @functools.cache
    def before(loss: Callable[[Any], jax.Array]) -> float:
        return float(loss(params))  # the same for all attempts

    def measured(loss: float, delta: Any, gamma: jax.Array) -> dict:
        info = {}
        if curvature.check is not None:  # then `loss` is measured on held-out batches
            info["held_out"] = loss - before(curvature.check)
            if measurable:
                loss = float(curvature.loss(jax.tree.map(jnp.add, params, delta)))
        if not measurable or gradient is None:
            return info | {"ratio": math.nan}
        actual = loss - before(curvature.loss)
        return info | _prediction(gradient, delta, fisher_product(delta), gamma, actual)

    # Search for the damping, by the loss.
    if traced:
        found = search_traced(solve, x, attempts=number)
        return found.delta, found.info
    lower = curvature.check is not None
    late = lambda: time.perf_counter() > deadline
    found = search(
        solve, x, attempts=number, chosen=settings.damping is None, lower=lower, ended=late
    )
    require_finite_loss(found.info.get("losses", [found.loss]))
    return found.delta, found.info | {"products": products}


class Best:
    """Iterate of a solve with the lowest held-out loss so far."""

    def __init__(self):
        """Starts without any."""
        self.solve, self.loss, self.worse = None, math.inf, 0

    def noted(self, solve: Solve, loss: float) -> bool:
        """Compares an iterate, and says whether the loss has stopped falling."""
        if loss < self.loss:
            self.solve, self.loss, self.worse = solve, loss, 0
        else:  # also if it is NaN
            self.worse += 1
        return self.worse >= PATIENCE


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, jax.Array) else value


def _prediction(
    gradient: Any, delta: Any, image: Any, gamma: jax.Array, actual: float
) -> dict[str, float]:
    first, second = float(_tree.dot(gradient, delta)), float(_tree.dot(delta, image)) / 2
    scale = second + float(gamma * _tree.dot(delta, delta)) / 2
    ratio = abs(actual - first - second) / scale if scale > 0 else 0.0
    return {"predicted": first + second, "actual": actual, "ratio": ratio}


def _direct(estimator: InverseFisher, state: Any, mask: Any, gamma: jax.Array, right: Any) -> Any:
    """Product of `(F_KK + γ)⁻¹`, by the estimate's own gradients, with the right side."""
    kept = with_damping(estimator.restrict(state, mask), gamma)
    return estimator.multiply(kept, right, mask)


def random_signs(params: Any, mask: Any) -> Any:
    """Fixed random signs on K and zeros elsewhere, in the dtypes of the weights."""
    leaves, tree = jax.tree.flatten(params)

    def draw(leaves, masks):
        drawn = _random.like(leaves, jax.random.key(0), _random.signs)
        return [jnp.where(m, x, 0) for x, m in zip(drawn, masks, strict=True)]

    return tree.unflatten(sharding.automatic(draw, leaves, leaves, jax.tree.leaves(mask)))


def mean_diagonal(signs: Any, image: Any, mask: Any) -> jax.Array:
    """Estimate of the mean of F's diagonal on K, `zᵀFz / |K|` for random signs z (Hutchinson)."""
    size = sum(jnp.sum(m.astype(jnp.float32)) for m in jax.tree.leaves(mask))
    tiny = jnp.finfo(jnp.float32).tiny ** 0.5
    return jnp.maximum(_tree.dot(signs, image) / jnp.maximum(size, 1), tiny)


def right_side(image: Any, gradient: Any, mask: Any) -> Any:
    """Right side `F_KS w_S − g_K`, from the image `−F E_S w_S` of pruning S and the gradient."""
    return apply_mask(jax.tree.map(lambda f, g: -f - g, image, gradient), mask)


def damped(image: Any, vector: Any, gamma: jax.Array, mask: Any) -> Any:
    """Damped product `F_KK v + γ v`, from the image `F v`."""
    return apply_mask(jax.tree.map(lambda f, v: f + gamma * v, image, vector), mask)


def precondition(estimator: InverseFisher, state: Any, mask: Any, residual: Any) -> Any:
    """Product of the estimate of the inverse, cut to K, with a residual."""
    return estimator.multiply(state, residual, mask)
