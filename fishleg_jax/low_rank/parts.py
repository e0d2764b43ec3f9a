"""Kernels of a network to decompose."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from fishleg_jax import _prunable, _text, _tree
from fishleg_jax._batch import split_batch
from fishleg_jax.low_rank import forms
from fishleg_jax.low_rank.factors import arranged
from fishleg_jax.low_rank.uses import Use, find_uses
from fishleg_jax.model import BatchLike, Model, predict


class Part(NamedTuple):
    """Kernel to decompose: its number among the leaves, name, form, use, and array in order."""

    leaf: int
    name: str
    form: str
    use: Use
    kernel: np.ndarray


def find_parts(
    model: Model, params: Any, batch: BatchLike, convolutions: Any, decomposable: Any
) -> tuple[list[Part], list[str | None]]:
    """Kernels to decompose, and the reason why each other leaf is left out."""
    inputs, _, constants = split_batch(batch)
    run = lambda p, *data: predict(model, p, (data[0], None, *data[1:]))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    uses = find_uses(run, shapes, inputs, *constants)
    reasons = _prunable.reasons(params, decomposable, "decomposable")
    leaves = _tree.named_leaves(params)
    form_of = _forms(convolutions, leaves)
    parts = []
    for i, ((name, leaf), use) in enumerate(zip(leaves, uses, strict=True)):
        if reasons[i] is not None:
            continue
        form = form_of[i] if isinstance(use, Use) and use.before else "svd"
        if isinstance(use, str):
            reasons[i] = use
        elif form == "spatial" and len(use.before) != 2:
            reasons[i] = f"spatial needs two spatial axes, it has {len(use.before)}"
        else:
            kernel = arranged(np.asarray(leaf, np.float64), use)
            parts.append(Part(i, name, form, use, kernel))
        if reasons[i] is not None and decomposable is not None:
            raise ValueError(f"decomposable: {name!r} is not a kernel with factors: {reasons[i]}")
    if not parts:
        listed = ", ".join(
            f"{name} ({reason})" for (name, _), reason in zip(leaves, reasons, strict=True)
        )
        raise ValueError(f"params must have a kernel to decompose, got none: {listed}")
    return parts, reasons


def _forms(convolutions: Any, leaves: list) -> list[str]:
    """Form of every leaf, should it be a convolution."""
    rules = convolutions if isinstance(convolutions, Mapping) else {"": convolutions}
    for form in rules.values():
        if form not in forms.CONVOLUTIONS:
            known = ", ".join(forms.CONVOLUTIONS)
            raise ValueError(f"convolutions must be one of {known}, got {_text.shown(form)}")
    found = {pattern: _tree.matches(pattern, leaves, "convolutions") for pattern in rules}
    return [next((rules[p] for p in rules if found[p][i]), "channel") for i in range(len(leaves))]
