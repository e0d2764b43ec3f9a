"""A small network on eight devices, or on one: see `experiments.sharding`."""

import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fishleg_jax as flj
from experiments.estimates.methods import variant

P = PartitionSpec
DEVICES, MESH = 8, (4, 2)
SIZES, EXAMPLES = (32, 64, 48), 96
GRADIENTS = EXAMPLES // 4  # of mfac
SMALLEST_KERNEL = 32 * 64
EVERYWHERE = ("data", "model")
MESHES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
IMAGE, CHANNELS = (4, 4, 2), 8  # a convolution makes 2x2 positions of 8 channels of it: 32 numbers
# of the batch's examples, of the two kernels, of the bias and of the convolution
LAYOUTS = {
    "data": (P(EVERYWHERE), P(), P(), P(), P()),
    "full": (P(EVERYWHERE), *[P(EVERYWHERE)] * 3, P(None, None, None, EVERYWHERE)),
    "mixed": (
        P("data"),
        P(None, "model"),
        P("model", None),
        P("model"),
        P(None, None, None, "model"),
    ),
}
ESTIMATORS = {
    "identity": variant("magnitude"),
    "diagonal": variant("diagonal", damping=0.1),
    "kfac": variant("kfac", damping=0.1, cap=16),
    "woodfisher": variant("woodfisher", damping=0.1, gradients=96, block_size=16),
    "mfac": variant("mfac", damping=0.1, window=24, block_size="leaf", examples_per_gradient=4),
    "mfac_all": variant("mfac", damping=0.1, window=24, examples_per_gradient=4),
    "fishleg": variant("fishleg", damping=0.1, learn=True, start=4, updates=6, cap=16),
}


class Case(NamedTuple):
    """A network, and where it lies.

    Attributes:
        model: as its user writes it for the mesh.
        plain: the same without a word of devices, for per-example gradients.
        params: weights.
        batch: inputs and labels.
    """

    model: flj.Model
    plain: flj.Model
    params: Any
    batch: tuple


def features(images: jax.Array, kernel: jax.Array | None) -> jax.Array:
    """The pixels themselves, or a convolution, whose per-example gradients XLA can't spread."""
    if kernel is not None:
        images = jnp.tanh(
            jax.lax.conv_general_dilated(
                images, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )
    return images.reshape(len(images), -1)


def predict(params: Any, images: jax.Array) -> jax.Array:
    """Two dense layers, with or without a convolution before them."""
    inputs = features(images, params.get("convolution"))
    return jnp.tanh(inputs @ params["one"] + params["bias"]) @ params["two"]


def predict_explicit(layout: str, params: Any, images: jax.Array) -> jax.Array:
    """The same for Explicit axes, where each product names the sharding of its result."""
    if layout == "full":
        params = jax.tree.map(lambda w: jax.sharding.reshard(w, P()), params)
    examples = jax.typeof(images).sharding.spec[0]
    inputs = jax.sharding.auto_axes(features, out_sharding=P(examples, None))(
        images, params.get("convolution")
    )
    across = "model" if layout == "mixed" else None
    product = functools.partial(jnp.einsum, "ni,io->no")
    hidden = product(inputs, params["one"], out_sharding=P(examples, across)) + params["bias"]
    return product(jnp.tanh(hidden), params["two"], out_sharding=P(examples, None))


def make_devices() -> None:
    """Makes eight devices of this CPU, before JAX is used for anything.

    A device that waits for others keeps a thread of XLA's pool, of which there are as many as
    devices or cores.  Where all of them wait the one that is waited for has none, and the process
    ends after 40 seconds (seen twice, on two busy cores); `NPROC` is how many there are at least.
    """
    os.environ["NPROC"] = str(8 * DEVICES)
    jax.config.update("jax_num_cpu_devices", DEVICES)


def make_mesh(kind: str) -> jax.sharding.Mesh:
    """Eight devices, four by two, with `auto` or `explicit` axes."""
    return jax.make_mesh(MESH, EVERYWHERE, axis_types=(MESHES[kind],) * 2)


def make_case(
    mesh: Any = None,
    layout: str = "data",
    dtype: str = "float64",
    seed: int = 0,
    network: str = "convolution",
) -> Case:
    """The network on a mesh, or on one device."""
    keys = iter(jax.random.split(jax.random.key(seed), 5))

    def draw(*shape):
        return np.asarray(jax.random.normal(next(keys), shape, dtype))

    inputs, hidden, classes = SIZES
    params = {
        "one": draw(inputs, hidden) / inputs**0.5,
        "two": draw(hidden, classes) / hidden**0.5,
        "bias": 0.3 * draw(hidden),
    }
    if network == "convolution":
        params["convolution"] = draw(3, 3, IMAGE[-1], CHANNELS) / 4
    batch = draw(EXAMPLES, *IMAGE), np.arange(EXAMPLES) % classes
    plain = model = flj.Model(predict, flj.likelihoods.categorical())
    if mesh is None:
        return Case(model, plain, *jax.tree.map(jnp.asarray, (params, batch)))
    examples, *specs = LAYOUTS[layout]
    specs = dict(zip(params, specs, strict=False))
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    if mesh.axis_types[0] == AxisType.Explicit:
        model = model._replace(predict=functools.partial(predict_explicit, layout))
    return Case(
        model, plain, jax.tree.map(put, params, specs), tuple(put(x, examples) for x in batch)
    )


def make_estimator(name: str, case: Case) -> flj.InverseFisher:
    """An estimate; FishLeg needs no per-example gradients, and takes the user's own model."""
    return ESTIMATORS[name](case.model if name == "fishleg" else case.plain)
