"""Scores of gates against gates written into the network, by automatic differentiation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj
from tests.compaction import networks

GAUSSIAN = flj.likelihoods.gaussian()


def normal(i, *shape):
    return 0.5 * jax.random.normal(jax.random.key(i), shape)


def brute(f, params, batch, units, likelihood=GAUSSIAN):
    """`½ E[(∂l/∂g)²]` of a network `f(params, inputs, g)` at gates of 1."""

    def loss(gates, x, y):
        model = flj.Model(lambda p, x: f(p, x, gates), likelihood)
        return flj.loss(model, params, (x[None], y[None]))

    derivatives = jax.vmap(jax.grad(loss), (None, 0, 0))(jnp.ones(units), *batch)
    return jnp.square(derivatives).mean(axis=0) / 2


def scored(f, params, batch, likelihood=GAUSSIAN, **options):
    """Scores by the first member of every coupling."""
    model = flj.Model(lambda p, x: f(p, x), likelihood)
    scores = flj.gate_scores(model, params, [batch], labels="empirical", **options)
    pairs = zip(scores.couplings, scores.values, strict=True)
    return {coupling[0]: values for coupling, values in pairs}


def autoencoder(p, x, g=1.0):
    return (jnp.tanh(x @ p["w"] + p["b"]) * g) @ p["w"].T


def embedding(p, tokens, g=1.0, inner=1.0):
    h = p["e"][tokens].mean(1)
    h = h + (jnp.tanh((h * g) @ p["u"] + p["b"]) * inner) @ p["d"]
    return (h * g) @ p["e"].T


def recurrent(p, x, g=1.0):
    @jax.checkpoint
    def step(h, x):
        return jnp.tanh(x @ p["in"] + (h * g) @ p["h"]), None

    h, _ = jax.lax.scan(step, jnp.zeros((len(x), 4)), jnp.moveaxis(x, 1, 0))
    return (h * g) @ p["out"]


def attention(p, x, heads=1.0, size=1.0):
    q, k, v = (jnp.einsum("bld,dhe->bhle", x, p[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bhle,bhme->bhlm", q, k) / 2)
    v = jnp.einsum("bhlm,bhme->blhe", weights, v)
    return jnp.einsum("blhe,heo->blo", v * jnp.reshape(heads, (-1, 1)) * size, p["o"])


def test_a_weight_that_is_used_twice_counts_where_it_reads():
    params, x = {"w": normal(0, 6, 5), "b": normal(1, 5)}, 2 * normal(2, 20, 6)
    (values,) = scored(autoencoder, params, (x, x)).values()
    expected = brute(autoencoder, params, (x, x), 5)
    np.testing.assert_allclose(values, expected, rtol=1e-4)
    gradients = flj.per_example_gradients(flj.Model(autoencoder, GAUSSIAN), params, (x, x))
    sums = (gradients["w"] * params["w"]).sum(axis=1)
    assert np.abs(np.square(sums).mean(axis=0) / 2 / expected - 1).min() > 0.1


def test_tied_embeddings():
    shapes = {"e": (9, 6), "u": (6, 8), "b": (8,), "d": (8, 6)}
    params = {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    tokens = jax.random.randint(jax.random.key(0), (32, 5), 0, 9)
    batch, likelihood = (tokens, tokens[:, 0]), flj.likelihoods.categorical()
    found = scored(embedding, params, batch, likelihood)
    stream = brute(embedding, params, batch, 6, likelihood)
    inner = brute(lambda p, x, g: embedding(p, x, 1.0, g), params, batch, 8, likelihood)
    assert list(found) == [("b", 0), ("d", 1)]
    np.testing.assert_allclose(found["b", 0], inner, rtol=1e-4)
    np.testing.assert_allclose(found["d", 1], stream, rtol=1e-4)


def test_loops_and_checkpoints():
    params = {"in": normal(0, 3, 4), "h": 2 * normal(1, 4, 4), "out": normal(2, 4, 2)}
    batch = normal(3, 6, 5, 3), normal(4, 6, 2)

    def fixed(p, x):
        return recurrent(p, x, jnp.ones(p["h"].shape[0]))

    (values,) = scored(fixed, params, batch, couplings=[RECURRENT]).values()
    np.testing.assert_allclose(values, brute(recurrent, params, batch, 4), rtol=1e-4)


RECURRENT = [("in", 1), ("h", 0), ("h", 1), ("out", 0)]


def test_units_that_no_weight_reads_are_left_out():
    """Queries and keys meet each other alone; heads and values share the kernel that reads them."""
    shapes = {"q": (5, 3, 4), "k": (5, 3, 4), "v": (5, 3, 4), "o": (3, 4, 6)}
    params = {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    batch = 2 * normal(7, 8, 7, 5), normal(8, 8, 7, 6)
    found = scored(attention, params, batch)
    assert list(found) == [("k", 1), ("o", 1)]
    np.testing.assert_allclose(found["k", 1], brute(attention, params, batch, 3), rtol=1e-4)
    size = lambda p, x, g: attention(p, x, 1.0, g)
    np.testing.assert_allclose(found["o", 1], brute(size, params, batch, 4), rtol=1e-4)
    with pytest.raises(ValueError, match=r"no weight reads the units of \('q', 2\)"):
        scored(attention, params, batch, couplings=[[("q", 2), ("k", 2)]])
    sizes = lambda p, x: (p["q"] * 0).sum() + jnp.tanh(x @ p["a"]).sum(axis=1)
    params = {"q": normal(0, 2), "a": normal(1, 5, 3)}
    assert scored(sizes, params, (batch[0][:, 0], normal(2, 8))) == {}


class Transformer(nn.Module):
    """A block of attention behind a layer norm, as `flax.linen` has them."""

    heads: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(12, name="embedding")(x)
        y = nn.LayerNorm(name="norm")(x)
        settings = {"qkv_features": 4 * self.heads, "out_features": 12, "name": "attention"}
        x = x + nn.MultiHeadDotProductAttention(self.heads, **settings)(y)
        return nn.Dense(3, name="out")(x.mean(axis=1))


def transformer(p, x, heads=1.0, stream=1.0):
    """Kernels that read the heads, and those that read the stream, have the gates in them."""
    layer = dict(p["attention"])
    kernel = layer["out"]["kernel"] * jnp.reshape(heads, (-1, 1, 1))
    layer["out"] = {**layer["out"], "kernel": kernel}
    for name in ("query", "key", "value"):
        gated = layer[name]["kernel"] * jnp.reshape(stream, (-1, 1, 1))
        layer[name] = {**layer[name], "kernel": gated}
    out = {**p["out"], "kernel": p["out"]["kernel"] * jnp.reshape(stream, (-1, 1))}
    net = Transformer(p["attention"]["query"]["kernel"].shape[1])
    return net.apply({"params": {**p, "attention": layer, "out": out}}, x)


def test_the_default_call_on_a_transformer_of_linen():
    x = 2 * normal(0, 8, 7, 5)
    params = networks.random(jax.eval_shape(Transformer(3).init, jax.random.key(0), x)["params"])
    batch, likelihood = (x, jnp.arange(8) % 3), flj.likelihoods.categorical()
    model = flj.Model(lambda p, x: transformer(p, x), likelihood)
    scores = flj.gate_scores(model, params, [batch], labels="empirical")
    by_leaf = {
        name: values
        for coupling, values in zip(scores.couplings, scores.values, strict=True)
        for name in coupling
    }
    heads = brute(transformer, params, batch, 3, likelihood)
    np.testing.assert_allclose(by_leaf["attention/out/kernel", 0], heads, rtol=1e-4)
    stream = brute(lambda p, x, g: transformer(p, x, 1.0, g), params, batch, 12, likelihood)
    np.testing.assert_allclose(by_leaf["attention/out/kernel", 2], stream, rtol=1e-4)
    assert ("attention/key/kernel", 2) not in by_leaf
    # The module derives its sizes from the number of heads, so heads alone may go.
    pairs = zip(scores.couplings, scores.values, strict=True)
    only = [(c, v) for c, v in pairs if ("attention/out/kernel", 0) in c]
    chosen = flj.UnitScores(*map(list, zip(*only, strict=True)))
    masks = flj.choose_units(model, params, chosen, flj.targets.weights(600), x)
    small = flj.compact(model, params, masks, x, couplings=chosen.couplings)
    assert small.params["attention"]["out"]["kernel"].shape == (2, 4, 12)


def test_functions_with_a_derivative_of_their_own_are_refused():
    @jax.custom_vjp
    def product(h, w):
        return h @ w

    product.defvjp(lambda h, w: (h @ w, (h, w)), lambda saved, g: (0 * saved[0], 0 * saved[1]))
    f = lambda p, x: product(jnp.tanh(x @ p["a"]), p["c"])
    params = {"a": normal(0, 5, 3), "c": normal(1, 3, 2)}
    with pytest.raises(ValueError, match="reads units inside of 'custom_vjp_call"):
        scored(f, params, (normal(2, 4, 5), normal(3, 4, 2)))
