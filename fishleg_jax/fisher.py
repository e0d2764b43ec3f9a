"""Fisher information of a model's weights: products with it, and per-example gradients.

There are three Fishers, and they are different matrices:

- `exact`: expectation over the model's own distribution, `E_x[Jᵀ H J]` with `H` the Fisher in
  output space, which is the generalised Gauss-Newton matrix (Martens 2020, section 9).  Needs no
  labels.
- `sampled`: the same expectation with one label per example drawn from the model.
- `empirical`: the labels of the data.  It degenerates as the model fits its data (Kunstner et al.
  2019); it is included because WoodFisher and M-FAC are defined with it.
"""

import jax
import jax.numpy as jnp

from fishleg_jax import _chunks, _convolutions, _labels, _text, _tree
from fishleg_jax._checks import arrays
from fishleg_jax._devices import mesh
from fishleg_jax._devices import placement as _placement
from fishleg_jax._output_space import linearise, output_fisher, with_sampled_targets
from fishleg_jax._output_space import output_gradient as output_gradient
from fishleg_jax.model import (
    BatchLike,
    Model,
    Params,
    check_model,
    check_targets,
    split_batch,
)

KINDS = ("exact", "sampled", "empirical")


def check_kind(kind: str, batch: BatchLike, key: jax.Array | None) -> None:
    """Raises a ValueError for an unknown Fisher, an invalid batch, or a missing key or labels."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {_text.shown(kind)}")
    arrays.check_batch_shapes(batch, "batch")
    if kind == "sampled" and key is None:
        raise ValueError(
            "key must be a random key for sampled labels, such as jax.random.key(0), got None"
        )
    if kind == "empirical" and split_batch(batch)[1] is None:
        raise ValueError("batch must have labels for 'empirical', got targets of None")


@mesh.in_mesh_of_params
def fisher_vector_product(
    model: Model,
    params: Params,
    batch: BatchLike,
    vector: Params,
    *,
    kind: str = "exact",
    key: jax.Array | None = None,
    examples_per_chunk: int | None = None,
) -> Params:
    """Product of the undamped Fisher of a batch with a vector, `F v`, averaged over examples.

    Takes one jvp and one vjp through the model per chunk and never forms the matrix.

    Args:
        model: Model whose Fisher is used.
        params: Model parameters, any pytree of floating-point arrays.
        batch: Data `(inputs, targets[, constants])`.  Only the empirical Fisher uses the targets;
            with `likelihoods.categorical(ignore=...)` every kind excludes the tokens marked in
            them, and nothing if the targets are None.
        vector: Pytree with the structure and shapes of the parameters, cast to their dtypes.
        kind: Which Fisher: `exact` (default; expectation over the model's labels), `sampled` (one
            label per example drawn from the model) or `empirical` (labels of the data).
        key: Random key, required for `sampled`.
        examples_per_chunk: Number of examples processed at a time (a `lax.scan`), which bounds
            memory; None for the whole batch.  The product does not depend on it; `sampled` takes
            one more forward pass with it.

    Returns:
        Pytree with the structure, shapes and dtypes of the parameters.

    Raises:
        ValueError: An unknown kind, an invalid batch, a missing key, missing or invalid labels, a
            likelihood without the function this kind needs, or a vector of another structure.

    References:
        Martens, New insights and perspectives on the natural gradient method, 2020, section 8;
        Schraudolph, Fast curvature matrix-vector products, 2002.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
        >>> inputs = jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> flj.fisher_vector_product(model, jnp.zeros(2), (inputs, None), jnp.ones(2))
        Array([0.5, 2. ], dtype=float32)
    """
    check_model(model)
    check_kind(kind, batch, key)
    _labels.require_kind(model.likelihood, kind)
    _tree.check_same(params, vector, "vector")
    if kind == "empirical":
        check_targets(model, params, batch)
    vector = jax.tree.map(lambda v, p: jnp.asarray(v, jnp.result_type(p)), vector, params)

    def product(chunk, chunk_key):
        outputs, jvp, vjp = linearise(model, params, chunk)
        targets = split_batch(chunk)[1]
        if kind == "sampled":
            targets = _labels.sample(model.likelihood, chunk_key, outputs, targets)
        return vjp(output_fisher(model, outputs, targets, jvp(vector), kind))

    key = jax.random.key(0) if key is None else key
    # draw all labels at once, so that they do not depend on the chunks
    if kind == "sampled" and not _chunks.fits(batch, examples_per_chunk):
        batch = with_sampled_targets(model, params, batch, key, examples_per_chunk)
        kind = "empirical"
    # sum over chunks, then average over examples
    fast = _convolutions.with_fast_groups(product)
    total = _chunks.sum_over_chunks(fast, batch, key, examples_per_chunk)
    examples = _chunks.number_of_examples(batch)
    return _placement.like(jax.tree.map(lambda x: x / examples, total), params)
