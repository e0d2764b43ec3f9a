"""Any pytree goes through the whole of one-shot pruning, and its leaves are found by key path."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

import fishleg_jax as flj
from tests import dense
from tests.inverse.test_contract import ROWS
from tests.marks import some_slow

TREE_ROWS = ("identity", "fishleg")


class Pair(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


def flax_linen():
    linen = pytest.importorskip("flax.linen")
    module = linen.Dense(3)
    return module.init(jax.random.key(0), jnp.ones((1, 4))), module.apply


def flax_nnx():
    nnx = pytest.importorskip("flax.nnx")
    graph, params = nnx.split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    return params, lambda params, x: nnx.merge(graph, params)(x)


def equinox():
    eqx = pytest.importorskip("equinox")
    module = eqx.nn.MLP(4, 3, 5, 1, key=jax.random.key(0))
    params, static = eqx.partition(module, eqx.is_array)
    return params, lambda params, x: jax.vmap(eqx.combine(params, static))(x)


KERNEL, BIAS = jnp.eye(4, 3), jnp.ones(3)
TREES = {
    "dict": lambda: ({"k": KERNEL, "b": BIAS}, lambda p, x: x @ p["k"] + p["b"]),
    "list": lambda: ([KERNEL, BIAS], lambda p, x: x @ p[0] + p[1]),
    "NamedTuple": lambda: (Pair(KERNEL, BIAS), lambda p, x: x @ p.kernel + p.bias),
    "array": lambda: (KERNEL, lambda p, x: x @ p),
    "flax linen": flax_linen,
    "flax nnx": flax_nnx,
    "equinox": equinox,
}


def trees(quick, names):
    """Rows and trees; of what takes long to compile some trees are for slow tests."""
    return some_slow(
        itertools.product(TREE_ROWS, names),
        lambda pair: pair[0] != "identity" and pair[1] not in quick,
    )


class Fit(NamedTuple):
    model: flj.Model
    params: Any
    batch: Any
    estimator: flj.InverseFisher
    result: flj.Result


@functools.cache
def pruned(row, tree):
    """One fit for all tests of a row and a tree."""
    params, predict = TREES[tree]()
    model = flj.Model(predict, flj.likelihoods.categorical())
    batch = (jax.random.normal(jax.random.key(1), (10, 4)), jnp.arange(10) % 3)
    estimator = ROWS[row](model)
    result = flj.prune_one_shot(model, params, estimator, [batch], sparsity=0.5, masks=None)
    return Fit(model, params, batch, estimator, result)


@pytest.mark.parametrize("row, tree", trees(["dict", "array", "flax linen", "equinox"], TREES))
def test_any_pytree(row, tree):
    """Through the whole of one-shot pruning, so that masks and reports go through it too."""
    model, params, batch, estimator, result = pruned(row, tree)
    for out in (
        result.params,
        result.masks,
        dense.jitted(estimator.multiply)(result.state, params),
    ):
        assert jax.tree.structure(out) == jax.tree.structure(params)
        assert jax.tree.map(jnp.shape, out) == jax.tree.map(jnp.shape, params)
    weights = result.report.total.weights
    assert weights == sum(x.size for x in jax.tree.leaves(params) if x.ndim >= 2)
    assert weights - result.report.total.kept == weights // 2
    assert jnp.isfinite(model.predict(result.params, batch[0])).all()


@pytest.mark.parametrize("row, tree", trees(["dict", "equinox"], ["dict", "flax nnx", "equinox"]))
def test_selection_by_key_path(row, tree):
    """Only the leaf whose key path is named is pruned, a bias here, in any kind of tree."""
    model, params, batch, estimator, result = pruned(row, tree)
    name = {"dict": "^b$", "flax nnx": "^bias$", "equinox": "layers/1/bias"}[tree]
    result = flj.prune_one_shot(
        model,
        params,
        estimator,
        [batch],
        sparsity=0.7,
        prunable=name,
        masks=None,
        stages=flj.Stages(state=result.state),
    )
    zeros = [int((~m).sum()) for m in jax.tree.leaves(result.masks)]
    assert sorted(zeros)[-1] == 2 and sum(zeros) == 2
    assert [r.shape for r in result.report.rows] == [(3,)]
