"""Sparsity that a pruning ends at where a pattern, or densities by name, have a say in it."""

from typing import Any

from fishleg_jax import _text
from fishleg_jax._checks.numbers import is_number
from fishleg_jax.pruning.masks import densities as _densities
from fishleg_jax.pruning.masks.groups import Groups
from fishleg_jax.pruning.target_types import Budget, Limit


def target_of(groups: Groups, sparsity: Any) -> Any:
    """Sparsity that a pattern or densities give, or the one that is asked for if it can be met.

    Args:
        groups: Leaves that are pruned, and weights that share a threshold.
        sparsity: Number or another kind of goal, returned as it is; None for the sparsity that
            groups of n of m, or densities by name, give by themselves.

    Raises:
        ValueError: None without these; a number that they can't meet.
    """
    given = None
    if groups.scope == "densities":
        given = _densities.sparsity_of_densities(groups)
    elif groups.fully_patterned:
        given = _densities.of_all_groups(groups)
    if sparsity is None:
        if given is None:
            raise ValueError(
                "sparsity must be a number in [0, 1), got None, which only patterns.n_m and "
                "densities by name allow"
            )
        return given
    if not is_number(sparsity):
        if isinstance(sparsity, (Budget, Limit)):
            _check_target(groups, sparsity, given)
        return sparsity
    if groups.scope == "densities" and abs(sparsity - given) > _densities.ALIKE:
        raise ValueError(
            f"sparsity must be None or {given:.6g}, which the densities of scope give, got "
            f"{_text.shown(sparsity)}"
        )
    if groups.fully_patterned and groups.scope != "densities":
        if abs(sparsity - groups.pattern.highest) <= _densities.NEAR:
            return given  # all groups, however many weights are left beside them
        if sparsity > given + _densities.NEAR:
            beside = given < groups.pattern.highest - _densities.NEAR
            why = ", which leaves some weights dense because its groups do not divide" * beside
            raise ValueError(
                f"sparsity must be None or at most {given:.6g} for {groups.pattern}{why}, got "
                f"{_text.shown(sparsity)}"
            )
    if groups.scope in ("global", "erk") and groups.pattern and not groups.fully_patterned:
        most = _densities.most_to_prune(groups)
        if _densities.number_to_prune(sparsity, groups.weights) > most:
            raise ValueError(
                f"sparsity must be at most {most / groups.weights:.6g}, because {groups.pattern} "
                f"leaves the other weights dense, got {_text.shown(sparsity)}"
            )
    return sparsity


def _check_target(groups: Groups, target: Budget | Limit, given: float | None) -> None:
    """Raises a ValueError for a target that a pattern or densities can't meet."""
    if given is None:
        return
    source = groups.pattern if groups.scope != "densities" else "scope, as densities by name,"
    if isinstance(target, Budget) or groups.scope == "densities":
        raise ValueError(
            f"sparsity must be None or a number, not a target, with {source}, which prunes "
            f"{given:.6g} by itself; got {_text.shown(target)}"
        )
    if target.highest > given + _densities.NEAR:
        raise ValueError(
            f"sparsity: the target's `highest` must be at most {given:.6g} for {source}, got "
            f"{target.highest:g}"
        )
