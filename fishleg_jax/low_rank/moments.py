"""Second moments of folded gradients: the Kronecker factors of the Fisher of each kernel."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax.inverse._gradients import sum_over_rows
from fishleg_jax.low_rank.forms import fold
from fishleg_jax.model import Model


def second_moments(
    model: Model,
    params: Any,
    batches: Sequence[Any],
    folding: Sequence[tuple[str, tuple[int, ...]] | None],
    *,
    labels: str,
    examples_per_gradient: int,
    examples_per_chunk: int | None,
    key: jax.Array,
) -> list[tuple[np.ndarray, np.ndarray] | None]:
    """Second moments along the last two axes of every folded gradient, in nats per squared weight.

    With a gradient G (s, m, n) of one example: `A ∝ E[Σ_s G_s G_sᵀ]`, `B ∝ E[Σ_s G_sᵀ G_s]`, scaled
    so that `I_s ⊗ A ⊗ B` has the trace of the Fisher.

    Args:
        model: The model.
        params: Weights.
        batches: Batches of data.
        folding: Form and order of axes (spatial, in, out) of every leaf; None to leave it out.
        labels: `sampled` for the Fisher, or `empirical`.
        examples_per_gradient: Examples averaged into one gradient.
        examples_per_chunk: Examples whose gradients are held at a time; None for a whole batch.
        key: Random key.
    """
    total = sum_over_rows(model, labels, examples_per_gradient, examples_per_chunk)
    highest = jax.lax.Precision.HIGHEST

    def sums(rows):
        found = []
        for leaf, own in zip(rows.leaves, folding, strict=True):
            if own is None:
                found.append(None)
                continue
            form, order = own
            moved = leaf.transpose(0, *(k + 1 for k in order))
            folded = jax.vmap(lambda x, form=form: fold(form, x))(moved)
            folded = folded.reshape(-1, *folded.shape[-2:])
            left = jnp.einsum("smn,skn->mk", folded, folded, precision=highest)
            found.append((left, jnp.einsum("smn,smk->nk", folded, folded, precision=highest)))
        return found

    def of_batch(params, batch, key):
        added, gradients, skipped = total(params, batch, key, None, sums)
        return added, gradients - skipped

    run = jax.jit(of_batch)
    added, count = None, 0
    for i, batch in enumerate(batches):
        new, gradients = run(params, batch, jax.random.fold_in(key, i))
        added = new if added is None else jax.tree.map(jnp.add, added, new)
        count += int(gradients)
    if count == 0:
        raise FloatingPointError("gradients are NaN or infinite on all of the batches")
    scale = examples_per_gradient / count
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    return [_scaled(pair, scale, size) for pair, size in zip(added, sizes, strict=True)]


def _scaled(pair: Any, scale: float, size: int) -> Any:
    """Scales both moments so that their product has the trace of the Fisher."""
    if pair is None:
        return None
    # the mean of n independent gradients has an n-th of their covariance
    left, right = (np.asarray(x, np.float64) * scale for x in pair)
    slices = size // (len(left) * len(right))
    root = np.sqrt(max(float(np.trace(left)), np.finfo(np.float32).tiny) * slices)
    return left / root, right / root
