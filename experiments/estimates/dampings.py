"""Estimates at other dampings, and the search for a damping by a held-out loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fishleg_jax as flj

COUNTS = 1e-3  # relative: a smaller difference of losses counts for nothing


def with_damping(state: Any, damping: float) -> Any | None:
    """A fitted state at another damping.

    Args:
        state: the state of an estimate that has a damping.
        damping: γ, in units of the estimate's own Fisher.

    Returns:
        The state; None if the damping is part of the fit, as in WoodFisher's square roots, so that
        another one takes another fit.
    """
    if getattr(state, "fixed_damping", False):
        return None
    return flj.inverse.with_damping(state, damping)


def starting_at(estimator: flj.InverseFisher, damping: float) -> flj.InverseFisher:
    """WoodFisher to be fitted at another damping with the functions that are compiled already.

    Args:
        estimator: WoodFisher, made with any damping.
        damping: γ, in units of the estimate's own Fisher.
    """

    def init(params: Any) -> Any:
        # blocks start at square roots of `I / γ`
        start = estimator.init(params)
        factor = jnp.sqrt(start.damping / damping)
        blocks = jax.tree.map(lambda root: root * factor, start.blocks)
        return start._replace(damping=jnp.full_like(start.damping, damping), blocks=blocks)

    return estimator._replace(init=init)


class Choice(NamedTuple):
    """The outcome of a search.

    Attributes:
        damping: γ.
        result: the result of the attempt at it; None if the damping was known before.
        losses: held-out losses by damping.
    """

    damping: float
    result: Any
    losses: dict[float, float]


def choose(
    attempt: Callable[[float], tuple[Any, float]], start: float, *, factor: float, most: int
) -> Choice:
    """Walks from a damping to larger or smaller ones while the held-out loss falls.

    Args:
        attempt: `damping -> (result, held-out loss)`; a FloatingPointError counts as an infinite
            loss.
        start: the first damping.
        factor: ratio of neighbouring dampings.
        most: maximum number of attempts.

    Returns:
        The last damping of the walk.

    Raises:
        FloatingPointError: every loss is infinite or NaN.
    """
    losses, best = {}, Choice(start, None, {})

    def tried(damping: float) -> bool:
        nonlocal best
        try:
            result, loss = attempt(damping)
        except FloatingPointError:
            result, loss = None, np.inf
        losses[damping] = loss
        better = len(losses) == 1 or loss < losses[best.damping] * (1 - COUNTS)
        if better:
            best = Choice(damping, result, losses)
        return better

    tried(start)
    for step in (factor, 1 / factor):
        while len(losses) < most and tried(best.damping * step):
            pass
        if best.damping != start:
            break
    if not np.isfinite(losses[best.damping]):
        raise FloatingPointError(f"no damping of {', '.join(f'{d:.3g}' for d in losses)} works")
    return best
