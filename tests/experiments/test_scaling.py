"""Costs on paper: operations against XLA's own count, layers against tracing them all."""

import json
import math

import jax
import jax.numpy as jnp
import pytest

import fishleg_jax as flj
from experiments import memory, operations, scaling, shapes
from experiments.benchmarks import fit_scaling

X = jax.ShapeDtypeStruct((8, 16), "float32")
W = jax.ShapeDtypeStruct((16, 16), "float32")


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


def test_products_count_as_xla_counts_them():
    gradient = jax.grad(lambda w, x: jnp.sum((x @ w) @ w))
    assert operations.count(lambda x, w: x @ w, X, W) == 2 * 8 * 16 * 16
    found = operations.count(gradient, W, X)
    assert found == pytest.approx(compiled(gradient, W, X), rel=0.05)


def test_convolutions_count_as_xla_counts_them():
    image, kernel = (
        jax.ShapeDtypeStruct(s, "float32") for s in ((2, 8, 8, 3), (3, 3, 3, 4))
    )  # fmt: skip

    def conv(x, k):
        return jax.lax.conv_general_dilated(
            x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert operations.count(conv, image, kernel) == compiled(conv, image, kernel)


def test_loops_count_as_often_as_they_go_round():
    def looped(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]

    assert operations.count(looped, X, W) == 5 * 2 * 8 * 16 * 16


def test_conditionals_by_their_cheapest_or_dearest_branch():
    def either(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x)

    cheap = operations.count(either, X, W)
    assert operations.count(either, X, W, dearest=True) - cheap == 2 * 8 * 16 * 16


def test_factorisations():
    matrix = jax.ShapeDtypeStruct((512, 512), "float32")
    found = operations.count(jnp.linalg.cholesky, matrix)
    assert found == pytest.approx(512**3 / 3, rel=0.05)


def small(layers):
    network = shapes.llama(16, 32, layers, 4, 2, 50, tied=True)
    tokens = jax.ShapeDtypeStruct((2, 6), "int32")
    return network._replace(batch=(tokens, tokens))


@pytest.mark.parametrize("method", ["fishleg", "kfac"])
def test_layers_are_alike(method):
    """What one and two layers tell of four is what four take."""
    network, estimator = small(4), scaling.METHODS[method](small(4).model)
    found = scaling.reckon(method, network)
    for name, flops in scaling._operations(estimator, network, 4).items():
        assert found[name] == pytest.approx(flops)


def test_bytes_are_those_of_the_state():
    network = small(2)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), network.params(2))
    for method in ("fishleg", "diagonal"):
        state = scaling.METHODS[method](network.model).init(zeros)
        actual = sum(x.nbytes for x in jax.tree.leaves(state))
        assert scaling.reckon(method, network)["state_bytes"][1] == actual


def test_bytes_on_several_devices():
    tree = {"even": jax.ShapeDtypeStruct((6, 5), "float32"), "odd": X.update(shape=(3,))}
    assert [scaling.device_bytes(tree, n) for n in (1, 2, 4)] == [132, 72, 132]


@pytest.mark.parametrize("name, millions", [("ResNet-50", 25.6), ("8B", 8030.3)])
def test_networks_have_their_sizes(name, millions):
    network = shapes.NETWORKS[name]()
    leaves = jax.tree.leaves(network.params(network.layers))
    assert sum(math.prod(x.shape) for x in leaves) / 1e6 == pytest.approx(millions, abs=0.05)
    outputs = jax.eval_shape(network.model.predict, network.params(1), network.batch[0])
    assert outputs.shape[0] == len(network.batch[0])


def test_the_command_allocates_nothing(tmp_path, capsys):
    command = ["--network", "8B", "--method", "diagonal,identity", "--out", str(tmp_path)]
    with memory.watch() as peak:
        assert scaling.main(command) == 0
        assert (peak() or 0) < 3e8  # the smallest matrix of this network has 16 MB, all 32 GB
    assert "| diagonal | 32.1 G |" in capsys.readouterr().out
    rows = json.loads((tmp_path / "scaling.json").read_text())
    assert [row["state_bytes"]["1"] for row in rows] == [4 * rows[0]["weights"] + 12, 0]


def test_slopes():
    assert fit_scaling.slope([(x, 3 * x**1.5) for x in (1, 10, 100)]) == pytest.approx(1.5)
    assert math.isnan(fit_scaling.slope([(1, 1)]))
    rows = [
        {"family": "width", "cap": 128, "weights": w, "learning_s": w**0.5, "peak_bytes": None}
        for w in (10, 10**6, 10**7, 10**8)
    ]
    (found,) = fit_scaling.slopes(rows)
    assert found["points"] == 3 and found["learning_s"] == pytest.approx(0.5)
    assert math.isnan(found["peak_bytes"])


def test_arguments_of_fit_scaling():
    args = fit_scaling.make_parser().parse_args(["--cap", "64,none", "--weights", "1e5"])
    assert args.cap == [64, None] and args.weights == [1e5]
    assert fit_scaling.sizes("width", 1e6) == (4, 512)
    assert fit_scaling.sizes("depth", 1e6) == (4, 512)
    assert "5120×5120" in fit_scaling.reason(4, 5120, None, args)
    assert fit_scaling.reason(4, 5120, 64, args) is None


def test_a_measurement():
    found = fit_scaling.measure(layers=1, units=8, cap=4, batch=4, repeats=1)
    assert found["weights"] == 64 and found["learning_s"] > 0
    assert found["predicted_bytes"] > found["state_bytes"] > 5 * 4 * 64


def test_both_estimates_are_made_without_looking_at_memory():
    with pytest.raises(ValueError, match="memory"):
        network = shapes.NETWORKS["8B"]()
        jax.eval_shape(flj.inverse.mfac(network.model).init, network.params(32))
    assert scaling.reckon("mfac, blocks of 128", small(2))["state_bytes"][1] > 0
