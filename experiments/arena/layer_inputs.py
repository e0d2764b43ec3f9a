"""Second moments of what layers see, by interception of flax's methods."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.specs import Spec

LAYERS = (nn.Dense, nn.Conv)
_NAME = "second_moment"


def as_matrices(kernel: Any, groups: int) -> Any:
    """The kernel of a layer as matrices, one for each group of output channels.

    Args:
        kernel: of a dense layer `(inputs, outputs)`, or of a convolution
            `(height, width, inputs / groups, outputs)`.
        groups: number of groups that see inputs of their own; 1 but for grouped convolutions.

    Returns:
        Matrices `(groups, outputs / groups, columns)`, whose columns are the values of a patch.
    """
    columns = kernel.reshape(-1, groups, kernel.shape[-1] // groups)
    return columns.transpose(1, 2, 0)


def as_kernel(matrices: Any, shape: tuple[int, ...]) -> Any:
    """The inverse of `as_matrices`, for a kernel of the shape given."""
    return matrices.transpose(2, 0, 1).reshape(shape)


def _patches(layer: nn.Conv, images: jax.Array) -> jax.Array:
    """What each output of a convolution sees: `(positions, groups, values)`."""
    strides = layer.strides or 1
    size = layer.kernel_size
    found = jax.lax.conv_general_dilated_patches(
        images,
        size,
        (strides,) * len(size) if isinstance(strides, int) else strides,
        layer.padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    # JAX puts a patch's channels before its pixels, a kernel has them behind
    groups, pixels = layer.feature_group_count, size[0] * size[1]
    found = found.reshape(-1, groups, images.shape[-1] // groups, pixels)
    return found.swapaxes(2, 3).reshape(len(found), groups, -1)


def _second_moment(layer: nn.Module, inputs: jax.Array) -> jax.Array:
    """`Σ x xᵀ` over examples and positions, `(groups, columns, columns)`."""
    if isinstance(layer, nn.Conv):
        x = _patches(layer, inputs)
    else:
        x = inputs.reshape(-1, 1, inputs.shape[-1])
    return jnp.einsum("ngi,ngj->gij", x, x)


def _applied(spec: Spec, params: Any, batch: tuple, seen: list[str]) -> Any:
    """Applies a network with the second moments of its layers among its intermediates."""

    def intercept(call, args, kwargs, context):
        layer = context.module
        if isinstance(layer, LAYERS) and context.method_name == "__call__":
            seen.append("/".join(layer.path))
            moment = _second_moment(layer, args[0])
            # a layer that is called several times adds up; a scan puts its axis in front
            layer.sow(
                "intermediates", _NAME, moment, init_fn=lambda: 0.0, reduce_fn=lambda a, b: a + b
            )
        return call(*args, **kwargs)

    variables = {"params": params}
    if batch[2:]:
        variables["batch_stats"] = batch[2]
    with nn.intercept_methods(intercept):
        _, found = spec.module.apply(variables, batch[0], mutable=["intermediates"])
    return found["intermediates"]


def order(spec: Spec, params: Any, batch: tuple) -> list[str]:
    """The dense layers and convolutions of a network by path, in the order of their calls.

    Args:
        spec: the model.
        params: its parameters.
        batch: a batch, for its shapes.
    """
    seen: list[str] = []
    jax.eval_shape(lambda p, b: _applied(spec, p, b, seen), params, batch)
    return list(dict.fromkeys(seen))  # a scan traces its layers more than once


def leaf(tree: Any, path: str) -> Any:
    """The part of nested dicts at a path such as `layers/block/qkv`."""
    for name in path.split("/"):
        tree = tree[name]
    return tree


@partial(jax.jit, static_argnames=("spec", "path"))
def _one_moment(spec: Spec, path: str, params: Any, batch: tuple) -> jax.Array:
    # the others are not asked for, and the compiler leaves them out
    return leaf(_applied(spec, params, batch, []), path)[_NAME]


def second_moments(spec: Spec, params: Any, batches: Sequence[tuple], path: str) -> jax.Array:
    """`Σ x xᵀ` of what one layer sees.

    Args:
        spec: the model.
        params: its parameters.
        batches: as the library wants them.
        path: a path of `order`.

    Returns:
        Second moments `(layers, groups, columns, columns)`: as many layers as are stacked in the
        layer's kernel, else one.  What a recurrent layer sees over time is summed.
    """
    total = sum(_one_moment(spec, path, params, batch) for batch in batches)
    kernel = leaf(params, path)["kernel"]
    stacked = is_stacked(kernel)
    layers = kernel.shape[0] if stacked else 1
    return total.reshape(layers, -1, *total.shape[-3:]).sum(axis=1)


def is_stacked(kernel: jax.Array) -> bool:
    """Whether a kernel has a leading axis of layers: those of single ones have 2 or 4 axes."""
    return kernel.ndim % 2 == 1
