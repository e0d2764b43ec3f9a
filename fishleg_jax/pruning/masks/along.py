"""Warns of patterns along other axes than those that a network sums over."""

import functools
import warnings
from typing import Any

from fishleg_jax.model import BatchLike, Model, predict
from fishleg_jax.pruning.masks.groups import Groups
from fishleg_jax.pruning.masks.layout import axes_of
from fishleg_jax.pruning.masks.summed_axes import summed_axes

SHOWN = 3  # leaves that a warning names


def warn_of_axes(groups: Groups, model: Model, params: Any, batch: BatchLike) -> None:
    """Warns if groups of n:m lie along an axis that is not summed over, or units along one that is.

    That is what the default axes do where kernels are (out, in), as in equinox, or have heads of
    their own.  Leaves that can't be followed through the network are passed over.

    Args:
        groups: Leaves that are pruned, and their pattern.
        model: Model, whose `predict` is traced once.
        params: Weights, may be traced.
        batch: A batch of data.
    """
    pattern = groups.pattern
    if pattern is None or pattern.couplings or pattern.kind == "blocks":
        return
    try:
        summed = summed_axes(functools.partial(predict, model), params, batch)
    except Exception:  # a model that does not run is refused elsewhere, with its reason
        return
    n_m, wrong = pattern.kind == "n_m", {}
    for i, axis in enumerate(axes_of(pattern, groups.names)):
        sets = [axes for axes in summed[i] if axes]
        if not groups.chosen[i] or not sets:
            continue
        layers = int(groups.stacked[i])
        own = len(groups.shapes[i]) - layers
        here = axis % own + layers
        if n_m and not any(here in axes for axes in sets):
            wrong[groups.names[i]] = axis % own, max(sets[0]) - layers
        if not n_m and all(here in axes for axes in sets):
            free = [k for k in range(own) if k + layers not in sets[0]]
            wrong[groups.names[i]] = axis % own, free[-1] if free else None
    if not wrong:
        return
    first = list(wrong.items())[:SHOWN]
    what = (
        "groups along an axis that is not summed over" if n_m else "units along an axis of inputs"
    )
    found = ", ".join(f"axis {k} of {name!r}" for name, (k, _) in first)
    more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    better = {f"^{name}$": k for name, (_, k) in first if k is not None}
    how = f"; name the axes, such as axis={better!r}" if better else ""
    warnings.warn(f"pattern: {pattern} has {what}, {found}{more}{how}", stacklevel=5)
