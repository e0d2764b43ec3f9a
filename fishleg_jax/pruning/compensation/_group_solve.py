"""The solve behind the group update: damping, iterations, and the loss that ends it."""

import functools
import logging
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fishleg_jax import _tree
from fishleg_jax._curvature import Curvature
from fishleg_jax._jit import is_traced, jitted
from fishleg_jax._tree import apply_mask
from fishleg_jax.inverse._placed import prepared
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.pruning._soundness import require_finite_loss
from fishleg_jax.pruning.compensation._damping_search import SHORT, Trial, search, search_traced
from fishleg_jax.pruning.compensation._group_system import (
    System,
    direct,
    mean_diagonal,
    moved,
    random_signs,
    relative_residual,
    right_side,
)
from fishleg_jax.pruning.compensation._held_out_search import search_held_out
from fishleg_jax.pruning.compensation._independent import (
    STEPS,
    corrections,
    lowest_loss,
    may_move,
    pick,
    support_of,
    to_zero,
)

# First damping of a search, relative to the Fisher's mean diagonal: low where held-out examples
# judge, as the directions of a solve serve larger dampings better than smaller ones.
RELATIVE_DAMPING, HELD_OUT_DAMPING = 0.2, 0.05
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
    image_of_pruned = fisher_product(pruned)
    right = jitted(right_side)(image_of_pruned, gradient if first_order else zero, free)
    system = System(
        *(params, new_mask, free, right, apply_mask(change, free), fisher_product),
        *(estimator, state, factored),
    )
    traced = is_traced((right, state))
    chosen = settings.damping is None
    held_out = settings.check_step and curvature.check is not None and exact and not traced
    # The first damping, and a statement of the work beforehand.
    attempts = settings.attempts if settings.check_step else 1
    first, begin = settings.damping, time.perf_counter()
    if first is None and not exact:
        first = state.damping
    if first is None:
        signs = jitted(random_signs)(params, free)
        if not traced:
            jax.block_until_ready((right, signs))
        begin = time.perf_counter()
        first = jitted(mean_diagonal)(signs, fisher_product(signs), free)
        first *= HELD_OUT_DAMPING if held_out else RELATIVE_DAMPING
    if not traced and exact and chosen:
        jax.block_until_ready(first)
        # with the products of the start and the prediction
        most = (1 if held_out else attempts) * (settings.iterations + 2)
        budget = most * (time.perf_counter() - begin)
        limit = "" if settings.seconds is None else f", within {settings.seconds:g} s"
        _LOG.info("group: at most %d Fisher products, about %.3g s%s", most, budget, limit)
    deadline = math.inf if settings.seconds is None else begin + settings.seconds
    late = lambda: time.perf_counter() > deadline

    def solve(x: Any, raised: float) -> Trial:
        """Solves at one damping."""
        gamma = jnp.asarray(first * raised)
        if not exact:
            x = jitted(direct, estimator)(state, free, gamma, right)
        solved = system.solve(
            x,
            gamma,
            iterations=settings.iterations if exact else 0,  # the exact solution needs none
            tolerance=settings.tolerance,
            on_iteration=lambda _: late(),
        )
        return judged(raised, solved.x, gamma, solved.iterations, solved.relative)

    def judged(
        raised: float, x: Any, gamma: Any, iterations: Any, residual: Any, image: Any | None = None
    ) -> Trial:
        """Chooses the share of the step, by its loss; `image` is `F x` if it is known."""
        steps = STEPS if settings.check_step else STEPS[:1]
        deltas = [system.change(x, step) for step in steps]
        i, losses = 0, [0.0]
        if measurable or curvature.check is not None:
            i, losses = lowest_loss(curvature, params, deltas)
        loss, step = losses[i], pick(steps, i)
        delta = deltas[i] if isinstance(i, int) else system.change(x, step)
        # gain of the quadratic model on K, from no change to its lowest point
        gain = _tree.dot(right, x) / 2
        too_long = jnp.logical_not(losses[0] - loss <= SHORT * (losses[-1] - loss))
        # Report; under `jit` without the numbers that need the host.
        info = {"damping": gamma, "iterations": iterations, "residual": residual}
        if settings.check_step:
            info |= {"step": step, "losses": losses}
        if not traced:
            if image is not None:
                image = jax.tree.map(lambda p, f: p + step * f, image_of_pruned, image)
            info = {name: _plain(value) for name, value in info.items()}
            info |= measured(loss, delta, gamma, image)
            loss = loss if math.isfinite(loss) else math.inf
            too_long, gain = bool(too_long), float(gain)
        return Trial(raised, x, delta, loss, info, too_long, gain)

    @functools.cache
    def before(loss: Callable[[Any], jax.Array]) -> float:
        return float(loss(params))  # the same for all attempts

    def measured(loss: float, delta: Any, gamma: jax.Array, image: Any | None) -> dict:
        info = {}
        if curvature.check is not None:  # then `loss` is measured on held-out batches
            info["held_out"] = loss - before(curvature.check)
            if measurable:
                loss = float(curvature.loss(jax.tree.map(jnp.add, params, delta)))
        if not measurable or gradient is None:
            return info | {"ratio": math.nan}
        actual = loss - before(curvature.loss)
        image = fisher_product(delta) if image is None else image
        return info | _prediction(gradient, delta, image, gamma, actual)

    # Search for the damping, by the loss.
    if traced:
        found = search_traced(solve, system.start, attempts=attempts)
        return found.delta, found.info
    if held_out:
        best = search_held_out(
            system,
            lambda x: float(curvature.check(jitted(moved)(params, x, new_mask))),
            first,
            iterations=settings.iterations,
            tolerance=settings.tolerance,
            attempts=attempts if chosen else 1,
            ended=late,
        )
        gamma, image = jnp.asarray(first * best.raised), fisher_product(best.x)
        residual = jitted(relative_residual)(right, best.x, image, gamma, free)
        found = judged(best.raised, best.x, gamma, best.iterations, residual, image)
    else:
        lower = curvature.check is not None
        found = search(
            solve, system.start, attempts=attempts, chosen=chosen, lower=lower, ended=late
        )
    require_finite_loss(found.info.get("losses", [found.loss]))
    return found.delta, found.info | {"products": products}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, jax.Array) else value


def _prediction(
    gradient: Any, delta: Any, image: Any, gamma: jax.Array, actual: float
) -> dict[str, float]:
    first, second = float(_tree.dot(gradient, delta)), float(_tree.dot(delta, image)) / 2
    scale = second + float(gamma * _tree.dot(delta, delta)) / 2
    ratio = abs(actual - first - second) / scale if scale > 0 else 0.0
    return {"predicted": first + second, "actual": actual, "ratio": ratio}
