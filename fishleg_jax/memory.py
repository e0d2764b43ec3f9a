"""Memory of a fit, predicted before it runs from shapes and the compiled update."""

from typing import Any, NamedTuple

import jax

from fishleg_jax import _tree
from fishleg_jax._checks.arrays import check_batch_shapes, check_dtypes
from fishleg_jax._devices import mesh
from fishleg_jax.inverse._placed import compiled, placement_of
from fishleg_jax.inverse.base import InverseFisher, check_on_host
from fishleg_jax.model import BatchLike, Params


class Memory(NamedTuple):
    """Memory of a fit on one device, in bytes.

    Attributes:
        state: Bytes of the estimator's state, kept between updates.
        update: Bytes of temporaries while an update runs (activations, Fisher products), excluding
            the weights and the batch.
    """

    state: int
    update: int

    @property
    def peak(self) -> int:
        """Sum of state and update, in bytes: the memory of a fit on top of weights and data."""
        return self.state + self.update


@mesh.in_mesh_of_params
def peak_memory(
    estimator: InverseFisher, params: Params, batch: BatchLike, *, masks: Any | None = None
) -> Memory:
    """Predicts the memory of a fit: the estimator's state, and one update of it.

    Nothing is run or allocated.  The update is compiled as `fit` does with the same arguments, so
    on a single device that `fit` finds it already compiled.  The numbers are the compiler's plan
    for the current kind of device; libraries called by XLA may allocate more.

    Args:
        estimator: Estimator of the inverse Fisher, such as `flj.inverse.fishleg(model)`.
        params: Weights, or their shapes and dtypes (`jax.ShapeDtypeStruct`, with shardings for
            several devices).
        batch: Batch of data, or its shapes and dtypes.
        masks: Boolean pytree like the weights, True for surviving ones, or its shapes and dtypes;
            None for a dense network.

    Returns:
        A `Memory` in bytes; of sharded arrays it counts the shard on one device.

    Raises:
        ValueError: An invalid estimator, weights that are not floating-point, masks of another
            structure, or a state that does not fit into memory (if the estimator checks it).

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
    # use the functions of `fit` itself, so that `fit` finds them compiled
    init, update = compiled(estimator, params)
    # shapes of results do not carry the sharding of Auto axes: add it from the placement
    state = placement_of(estimator, params).of_shapes(jax.eval_shape(init, params))
    key = jax.eval_shape(lambda: jax.random.key(0))
    plan = update.lower(state, params, batch, key, masks).compile()
    found = plan.memory_analysis()
    kept = found.output_size_in_bytes
    beside = found.temp_size_in_bytes
    # results that could not reuse donated memory are allocated on top
    beside += kept - found.alias_size_in_bytes
    return Memory(kept, beside)
