"""Networks with kernels of all kinds, as plain functions."""

import jax
import jax.numpy as jnp

import fishleg_jax as flj

IMAGES = jax.random.normal(jax.random.key(0), (6, 7, 7, 3))
LABELS = jnp.arange(6) % 4


def conv(x, kernel, layout="HWIO", **options):
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    return jax.lax.conv_general_dilated(
        x, kernel, dimension_numbers=("NHWC", layout, "NHWC"), **options
    )


@jax.jit
def stem(x, kernel):
    return jax.nn.relu(conv(x, kernel))


def predict(params, x):
    """Convolutions with stride, dilation and another layout, and dense layers in both layouts."""
    x = stem(x, params["stem"]) + params["bias"]
    x = jnp.tanh(conv(x, params["strided"], window_strides=(2, 1), padding=[(1, 2), (0, 1)]))
    x = jnp.tanh(conv(x, params["torch"], "OIHW", rhs_dilation=(1, 2)))
    x = conv(x, params["grouped"], feature_group_count=2)
    x = jnp.tanh(x.mean((1, 2)) @ params["hidden"])
    return jax.vmap(lambda row: params["out"] @ row)(x)


SHAPES = {
    "stem": (3, 3, 3, 6),
    "bias": (6,),
    "strided": (3, 2, 6, 8),
    "torch": (8, 8, 3, 3),
    "grouped": (1, 1, 4, 8),
    "hidden": (8, 10),
    "out": (4, 10),
}
MODEL = flj.Model(predict, flj.likelihoods.categorical())
BATCH = IMAGES, LABELS


def params_of(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(1), len(SHAPES))
    return {
        name: jax.random.normal(key, shape, dtype) / 3
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


PARAMS = params_of()
KERNELS = ("stem", "strided", "torch", "hidden", "out")
