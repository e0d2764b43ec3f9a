"""Rules and budgets: from the arguments of `decompose` to an option for every kernel."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _text, _tree
from fishleg_jax._checks import numbers
from fishleg_jax.low_rank import choice, forms
from fishleg_jax.low_rank.parts import Part
from fishleg_jax.low_rank.search import by_search
from fishleg_jax.pruning.target_types import Budget, Limit

RULES = {**choice.RULES, "search": by_search}
UNITS = ("weights", "bytes", "flops")


def checked_rule(ranks: Any, budget: Any) -> tuple[Any, Any]:
    """Rule and budget, or a ValueError."""
    if isinstance(ranks, Mapping) and ranks:
        if budget is not None:
            raise ValueError(
                f"budget must be None if ranks are given by name, got {_text.shown(budget)}"
            )
        return ranks, None
    if not isinstance(ranks, str) or ranks not in RULES:
        raise ValueError(
            f"ranks must be one of {', '.join(RULES)} or a mapping from expressions to ranks, got "
            f"{_text.shown(ranks)}"
        )
    if isinstance(budget, Budget) and budget.unit in UNITS:
        return ranks, budget
    if isinstance(budget, Limit) and budget.unit == "predicted":
        if ranks != "global":
            raise ValueError(
                f"ranks must be 'global' for a limit on the loss, got {_text.shown(ranks)}"
            )
        return ranks, budget
    expected = (
        "a share in (0, 1], targets.weights, targets.bytes, targets.flops or "
        "targets.loss_increase(..., measured=False)"
    )
    if not numbers.is_number(budget):
        raise ValueError(f"budget must be {expected}, got {_text.shown(budget)}")
    return ranks, numbers.check_number(budget, "budget", lambda x: 0 < x <= 1, expected)


def choose(
    parts: Sequence[Part], options: Sequence[forms.Options], rule: Any, budget: Any, params: Any
) -> list[int]:
    """Number of the option of every kernel; `choice.DENSE` for one that stays whole."""
    if isinstance(rule, Mapping):
        return _by_name(parts, options, rule)
    unit = budget.unit if isinstance(budget, Budget) else "weights"
    choices = [choice.choices_of(x, "flops" if unit == "flops" else "weights") for x in options]
    if isinstance(budget, Limit):
        picked = choice.by_threshold(choices, most_loss=budget.at_most)
    else:
        at_most = _at_most(parts, options, budget, params)
        choice.check_reach(choices, at_most, "flops" if unit == "flops" else "weights")
        picked = RULES[rule](choices, at_most)
    return [int(x.option[k]) for x, k in zip(choices, picked, strict=True)]


def _at_most(parts: Sequence[Part], options: Sequence, budget: Any, params: Any) -> float:
    """Budget as a number of weights or operations."""
    if not isinstance(budget, Budget):
        return budget * sum(x.dense[0] for x in options)
    if budget.unit != "bytes":
        return budget.at_most
    leaves = jax.tree.leaves(params)
    sizes = {jnp.dtype(leaves[part.leaf].dtype).itemsize for part in parts}
    if len(sizes) > 1:
        raise ValueError(
            "budget in bytes needs kernels of one size of dtype, got several: use targets.weights"
        )
    return budget.at_most // sizes.pop()


def _by_name(parts: Sequence[Part], options: Sequence, rule: Mapping) -> list[int]:
    named = [(part.name, None) for part in parts]
    found = {pattern: _tree.matches(pattern, named, "ranks") for pattern in rule}
    chosen = []
    for i, (part, own) in enumerate(zip(parts, options, strict=True)):
        wanted = next((rule[p] for p in rule if found[p][i]), None)
        if wanted is None:
            chosen.append(choice.DENSE)
            continue
        wanted = wanted if isinstance(wanted, (tuple, list)) else (wanted,) * own.ranks.shape[1]
        if len(wanted) != own.ranks.shape[1] or not all(numbers.is_whole(r, 1) for r in wanted):
            raise ValueError(
                f"ranks: {part.name!r} needs {own.ranks.shape[1]} whole number(s) of at least 1, "
                f"got {_text.shown(wanted)}"
            )
        cut = np.minimum(wanted, own.ranks.max(axis=0))
        chosen.append(int(np.flatnonzero((own.ranks == cut).all(axis=1))[0]))
    return chosen
