"""Choice of whole units for what they cost."""

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fishleg_jax import _text, _tree
from fishleg_jax._checks import arrays, numbers
from fishleg_jax.compaction.analysis import first
from fishleg_jax.compaction.axes import Factor
from fishleg_jax.compaction.comparison import Misfit
from fishleg_jax.compaction.costs import TIMES, measure, prices
from fishleg_jax.compaction.cutting import uncuttable
from fishleg_jax.compaction.finding import EXAMPLES, coupled
from fishleg_jax.compaction.timing import Clock
from fishleg_jax.compaction.unit_scores import UnitScores, of_given, of_members
from fishleg_jax.pruning.target_types import Budget

UNITS = ("weights", "bytes", "flops", "seconds", "time_share")
PARTS = 4  # weights of several goals are multiples of a quarter


class Removal(NamedTuple):
    """Units of one coupling that leave together.

    Attributes:
        ratio: Their score divided by what they cost.
        coupling: Number of the coupling.
        units: Their numbers.
    """

    ratio: float
    coupling: int
    units: tuple[int, ...]


def choose_units(
    f: Callable[..., Any],
    params: Any,
    scores: Any,
    goal: Budget | Sequence[Budget],
    inputs: Any,
    *,
    constants: Any | None = None,
    couplings: list[list[tuple]] | None = None,
    multiple_of: int = 1,
) -> Any:
    """Prunes whole units with low scores for their cost, until the smaller network is cheap enough.

    A unit's score is its own, or the sum of those of all its weights.  Units go in the order of
    score divided by cost, the costs being those at full size: operations for `targets.flops`, the
    measured time that half of a coupling's units take for `.seconds` and `.time_share`, else bytes.
    The goal is checked on the smaller shapes themselves, so that what `compact` returns reaches it.
    Times are measured in turn with those of the whole network.

    With several goals the cost is a weighted sum of their costs as shares of the whole network's,
    as in a Lagrangian.  Weights in steps of a quarter are tried, and those kept by which all goals
    are reached at the lowest sum of scores.

    Args:
        f: Function `(params, inputs)` or `(params, inputs, constants)`, or a `Model`, whose sizes
            come from the shapes of `params`.
        params: Any pytree of floating-point arrays.
        scores: Scores of units by `unit_scores`, or any `UnitScores`, which bring their couplings;
            or a score of each weight, at least 0: a pytree like the parameters, such as
            `obs_saliency` returns, or squared weights for the L2 norm of units.
        goal: `targets.weights`, `.bytes` or `.flops` for the whole smaller network, or `.seconds`
            or `.time_share` for a call of the compiled `f` on `inputs`, measured on the device at
            hand; or a sequence of goals, each to be reached.
        inputs: Inputs with a leading axis of examples.
        constants: Pytree of arrays that are not trained; None if `f` takes none.
        couplings: Axes that index the same units, as in `compact`; None finds them, and leaves out
            those whose units a norm averages, as it does with those of `UnitScores`.
        multiple_of: New sizes are multiples of this number, 1 by default; smaller sizes stay.

    Returns:
        Masks: a pytree of booleans like the parameters, False for everything that belongs to a
        removed unit, its biases and norms included.  `prune_one_shot` with `targets.masks` prunes
        to them and compensates.

    Raises:
        ValueError: Invalid arguments, or a goal out of reach with a unit, or `multiple_of`, left
            everywhere.

    Example:
        >>> import jax, jax.numpy as jnp, fishleg_jax as flj
        >>> params = {"w1": jnp.ones((3, 8)) * jnp.arange(1.0, 9), "w2": jnp.ones((8, 2))}
        >>> f = lambda p, x: jnp.tanh(x @ p["w1"]) @ p["w2"]
        >>> squares = jax.tree.map(jnp.square, params)
        >>> masks = flj.choose_units(f, params, squares, flj.targets.flops(40), jnp.ones((4, 3)))
        >>> masks["w1"][0].tolist()  # ten operations for each unit
        [False, False, False, False, True, True, True, True]
    """
    numbers.check_count(multiple_of, "multiple_of")
    goals = _goals(goal)
    of_units = isinstance(scores, UnitScores)
    if not of_units:
        _tree.check_same(params, scores, "scores")
        _check_scores(scores)
    elif couplings is not None:
        raise ValueError("couplings must be left out with UnitScores, which have their own")
    network, analysis, given = coupled(
        f, params, inputs, constants, scores.couplings if of_units else couplings
    )
    named = {} if of_units else dict(_tree.named_leaves(scores))
    values = of_given(scores, given) if of_units else [of_members(x, named) for x in given]
    factors = [analysis.factor_of(x[0]) or Factor(1) for x in given]
    wrong = uncuttable(network, given, factors, first(inputs, EXAMPLES))
    if couplings is not None and wrong:
        i, error = next(iter(wrong.items()))
        raise ValueError(f"couplings[{i}]: {error}; leave it out") from error
    if couplings is None:
        may_go = [x.mixed is None and i not in wrong for i, x in enumerate(factors)]
        fixed = [x for x in wrong.values() if isinstance(x, Misfit)]
        if fixed and not any(may_go):
            raise fixed[0]
        given = list(itertools.compress(given, may_go))
        values = list(itertools.compress(values, may_go))

    times = any(x.unit in TIMES for x in goals)
    clock = Clock(network, inputs) if times else None
    cost = measure(network, given, inputs, clock)
    whole = [np.ones(x[0].units, bool) for x in given]

    # Order the removals by score and cost, and go as far as the goals need.
    def removed(weights: Sequence[float]) -> list[Removal] | None:
        removals = _ordered(values, weights @ shares, multiple_of)
        fits = lambda count: all(
            cost(_alive(removals[:count], whole), x.unit) <= x.at_most for x in goals
        )
        count = bisect.bisect_left(range(len(removals) + 1), True, key=fits)
        return None if count > len(removals) else removals[:count]

    shares = np.array([prices(cost, whole, x.unit) for x in goals])
    found = [x for x in map(removed, _weights(len(goals))) if x is not None]
    if not found:
        least = _alive(_ordered(values, shares[0], multiple_of), whole)
        _refuse(goals, [cost(least, x.unit) for x in goals], multiple_of)
    lost = lambda removals: sum(values[x.coupling][list(x.units)].sum() for x in removals)
    return _masks(params, given, _alive(min(found, key=lost), whole))


def _goals(goal: Any) -> list[Budget]:
    """The goals, those whose costs take no measurement first."""
    several = isinstance(goal, Sequence) and not isinstance(goal, (Budget, str))
    goals = list(goal) if several else [goal]
    if not goals or any(not isinstance(x, Budget) or x.unit not in UNITS for x in goals):
        raise ValueError(
            "goal must be targets.weights, targets.bytes, targets.flops, targets.seconds or "
            f"targets.time_share, or several of them in a list, got {_text.shown(goal)}"
        )
    return sorted(goals, key=lambda x: x.unit in TIMES)


def _refuse(goals: Sequence[Budget], least: Sequence[float], multiple_of: int) -> None:
    """Raises a ValueError that names the first goal out of reach."""
    for goal, own in zip(goals, least, strict=True):
        if own > goal.at_most:
            break
    raise ValueError(
        f"goal: the network can't become cheaper than {own:g} {goal.unit} with "
        f"multiple_of={multiple_of} and these couplings, got {goal.at_most:g}"
    )


def _weights(goals: int) -> list[np.ndarray]:
    """Weights of the goals' costs to try, each a multiple of a quarter, with a sum of one."""
    parts = itertools.product(range(PARTS + 1), repeat=goals)
    return [np.array(x) / PARTS for x in parts if sum(x) == PARTS]


def _check_scores(scores: Any) -> None:
    """Raises a ValueError for scores of weights that are not numbers of at least 0."""
    arrays.check_costs_are_numbers(scores)
    for name, leaf in _tree.named_leaves(scores):
        lowest = float(np.min(np.asarray(leaf, np.float64), initial=0.0))
        if lowest < 0:
            raise ValueError(f"scores: {name!r} must be at least 0, got {lowest:g}")


def _ordered(scores: Sequence[np.ndarray], prices: Sequence[float], multiple: int) -> list[Removal]:
    """Removals of all couplings, the lowest score for its cost first."""
    removals: list[Removal] = []
    for i, (own, price) in enumerate(zip(scores, prices, strict=True)):
        removals += _removals(i, own, float(price), multiple)
    return sorted(removals, key=lambda x: x.ratio)


def _removals(coupling: int, scores: np.ndarray, price: float, multiple: int) -> list[Removal]:
    """Units of a coupling in the order of their scores, in groups that keep sizes multiples."""
    order = np.argsort(scores, kind="stable")
    sizes = range(scores.size - scores.size % multiple, 0, -multiple)
    ends = [0, *(scores.size - left for left in sizes)]
    found, lowest = [], -math.inf
    for start, end in itertools.pairwise(dict.fromkeys(ends)):
        units = order[start:end]
        # a larger group behind must not overtake
        lowest = max(lowest, float(scores[units].sum()) / (price * units.size))
        found.append(Removal(lowest, coupling, tuple(units.tolist())))
    return found


def _alive(removals: Sequence[Removal], whole: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Units that stay in every coupling."""
    alive = [x.copy() for x in whole]
    for removal in removals:
        alive[removal.coupling][list(removal.units)] = False
    return alive


def _masks(params: Any, couplings: Sequence, alive: Sequence[np.ndarray]) -> Any:
    """Masks of the parameters that prune all of every unit that goes."""
    masks = {name: np.ones(np.shape(x), bool) for name, x in _tree.named_leaves(params)}
    for members, living in zip(couplings, alive, strict=True):
        for x in members:
            if x.name in masks:
                masks[x.name] = x.emptied(masks[x.name], np.flatnonzero(~living))
    arrays_of = [jax.numpy.asarray(x) for x in masks.values()]
    return jax.tree.structure(params).unflatten(arrays_of)
