"""Large networks as shapes: trees of `jax.ShapeDtypeStruct` and functions, with no weights.

They have the matrices and tensors of the originals, with which costs are reckoned; batch norm is
a scale and a bias, and positions are not encoded, which takes no weights.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import fishleg_jax as flj

EXAMPLES = 32  # images of a batch
SEQUENCES, TOKENS = 8, 512  # of a batch of text


class Network(NamedTuple):
    """A network of equal layers between other parts.

    Attributes:
        params: makes the shapes of the weights from the number of layers.
        model: predicts with weights of any number of layers.
        batch: the shapes of inputs and targets.
        layers: number of layers.
    """

    params: Callable[[int], Any]
    model: flj.Model
    batch: tuple
    layers: int


def _leaf(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _images(side: int = 224) -> tuple:
    return _leaf(EXAMPLES, side, side, 3), _leaf(EXAMPLES, dtype="int32")


def resnet50() -> Network:
    """ResNet-50 for 1000 classes: 25.6 million weights.  Its layers are not equal: one is all."""

    def unit(size, inputs, outputs):
        return {
            "kernel": _leaf(size, size, inputs, outputs),
            "scale": _leaf(outputs),
            "bias": _leaf(outputs),
        }

    def params(layers):
        del layers
        tree, inputs = {"stem": unit(7, 3, 64)}, 64
        for stage, blocks in enumerate((3, 4, 6, 3)):
            width = 64 * 2**stage
            for block in range(blocks):
                sizes = ((1, inputs, width), (3, width, width), (1, width, 4 * width))
                parts = {f"conv{i}": unit(*size) for i, size in enumerate(sizes)}
                if block == 0:
                    parts["shortcut"] = unit(1, inputs, 4 * width)
                tree[f"stage{stage}_{block:02}"] = parts
                inputs = 4 * width
        return tree | {"head": {"kernel": _leaf(2048, 1000), "bias": _leaf(1000)}}

    def conv(p, x, stride=1):
        y = jax.lax.conv_general_dilated(
            x, p["kernel"], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y * p["scale"] + p["bias"]

    def predict(params, x):
        x = jax.nn.relu(conv(params["stem"], x, 2))
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
        for name in sorted(n for n in params if n.startswith("stage")):
            p = params[name]
            stride = 2 if "shortcut" in p and not name.startswith("stage0") else 1
            y = jax.nn.relu(conv(p["conv0"], x, stride))
            y = conv(p["conv2"], jax.nn.relu(conv(p["conv1"], y)))
            x = jax.nn.relu(y + (conv(p["shortcut"], x, stride) if "shortcut" in p else x))
        return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]

    return Network(params, flj.Model(predict, flj.likelihoods.categorical()), _images(), 1)


def _attend(q, k, v, *, causal: bool):
    """Attention of (examples, tokens, heads, size); of fewer keys each serves several queries."""
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    scores = jnp.einsum("nqhd,nkhd->nhqk", q, k) / q.shape[-1] ** 0.5
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    return jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores), v)


def _normed(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def vit_b16() -> Network:
    """ViT-B/16 for 1000 classes, by the mean of its tokens: 86 million weights."""
    width, hidden, heads = 768, 3072, 12

    def dense(inputs, outputs):
        return {"kernel": _leaf(inputs, outputs), "bias": _leaf(outputs)}

    def params(layers):
        block = {
            "norm0": _leaf(width),
            "norm1": _leaf(width),
            "out": dense(width, width),
            "up": dense(width, hidden),
            "down": dense(hidden, width),
        } | {name: dense(width, width) for name in "qkv"}
        outside = {
            "patches": dense(16 * 16 * 3, width),
            "positions": _leaf(196, width),
            "norm": _leaf(width),
            "head": dense(width, 1000),
        }
        return {"blocks": [block] * layers} | outside

    def apply(p, x):
        return x @ p["kernel"] + p["bias"]

    def predict(params, x):
        n = len(x)
        x = x.reshape(n, 14, 16, 14, 16, 3).swapaxes(2, 3).reshape(n, 196, -1)
        x = apply(params["patches"], x) + params["positions"]
        for p in params["blocks"]:
            y = _normed(x, p["norm0"])
            q, k, v = (apply(p[name], y).reshape(n, 196, heads, -1) for name in "qkv")
            x = x + apply(p["out"], _attend(q, k, v, causal=False).reshape(x.shape))
            x = x + apply(p["down"], jax.nn.gelu(apply(p["up"], _normed(x, p["norm1"]))))
        return apply(params["head"], _normed(x, params["norm"]).mean(1))

    return Network(params, flj.Model(predict, flj.likelihoods.categorical()), _images(), 12)


def llama(
    width: int, hidden: int, layers: int, heads: int, keys: int, vocabulary: int, tied: bool
) -> Network:
    """A transformer of Llama's shapes: grouped keys, gated units, no biases.

    Args:
        width: of a token.
        hidden: units of a gated layer.
        layers: number of blocks.
        heads: of queries.
        keys: heads of keys and values.
        vocabulary: number of tokens.
        tied: whether the embedding is the head too.
    """
    size = width // heads

    def params(layers):
        block = {
            "norm0": _leaf(width),
            "q": _leaf(width, width),
            "k": _leaf(width, keys * size),
            "v": _leaf(width, keys * size),
            "out": _leaf(width, width),
            "norm1": _leaf(width),
            "gate": _leaf(width, hidden),
            "up": _leaf(width, hidden),
            "down": _leaf(hidden, width),
        }
        outside = {"embedding": _leaf(vocabulary, width), "norm": _leaf(width)}
        head = {} if tied else {"head": _leaf(width, vocabulary)}
        return {"blocks": [block] * layers} | outside | head

    def predict(params, tokens):
        x = params["embedding"][tokens]
        for p in params["blocks"]:
            y = _normed(x, p["norm0"])
            q, k, v = ((y @ p[name]).reshape(*x.shape[:2], -1, size) for name in "qkv")
            x = x + _attend(q, k, v, causal=True).reshape(x.shape) @ p["out"]
            y = _normed(x, p["norm1"])
            x = x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]
        return _normed(x, params["norm"]) @ (params["embedding"].T if tied else params["head"])

    batch = (_leaf(SEQUENCES, TOKENS, dtype="int32"),) * 2
    return Network(params, flj.Model(predict, flj.likelihoods.categorical()), batch, layers)


NETWORKS = {
    "ResNet-50": resnet50,
    "ViT-B/16": vit_b16,
    "1B": lambda: llama(2048, 8192, 16, 32, 8, 128_256, tied=True),
    "8B": lambda: llama(4096, 14_336, 32, 32, 8, 128_256, tied=False),
}
