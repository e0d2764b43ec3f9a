"""Costs on paper: operations against XLA's own count, layers against tracing them all."""

import json
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

import fishleg_jax as flj
from experiments.benchmarks import fit_scaling
from experiments.running import memory
from experiments.scaling import __main__ as scaling
from experiments.scaling import operations, shapes
from experiments.scaling import operations as scaling_operations
from experiments.scaling import placement as scaling_placement
from experiments.scaling import tables as scaling_tables
from tests import programs

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
    image, kernel = (jax.ShapeDtypeStruct(s, "float32") for s in ((2, 8, 8, 3), (3, 3, 3, 4)))

    def conv(x, k):
        return jax.lax.conv_general_dilated(
            x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert operations.count(conv, image, kernel) == compiled(conv, image, kernel)


def test_loops_count_as_often_as_they_go_round():
    def looped(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]

    assert operations.count(looped, X, W) == 5 * 2 * 8 * 16 * 16
    assert compiled(looped, X, W) == pytest.approx(2 * 8 * 16 * 16, rel=0.05)  # XLA: once


def test_conditionals_by_their_cheapest_or_dearest_branch():
    def either(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x)

    cheap = operations.count(either, X, W)
    dear = operations.count(either, X, W, dearest=True)
    assert dear - cheap == 2 * 8 * 16 * 16
    assert compiled(either, X, W) == pytest.approx(dear, rel=0.05)


def test_factorisations():
    matrix = jax.ShapeDtypeStruct((512, 512), "float32")
    found = operations.count(jnp.linalg.cholesky, matrix)
    assert found == pytest.approx(512**3 / 3, rel=0.05)
    for factorisation in (jnp.linalg.cholesky, jnp.linalg.eigh, jnp.linalg.qr):
        # not a cubic one in XLA's eyes
        assert compiled(factorisation, matrix) < 20 * 512**2


def small(layers):
    network = shapes.llama(24, 40, layers, 4, 2, 50, tied=True)
    tokens = jax.ShapeDtypeStruct((8, 6), "int32")
    return network._replace(batch=(tokens, tokens))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fishleg", "kfac"])
def test_layers_are_alike(method):
    """What one and two layers tell of three is what three take."""
    network = small(3)
    calls = scaling_operations.estimator_calls(scaling.VARIANTS[method](network.model))
    found = scaling_operations.traced(calls, network)
    for name, call in calls(network.params(3), network.batch).items():
        trace, lowered = found[name]["trace"], found[name]["lowered"]
        assert trace == pytest.approx(operations.count(call.function, *call.arguments))
        whole = jax.jit(call.function).lower(*call.arguments).cost_analysis()["flops"]
        assert lowered == pytest.approx(whole, rel=0.01)


@pytest.fixture
def untraced(monkeypatch):
    """Leaves out counting operations, which takes longest; `test_layers_are_alike` counts them."""
    monkeypatch.setattr(scaling_operations, "traced", lambda calls, network: {})


def test_bytes_are_those_of_the_state(untraced):
    network = small(2)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), network.params(2))
    for method in ("fishleg", "diagonal"):
        state = scaling.VARIANTS[method](network.model).init(zeros)
        actual = sum(x.nbytes for x in jax.tree.leaves(state))
        assert scaling.reckon(method, network)["state_bytes"][1] == actual


def test_bytes_on_several_devices():
    tree = {"even": jax.ShapeDtypeStruct((6, 12), "float32"), "odd": X.update(shape=(3,))}
    meshes = [scaling_placement.abstract_mesh(n) for n in (1, 2, 4, 5)]
    cut = [scaling_placement.spread(tree, mesh) for mesh in meshes]
    assert [scaling_placement.device_bytes(x) for x in cut] == [300, 156, 84, 300]
    assert cut[1]["even"].sharding.spec == PartitionSpec(None, "devices")


# a state that the library made, on eight devices that are there, and programs for them
RUN = """
import json
import jax, jax.numpy as jnp
from experiments.scaling import __main__ as scaling
from experiments.scaling import operations as scaling_operations
from experiments.scaling import placement as scaling_placement
from experiments.sharding import __main__ as sharding
from fishleg_jax.inverse import _placed
from tests.experiments.test_scaling import small
sharding.make_devices()
network, told = small(2), {}
shapes = scaling_placement.spread(network.params(2), scaling_placement.mesh_of_cpu(8))
params = jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), shapes)
def held(tree, device):
    shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards]
    return sum(s.data.nbytes for s in shards if s.device == device)
def each(tree):
    return sorted({held(tree, device) for device in jax.devices()})
told["weights"] = each(params)
for method in scaling.VARIANTS:
    estimator = scaling.VARIANTS[method](network.model)
    init, _ = _placed.compiled(estimator, params)
    told[method] = each(init(params))
gradient = scaling_operations.gradient_calls(network.model)
diagonal = scaling_operations.estimator_calls(scaling.VARIANTS["diagonal"](network.model))
told["flops"] = [
    scaling_operations.compiled(gradient, network, n)
    | scaling_operations.compiled(diagonal, network, n, ("update",))
    for n in (1, 8)
]
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told():
    return json.loads(programs.told("-c", RUN).splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("method", scaling.VARIANTS)
def test_eight_devices_hold_what_is_reckoned(told, method):
    network = small(2)
    params = scaling_placement.spread(network.params(2), scaling_placement.abstract_mesh(8))
    state = jax.eval_shape(scaling.VARIANTS[method](network.model).init, params)
    state = scaling_placement.spread_state(state, params)
    assert told["weights"] == [scaling_placement.device_bytes(params)]
    assert told[method] == [scaling_placement.device_bytes(state)]


@pytest.mark.slow
def test_eight_devices_share_the_work(told):
    one, eight = told["flops"]
    assert set(one) == {"gradient", "multiply", "diagonal"}
    for name in one:
        assert one[name] / 8 <= eight[name] < one[name] / 4, name


def test_what_takes_minutes_is_compiled_only_when_it_is_asked_for(monkeypatch, untraced):
    asked = []

    def compiled(calls, network, devices, without=()):
        asked.append((devices, tuple(without)))
        return {}

    monkeypatch.setattr(scaling_operations, "compiled", compiled)
    for slow in (False, True):
        scaling.reckon("fishleg", small(2), (1,), slow)
    assert asked == [(1, ("update",)), (1, ())]


def test_a_table_leaves_out_what_was_not_compiled():
    counts = {"trace": 2e9, "dearest": 3e9, "lowered": 1e3}
    row = {
        "network": "8B",
        "weights": 10,
        "examples": 2,
        "method": "kfac",
        "weight_bytes": dict.fromkeys(scaling.DEVICES, 40),
        "state_bytes": dict.fromkeys(scaling.DEVICES, 80),
        "gradient_flops": {"gradient": counts},
        "gradient_compiled_flops": {8: {"gradient": 5e6}},
        "flops": {"update": counts, "multiply": counts},
        "compiled_flops": {8: {"multiply": 7e6}},
    }
    table = scaling_tables.of_bytes([row])
    assert table.columns == ["", "devices", "weights", "kfac"]
    name = "8B, 0.0 M weights"
    assert table.rows[0] == [name, "1", "40", "80"] and len(table.rows) == 4
    table = scaling_tables.of_operations([row])
    assert table.columns == ["", "of", "counted", "a gradient", "kfac"]
    update, multiply = table.rows[:4], table.rows[4:]
    assert [x[3:] for x in update] == [["2 G", "2 G"], ["3 G", "3 G"], ["1 k", "1 k"], ["5 M", ""]]
    assert [x[3:] for x in multiply] == [["", "2 G"], ["", "3 G"], ["", "1 k"], ["", "7 M"]]
    assert all(x[0] == name for x in table.rows) and update[3][2] == "compiled, each of 8"


def test_networks_stay_apart_in_tables():
    rows = [
        {
            "network": network,
            "weights": 10**6 * (1 + i),
            "examples": 2,
            "method": method,
            "weight_bytes": dict.fromkeys(scaling.DEVICES, 40),
            "state_bytes": dict.fromkeys(scaling.DEVICES, 100 * i + len(method)),
        }
        for i, network in enumerate(("ViT-B/16", "1B"))
        for method in ("kfac", "diagonal")
    ]
    table = scaling_tables.of_bytes(rows)
    assert table.columns[3:] == ["kfac", "diagonal"]
    assert table.rows[0][3:] == ["4", "8"] and table.rows[4][3:] == ["104", "108"]
    assert table.rows[4][0] == "1B, 2.0 M weights"
    assert "1B: 2 texts of 512 tokens" in table.examples and "ViT-B/16: 2 images" in table.examples


@pytest.mark.parametrize("name, millions", [("ResNet-50", 25.6), ("8B", 8030.3)])
def test_networks_have_their_sizes(name, millions):
    network = shapes.NETWORKS[name]()
    leaves = jax.tree.leaves(network.params(network.layers))
    assert sum(math.prod(x.shape) for x in leaves) / 1e6 == pytest.approx(millions, abs=0.05)
    outputs = jax.eval_shape(network.model.predict, network.params(1), network.batch[0])
    assert outputs.shape[0] == len(network.batch[0])


@pytest.mark.slow
def test_the_command_allocates_nothing(tmp_path, capsys):
    command = ["--network", "8B", "--method", "diagonal,identity", "--compile", "0"]
    command += ["--out", str(tmp_path)]
    with memory.watch() as peak:
        assert scaling.main(command) == 0
        assert (peak() or 0) < 3e8  # the smallest matrix of this network has 16 MB, all 32 GB
    printed = capsys.readouterr().out.splitlines()
    (one,) = [line.split() for line in printed if line.startswith("8B") and line.split()[4] == "1"]
    assert one[5:9] == ["32.1", "G", "32.1", "G"]
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
    assert fit_scaling.sizes("depth", 1e8, 1024) == (95, 1024)
    assert "5120×5120" in fit_scaling.reason(4, 5120, None, args)
    assert fit_scaling.reason(4, 5120, 64, args) is None


@pytest.mark.slow
def test_a_measurement():
    found = fit_scaling.measure(layers=1, units=8, cap=4, batch=4, repeats=1)
    assert found["weights"] == 64 and found["learning_s"] > 0
    assert found["predicted_bytes"] > found["state_bytes"] > 5 * 4 * 64


def test_both_estimates_are_made_without_looking_at_memory(untraced):
    with pytest.raises(ValueError, match="memory"):
        network = shapes.NETWORKS["8B"]()
        jax.eval_shape(flj.inverse.mfac(network.model).init, network.params(32))
    assert scaling.reckon("mfac, blocks of 128", small(2))["state_bytes"][1] > 0
