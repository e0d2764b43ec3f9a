"""Second moments of folded gradients: the Kronecker factors of the Fisher of each kernel."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _chunks, _tree
from fishleg_jax.inverse._fishleg.samples import rows
from fishleg_jax.low_rank.factors import arranged
from fishleg_jax.low_rank.forms import fold
from fishleg_jax.low_rank.parts import Part
from fishleg_jax.low_rank.uses import Use
from fishleg_jax.model import Model
from fishleg_jax.per_example import check_gradients

Moments = dict[str, tuple[np.ndarray, np.ndarray]]


def second_moments(
    model: Model,
    params: Any,
    batches: Sequence[Any],
    folding: Mapping[str, tuple[str, Use]],
    *,
    fisher: str,
    examples_per_gradient: int,
    examples_per_chunk: int | None,
    key: jax.Array,
) -> Moments:
    """Second moments along the last two axes of folded Fisher samples, in nats per squared weight.

    With a folded sample G (s, m, n): `A ∝ E[Σ_s G_s G_sᵀ]`, `B ∝ E[Σ_s G_sᵀ G_s]`, scaled so that
    `I_s ⊗ A ⊗ B` has the trace of the Fisher.

    Args:
        model: The model.
        params: Weights.
        batches: Batches of data.
        folding: Form and use of each kernel, by its key path.
        fisher: `exact`, `sampled` or `empirical`.
        examples_per_gradient: Examples added up in one sample.
        examples_per_chunk: Examples whose gradients are held at a time; None for a whole batch.
        key: Random key.
    """
    params = _tree.widen(params)
    names = [name for name, _ in _tree.named_leaves(params)]
    highest = jax.lax.Precision.HIGHEST
    at_once = examples_per_chunk
    if at_once is not None:  # whole samples
        at_once = max(at_once // examples_per_gradient, 1) * examples_per_gradient

    def of_batch(params, batch, key):
        def of_chunk(chunk, key):
            settings = fisher, examples_per_gradient, None, None
            samples = jax.tree.leaves(rows(model, params, chunk, key, *settings))
            found = {}
            for name, leaf in zip(names, samples, strict=True):
                if name not in folding:
                    continue
                form, use = folding[name]
                folded = jax.vmap(lambda x, form=form, use=use: fold(form, arranged(x, use)))(leaf)
                folded = folded.reshape(-1, *folded.shape[-2:])
                left = jnp.einsum("smn,skn->mk", folded, folded, precision=highest)
                found[name] = left, jnp.einsum("smn,smk->nk", folded, folded, precision=highest)
            return found

        return _chunks.sum_over_chunks(of_chunk, batch, key, at_once)

    run, count = jax.jit(of_batch), 0
    added: Any = None
    for i, batch in enumerate(batches):
        examples = _chunks.number_of_examples(batch)
        check_gradients(examples, examples_per_gradient)
        new = run(params, batch, jax.random.fold_in(key, i))
        added = new if added is None else jax.tree.map(jnp.add, added, new)
        count += examples // examples_per_gradient
    if not bool(_tree.all_finite(added)):
        raise FloatingPointError("gradients on the batches are NaN or infinite")
    sizes = {name: leaf.size for name, leaf in _tree.named_leaves(params)}
    return {name: _scaled(pair, 1 / count, sizes[name]) for name, pair in added.items()}


def _scaled(pair: tuple[jax.Array, jax.Array], scale: float, size: int) -> tuple:
    """Scales both moments so that their product has the trace of the Fisher."""
    left, right = (np.asarray(x, np.float64) * scale for x in pair)
    slices = size // (len(left) * len(right))
    root = np.sqrt(max(float(np.trace(left)), np.finfo(np.float32).tiny) * slices)
    return left / root, right / root


def check_moments(parts: Sequence[Part], moments: Any) -> None:
    """Raises a ValueError unless there are moments of the right sizes for every kernel."""
    if not isinstance(moments, Mapping):
        raise ValueError(
            "moments must be the field of an earlier result, got "
            f"{type(moments).__name__}; None computes them"
        )
    for part in parts:
        wanted = tuple((n, n) for n in fold(part.form, part.kernel).shape[-2:])
        found = tuple(np.shape(x) for x in moments.get(part.name, ()))
        if found != wanted:
            raise ValueError(
                f"moments: {part.name!r} with the form {part.form!r} needs shapes {wanted}, got "
                f"{found or 'none'}"
            )
