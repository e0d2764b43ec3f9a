"""The memory that a fit will take, before it runs: from shapes and the compiled update."""

from typing import Any, NamedTuple

import jax

from fishleg_jax import _tree
from fishleg_jax._checks.arrays import check_batch_shapes, check_dtypes
from fishleg_jax._devices import mesh
from fishleg_jax.inverse._placed import compiled, placement_of
from fishleg_jax.inverse.base import InverseFisher, check_on_host
from fishleg_jax.model import BatchLike, Params


class Memory(NamedTuple):
    """Bytes on one device.

    Attributes:
        state: of the estimate, which stays.
        update: what an update takes beside it while it runs: activations, Fisher products and what
            else is no result; not the weights and the batch that are there anyway.
    """

    state: int
    update: int

    @property
    def peak(self) -> int:
        """State and update: what a fit adds to the weights and data that are there before it."""
        return self.state + self.update


@mesh.in_mesh_of_params
def peak_memory(
    estimator: InverseFisher, params: Params, batch: BatchLike, *, masks: Any | None = None
) -> Memory:
    """The memory of a fit: that of the estimate, and of an update of it.

    Nothing is run and nothing allocated: the update is compiled, as `fit` does with the same
    arguments, which on a single device then has it compiled already.  It is the compiler's plan for
    this machine's kind of device; a library that it calls may take more.

    Args:
        estimator: the estimate.
        params: the weights; shapes and dtypes (`jax.ShapeDtypeStruct`, with shardings where there
            are several devices) will do.
        batch: a batch, or its shapes and dtypes.
        masks: which weights survive, or their shapes and dtypes; None for all.

    Returns:
        Bytes; of arrays that are sharded over devices those of one.

    Raises:
        ValueError: no estimator; weights of another dtype, or masks of another structure; a state
            that does not fit into memory, from estimates that check it.

    Example:
        >>> import jax, jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
        >>> weights = jax.ShapeDtypeStruct((1000,), jnp.float32)
        >>> batch = (jax.ShapeDtypeStruct((8, 1000), jnp.float32), None)
        >>> flj.peak_memory(flj.inverse.diagonal(model), weights, batch).state
        4044
    """
    check_on_host(estimator)
    check_dtypes(params)
    if masks is not None:
        _tree.check_same(params, masks, "masks")
    check_batch_shapes(batch, "batch")
    if estimator.updates == 0:
        return Memory(0, 0)
    # the very functions of `fit`, so that it finds them compiled
    init, update = compiled(estimator, params)
    # what Auto axes do with a result is not known of its shape
    state = placement_of(estimator, params).of_shapes(jax.eval_shape(init, params))
    key = jax.eval_shape(lambda: jax.random.key(0))
    plan = update.lower(state, params, batch, key, masks).compile()
    found = plan.memory_analysis()
    kept = found.output_size_in_bytes
    beside = found.temp_size_in_bytes
    # results that could not take the memory of what was given up stand beside it
    beside += kept - found.alias_size_in_bytes
    return Memory(kept, beside)
