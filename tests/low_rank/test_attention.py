"""Kernels with several axes of inputs or outputs, as attention has them, by dense algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj

decompose = flj.low_rank.decompose
HEADS, SIZE, WIDTH = 3, 4, 10
KEYS = jax.random.split(jax.random.key(0), 6)
X = jax.random.normal(KEYS[0], (7, 5, WIDTH))
SHAPES = {
    "query": (WIDTH, HEADS, SIZE),
    "key": (WIDTH, HEADS, SIZE),
    "value": (HEADS, SIZE, WIDTH),  # contracted over its last axis
    "out": (HEADS, SIZE, WIDTH),
    "torch": (WIDTH, HEADS, SIZE),  # contracted over its last axes
}
PARAMS = {
    name: jax.random.normal(key, shape) / 3
    for key, (name, shape) in zip(KEYS[1:], SHAPES.items(), strict=True)
}
LEADING = {"query": 1, "key": 1, "value": 2, "out": 2, "torch": 1}  # axes of the left factor
COLUMNS = ("value", "torch")  # whose inputs are the last axes


def predict(params, x):
    query = jnp.einsum("nte,ehd->nthd", x, params["query"])
    key = jnp.einsum("nte,ehd->nthd", x, params["key"])
    value = jnp.einsum("nte,hde->nthd", x, params["value"])
    weights = jax.nn.softmax(jnp.einsum("nthd,nshd->nhts", query, key) / SIZE**0.5)
    mixed = jnp.einsum("nhts,nshd->nthd", weights, value)
    first = jnp.einsum("nthd,hde->nte", mixed, params["out"])
    second = jnp.einsum("nthd,ehd->nte", mixed, params["torch"])
    return jnp.tanh(first + second).mean(1)


MODEL = flj.Model(predict, flj.likelihoods.gaussian())
BATCH = X, jnp.ones((7, WIDTH))


def matrix(name, x):
    """Kernel, or gradients behind leading axes of the others, as a matrix in the leaf's order."""
    rows = np.prod(SHAPES[name][: LEADING[name]])
    return np.asarray(x, float).reshape(*x.shape[: x.ndim - 3], rows, -1)


@pytest.mark.parametrize("metric", flj.low_rank.decomposition.METRICS)
def test_full_rank_is_exact(metric):
    small = decompose(MODEL, PARAMS, [BATCH], ranks={"": 1000}, metric=metric)
    assert {row.form for row in small.report.rows} == {"svd"}
    for name, kernel in PARAMS.items():
        product = jnp.tensordot(small.params[name]["left"], small.params[name]["right"], 1)
        np.testing.assert_allclose(product, kernel, atol=1e-5)
    found = jax.jit(small.model.predict)(small.params, X)
    np.testing.assert_allclose(found, predict(PARAMS, X), atol=1e-5)


def test_a_lower_rank_is_the_best_of_the_matrix():
    """The kernel's truncated SVD, operations by hand, and no kernel multiplied out."""
    small = decompose(MODEL, PARAMS, [BATCH], ranks={"": 2}, metric="identity")
    cut = {}
    for row in small.report.rows:
        u, s, vt = np.linalg.svd(matrix(row.name, PARAMS[row.name]), full_matrices=False)
        kept = (u[:, :2] * s[:2] @ vt[:2]).reshape(SHAPES[row.name])
        cut[row.name] = jnp.asarray(kept, jnp.float32)
        assert row.loss == pytest.approx((s[2:] ** 2).sum() / 2)
        assert row.weights == (120, 2 * (WIDTH + HEADS * SIZE))
        assert row.flops == (2 * 5 * 120, 2 * 5 * row.weights[1])  # five positions
    run = jax.jit(small.model.predict)
    np.testing.assert_allclose(run(small.params, X), predict(cut, X), atol=1e-5)
    text = str(jax.make_jaxpr(small.model.predict)(small.params, X))
    assert "f32[10,2]" in text and "f32[10,3,4]" not in text and "f32[3,4,10]" not in text


def test_the_metric_is_that_of_the_matrix():
    small = decompose(MODEL, PARAMS, [BATCH], 0.5, fisher="empirical")
    gradients = flj.per_example_gradients(MODEL, PARAMS, BATCH)
    for name, (inputs, outputs) in small.moments.items():
        g = matrix(name, gradients[name])
        if name in COLUMNS:
            g = g.swapaxes(1, 2)
        scale = len(g) * ((g**2).sum() / len(g)) ** 0.5
        for found, wanted in ((inputs, "smn,skn->mk"), (outputs, "smn,smk->nk")):
            np.testing.assert_allclose(found, np.einsum(wanted, g, g) / scale, rtol=1e-4, atol=1e-7)
    kept = sum(row.weights[1] for row in small.report.rows)
    assert 0.3 * 600 < kept <= 0.5 * 600


def test_gradients_are_those_of_the_product():
    small = decompose(MODEL, PARAMS, [BATCH], ranks={"": 3}, metric="identity")

    def multiplied(factors):
        return {name: jnp.tensordot(x["left"], x["right"], 1) for name, x in factors.items()}

    found = jax.grad(lambda p: (small.model.predict(p, X) ** 2).sum())(small.params)
    wanted = jax.grad(lambda p: (predict(multiplied(p), X) ** 2).sum())(small.params)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)


def test_axes_in_the_middle_stay_whole():
    """Heads first, then inputs, then outputs: one matrix a head."""
    params = {"kernel": PARAMS["value"], "out": jnp.ones((WIDTH, WIDTH))}

    def heads_first(p, x):
        return jnp.einsum("nte,hed->nhd", x[..., :SIZE], p["kernel"]).mean(1) @ p["out"]

    model = flj.Model(heads_first, flj.likelihoods.gaussian())
    small = decompose(model, params, [(X, None)], 0.5, metric="identity")
    assert small.report.rows[0].reason == "an operand of dot_general"


def test_attention_of_flax():
    linen = pytest.importorskip("flax.linen")
    layer = linen.MultiHeadDotProductAttention(num_heads=HEADS, qkv_features=12)
    params = layer.init(jax.random.key(1), X)["params"]
    run = lambda p, x: layer.apply({"params": p}, x)
    model = flj.Model(lambda p, x: run(p, x).mean(1), flj.likelihoods.gaussian())
    small = decompose(model, params, [(X, None)], ranks={"kernel": 1000}, metric="identity")
    found = [row.name for row in small.report.rows if row.form]
    assert found == ["key/kernel", "out/kernel", "query/kernel", "value/kernel"]
    found = flj.low_rank.apply(run, params)(small.params, X)
    np.testing.assert_allclose(found, run(params, X), atol=1e-5)
