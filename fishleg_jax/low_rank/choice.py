"""Ranks of all kernels at once, for a budget."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fishleg_jax.low_rank.forms import Options

DENSE = -1  # the option of leaving a kernel as it is


class Choices(NamedTuple):
    """Options of one kernel, the kernel itself among them, by rising cost and falling loss.

    Attributes:
        option: Number of each among the kernel's `Options`; `DENSE` for the kernel itself.
        cost: Cost, in the unit of the budget.
        loss: Predicted rise of the loss.
        whole: Loss of leaving the kernel out.
    """

    option: np.ndarray
    cost: np.ndarray
    loss: np.ndarray
    whole: float


def choices_of(options: Options, unit: str) -> Choices:
    """Options that no other one beats in cost and loss.

    Args:
        options: All options of a kernel.
        unit: `weights` or `flops`.
    """
    cost = options.flops if unit == "flops" else options.weights
    dense = options.dense[1 if unit == "flops" else 0]
    option = np.append(np.arange(len(cost)), DENSE)
    cost, loss = np.append(cost, dense), np.append(options.loss, 0.0)
    # by cost, then by loss; keep each that is better than all cheaper ones
    order = np.lexsort((loss, cost))
    option, cost, loss = option[order], cost[order], loss[order]
    better = np.append(True, loss[1:] < np.minimum.accumulate(loss)[:-1])
    inside = better & (cost <= dense)
    if inside[option == DENSE].any():  # nothing that costs as much as the kernel itself
        inside &= (cost < dense) | (option == DENSE)
    if not inside.any():
        inside = option == DENSE
    return Choices(option[inside], cost[inside], loss[inside], options.whole)


def check_reach(choices: Sequence[Choices], at_most: float, unit: str) -> None:
    """Raises a ValueError for a budget below the cheapest option of every kernel."""
    least = sum(x.cost[0] for x in choices)
    if least > at_most:
        raise ValueError(
            f"budget must be at least {least:g} {unit}, which rank 1 in every kernel takes, got "
            f"{at_most:g}"
        )


def by_threshold(
    choices: Sequence[Choices], at_most: float = np.inf, most_loss: float = -np.inf
) -> list[int]:
    """One global threshold on the fall of the loss per cost, as groups of weights are pruned.

    Components come back in the order of what they save per cost, from rank 1 on, until the budget
    is spent or the predicted loss is low enough.  Where a kernel's components are not in that
    order, the lower convex hull of its options decides.  What is left of a budget goes to the best
    option that it can pay for, kernel by kernel.

    Args:
        choices: Options of every kernel.
        at_most: Highest total cost.
        most_loss: Total loss at which to stop.

    Returns:
        Number of the chosen option among the choices of every kernel.
    """
    now = [0] * len(choices)
    spent, loss = sum(x.cost[0] for x in choices), sum(x.loss[0] for x in choices)
    steps = []
    for i, x in enumerate(choices):
        hull = _hull(x.cost, x.loss)
        for a, b in zip(hull, hull[1:], strict=False):
            steps.append(((x.loss[a] - x.loss[b]) / (x.cost[b] - x.cost[a]), i, b))
    steps.sort(key=lambda step: -step[0])
    for _, i, new in steps:
        x = choices[i]
        more = x.cost[new] - x.cost[now[i]]
        if loss <= most_loss or spent + more > at_most:
            break
        spent, loss = spent + more, loss - (x.loss[now[i]] - x.loss[new])
        now[i] = new
    if np.isfinite(at_most):
        for _, i, _ in steps:
            x = choices[i]
            best = int(np.searchsorted(x.cost, x.cost[now[i]] + at_most - spent, "right")) - 1
            if best > now[i]:
                spent += x.cost[best] - x.cost[now[i]]
                now[i] = best
    return now


def _hull(cost: np.ndarray, loss: np.ndarray) -> list[int]:
    """Corners of the lower convex hull of a falling curve."""
    hull: list[int] = []
    for k in range(len(cost)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (loss[a] - loss[b]) * (cost[k] - cost[b]) > (loss[b] - loss[k]) * (
                cost[b] - cost[a]
            ):
                break
            hull.pop()
        hull.append(k)
    return hull


def equally(choices: Sequence[Choices], at_most: float) -> list[int]:
    """The same share of each kernel's cost, the largest with which all fit."""

    def within(x: Choices, share: float) -> int:
        return int(np.searchsorted(x.cost / x.cost[-1], share, "right"))

    return _largest(choices, at_most, within)


def by_energy(choices: Sequence[Choices], at_most: float) -> list[int]:
    """The same share of each kernel's squared singular values, the largest with which all fit."""

    def first_with(x: Choices, share: float) -> int:
        kept = 1 - x.loss / (x.whole or 1)
        return int(np.searchsorted(kept, share - 1e-12, "left")) + 1

    return _largest(choices, at_most, first_with)


def _largest(
    choices: Sequence[Choices], at_most: float, count: Callable[[Choices, float], int]
) -> list[int]:
    def chosen(share):
        return [int(min(max(count(x, share), 1), len(x.cost))) - 1 for x in choices]

    def fits(share):
        return sum(x.cost[k] for x, k in zip(choices, chosen(share), strict=True)) <= at_most

    if fits(1.0):
        return chosen(1.0)
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return chosen(low)


RULES: Mapping[str, Callable[[Sequence[Choices], float], list[int]]] = {
    "global": by_threshold,
    "equal": equally,
    "energy": by_energy,
}
