"""Tiny networks whose sizes come from the shapes of their parameters, and ways to prune them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _tree

HEAD = 2  # size of an attention head


def random(shapes, seed=0):
    """Positive and negative weights in every leaf; statistics of a norm stay positive."""
    generator = np.random.default_rng(seed)

    def draw(path, x):
        found = generator.normal(size=x.shape)
        if _tree.leaf_name(path).endswith("var"):
            found = 0.5 + np.abs(found)
        return jnp.asarray(found / max(x.shape[-2:-1] or (1,)) ** 0.5, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def masks_without(params, **zeros):
    """Masks that prune everything at some indices of some leaves, by key path with `__` for `/`."""
    masks = jax.tree.map(lambda x: np.ones(x.shape, bool), params)
    leaves = dict(_tree.named_leaves(masks))
    for name, indices in zeros.items():
        leaves[name.replace("__", "/")][indices] = False
    return masks


def mlp(params, x):
    """Two hidden layers with biases."""
    h = jax.nn.relu(x @ params["w1"] + params["b1"])
    h = jnp.tanh(h @ params["w2"] + params["b2"])
    return h @ params["w3"] + params["b3"]


def mlp_params(sizes=(5, 8, 6, 3)):
    """Its parameters."""
    pairs = enumerate(zip(sizes, sizes[1:], strict=False), 1)
    shapes = {f"{k}{i}": s for i, (n, m) in pairs for k, s in (("w", (n, m)), ("b", (m,)))}
    return random({k: np.zeros(s) for k, s in shapes.items()})


class Cnn(nn.Module):
    """Convolutions, pooling, and dense layers behind the flattened images."""

    features: tuple[int, ...]
    padding: str

    @nn.compact
    def __call__(self, x):
        for i, n in enumerate(self.features[:2]):
            x = nn.relu(nn.Conv(n, (3, 3), padding=self.padding, name=f"conv{i}")(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(self.features[2], name="hidden")(x.reshape(x.shape[0], -1)))
        return nn.Dense(3, name="out")(x)


def cnn(padding):
    """The convolutional network as a function of its parameters."""

    def f(params, x):
        names = ("conv0", "conv1", "hidden")
        return Cnn(tuple(params[n]["bias"].size for n in names), padding).apply(
            {"params": params}, x
        )

    net, x = Cnn((4, 6, 5), padding), jnp.ones((1, 6, 6, 2))
    return f, random(jax.eval_shape(net.init, jax.random.key(0), x)["params"])


class Block(nn.Module):
    """A residual block with batch norm behind a first convolution, as in ResNet-20."""

    stem: int
    hidden: int

    @nn.compact
    def __call__(self, x):
        conv = lambda n, name: nn.Conv(n, (3, 3), padding=1, use_bias=False, name=name)
        norm = lambda name: nn.BatchNorm(use_running_average=True, name=name)
        x = nn.relu(norm("bn0")(conv(self.stem, "conv0")(x)))
        y = nn.relu(norm("bn1")(conv(self.hidden, "conv1")(x)))
        y = norm("bn2")(conv(self.stem, "conv2")(y))
        return nn.Dense(3, name="out")(nn.relu(x + y).mean(axis=(1, 2)))


def block(params, x, stats):
    """The residual network as a function of its parameters and statistics."""
    net = Block(params["bn0"]["bias"].size, params["bn1"]["bias"].size)
    return net.apply({"params": params, "batch_stats": stats}, x)


def block_variables():
    """Its parameters and statistics."""
    shapes = jax.eval_shape(Block(4, 6).init, jax.random.key(0), jnp.ones((1, 5, 5, 2)))
    return random(shapes["params"]), random(shapes["batch_stats"])


def transformer(params, tokens):
    """Two blocks under a scan, with embeddings that are tied to the outputs."""
    table = params["embedding"]
    x = table[tokens] + params["positions"]

    def layer(x, w):
        examples, length, width = x.shape
        centred = x - x.mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w["scale"]
        heads = w["qkv"].shape[1] // (3 * HEAD)
        parts = (y @ w["qkv"]).reshape(examples, length, 3, heads, HEAD)
        q, k, v = jnp.moveaxis(parts, 2, 0)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + attended.reshape(examples, length, -1) @ w["out"]
        return x + jax.nn.gelu(x @ w["up"] + w["b_up"]) @ w["down"] + w["b_down"], None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    return x @ table.T


def transformer_params(width=6, heads=3, hidden=8):
    """Its parameters."""
    shapes = {
        "embedding": (7, width),
        "positions": (4, width),
        "layers": {
            "scale": (2, width),
            "qkv": (2, width, 3 * heads * HEAD),
            "out": (2, heads * HEAD, width),
            "up": (2, width, hidden),
            "b_up": (2, hidden),
            "down": (2, hidden, width),
            "b_down": (2, width),
        },
    }
    return random(jax.tree.map(np.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple)))


def tied(params, tokens):
    """Mean of embeddings, a residual layer, and the embeddings again; no norm."""
    x = params["embedding"][tokens].mean(axis=1)
    x = x + jnp.tanh(x @ params["up"] + params["b"]) @ params["down"]
    return x @ params["embedding"].T + params["out"]


def tied_params():
    """Its parameters."""
    shapes = {"embedding": (7, 6), "up": (6, 8), "b": (8,), "down": (8, 6), "out": (7,)}
    return random({k: np.zeros(s) for k, s in shapes.items()})
