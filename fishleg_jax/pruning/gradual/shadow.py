"""Shadows: values of pruned weights that go on being updated, though the weights are 0.0."""

from typing import Any

import jax
import jax.numpy as jnp

from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.pruning.masks.groups import Groups
from fishleg_jax.pruning.scores import Saliency


def has_shadow(regrow: Any, saliency: Saliency, estimator: InverseFisher) -> bool:
    """Whether pruned weights keep a shadow: with `regrow`, where scores know no curvature.

    That is so for magnitude, for functions with a true attribute `by_magnitude`, and for any scores
    by an estimate that no batch is assimilated into.
    """
    if regrow is None:
        return False
    plain = saliency == "magnitude" or getattr(saliency, "by_magnitude", False)
    return plain or (estimator.updates == 0 and estimator.fisher_diagonal is None)


def first(params: Any, groups: Groups, masks: Any) -> Any:
    """Shadow before the first step: the weights that masks prune, 0 for kept ones.

    Args:
        params: Weights.
        groups: Leaves that are pruned.
        masks: First masks.

    Returns:
        A pytree like the weights, with None for leaves that are not pruned.
    """
    leaves, structure = jax.tree.flatten(params)
    trios = zip(leaves, jax.tree.leaves(masks), groups.chosen, strict=True)
    return structure.unflatten(
        jnp.where(m, jnp.zeros_like(p), p) if yes else None for p, m, yes in trios
    )


def moved(shadow: Any, updates: Any) -> Any:
    """Shadow with the step's updates added, but for those that are not finite.

    Entries of kept weights are meaningless.
    """

    def one(u, s):
        if s is None:
            return None
        new = (s + u).astype(s.dtype)
        return jnp.where(jnp.isfinite(new), new, s)

    return jax.tree.map(one, updates, shadow)


def after(shadow: Any, params: Any, updates: Any, old: Any, new: Any) -> Any:
    """Shadow after a step: newly pruned weights start where the optimiser would have taken them.

    Args:
        shadow: Shadow with the step's updates, of `moved`.
        params: Weights before the step.
        updates: Updates of the optimiser.
        old: Masks before the step.
        new: Masks after it.
    """

    def one(p, u, before, now, s):
        if s is None:
            return None
        gone = (p + u).astype(s.dtype)
        gone = jnp.where(jnp.isfinite(gone), gone, jnp.zeros_like(gone))
        return jnp.where(now, jnp.zeros_like(s), jnp.where(before, gone, s))

    return jax.tree.map(one, params, updates, old, new, shadow)


def put_in(shadow: Any, tree: Any, places: Any) -> Any:
    """Weights with the shadow at some places, in the weights' dtypes.

    Args:
        shadow: Shadow with the step's updates, of `moved`.
        tree: Weights.
        places: Booleans like the weights, True where the shadow replaces them.
    """

    def one(w, there, s):
        return w if s is None else jnp.where(there, s.astype(w.dtype), w)

    return jax.tree.map(one, tree, places, shadow)
