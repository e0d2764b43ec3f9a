"""Operations counted from models against those counted by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj
from fishleg_jax.pruning.costs import weight_costs

GAUSSIAN = flj.likelihoods.gaussian()


def costs(predict, params, inputs, *constants):
    """Per example and weight; the numbers in arrays do not matter, so they are ones."""
    ones = lambda tree: jax.tree.map(jnp.ones, tree, is_leaf=lambda x: isinstance(x, tuple))
    batch = (ones(inputs), None, *map(ones, constants))
    return weight_costs(flj.Model(predict, GAUSSIAN), ones(params), batch)


def convolve(x, w, stride=1, padding="SAME", **options):
    layout = ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    return jax.lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=layout, **options)


def test_dense_layer_costs_two_for_a_weight_and_one_for_a_bias():
    predict = lambda p, x: jax.nn.relu(x @ p["w"] + p["b"])
    assert costs(predict, {"w": (3, 5), "b": (5,)}, (4, 3)) == {"w": 2, "b": 1}


@pytest.mark.parametrize("examples", [1, 2, 7])
def test_dense_layer_at_every_position(examples):
    predict = lambda p, x: x @ p["w"] + p["b"]
    expected = {"w": 2 * 6, "b": 6}
    assert costs(predict, {"w": (3, 5), "b": (5,)}, (examples, 6, 3)) == expected


@pytest.mark.parametrize(
    "stride, padding, positions",
    [(1, "SAME", 9 * 8), (1, "VALID", 7 * 6), (2, "SAME", 5 * 4), (2, "VALID", 4 * 3)],
)
def test_a_weight_of_a_convolution_is_used_at_every_output_position(stride, padding, positions):
    predict = lambda p, x: convolve(x, p["w"], stride, padding) + p["b"]
    params = {"w": (3, 3, 2, 5), "b": (5,)}
    assert costs(predict, params, (4, 9, 8, 2)) == {"w": 2 * positions, "b": positions}


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_grouped_and_depthwise_convolutions(groups):
    """Each weight is used once at every position, however many groups there are."""
    predict = lambda w, x: convolve(x, w, feature_group_count=groups)
    assert costs(predict, (3, 3, 6 // groups, 12), (4, 5, 5, 6)) == 2 * 25


def test_convolution_with_groups_of_the_batch():
    predict = lambda w, x: convolve(x, w, batch_group_count=2)
    # two examples make one output, each for half of the features
    assert costs(predict, (3, 3, 6, 12), (4, 5, 5, 6)) == 2 * 25 / 2


def test_transposed_and_dilated_convolutions():
    """Zeros between the inputs of a transposed one take no operation; it meets every input once."""
    predict = lambda w, x: jax.lax.conv_transpose(x, w, (2, 2), "VALID")
    assert costs(predict, (2, 2, 3, 5), (4, 6, 7, 3)) == 2 * 6 * 7
    predict = lambda w, x: convolve(x, w, padding="VALID", rhs_dilation=(2, 2))
    assert costs(predict, (3, 3, 2, 5), (4, 9, 9, 2)) == 2 * 25


def test_one_dimensional_convolution_in_another_layout():
    predict = lambda w, x: jax.lax.conv(x, w, (1,), "VALID")
    assert costs(predict, (5, 2, 3), (4, 2, 9)) == 2 * 7


@pytest.mark.parametrize("transform", ["reshape", "transpose", "cast", "mask", "tile", "norm"])
def test_a_leaf_is_followed_through_what_is_done_to_it_first(transform):
    def predict(w, x):
        if transform == "reshape":
            w = w.reshape(3, 2, 5).reshape(3, 10)[:, ::-1]
        elif transform == "transpose":
            w = w.T.T
        elif transform == "cast":
            w = w.astype(jnp.bfloat16).astype(x.dtype)
        elif transform == "mask":
            w = w * jnp.tri(3, 10)
        elif transform == "tile":
            w = jnp.broadcast_to(w, (4, 3, 10))
            return jnp.einsum("bi,bij->bj", x, w)
        else:
            w = w / jnp.sqrt(jnp.sum(w**2, axis=0))
        return jax.jit(lambda x, w: x @ w)(x, w)

    assert costs(predict, (3, 10), (4, 3)) == 2


def test_a_leaf_used_twice_costs_twice():
    """Tied weights: an embedding that is looked up, for nothing, and used for the outputs too."""
    predict = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"] @ p["w"].T
    assert costs(predict, {"w": (3, 3)}, (4, 3)) == {"w": 6}
    tied = lambda p, x: p["e"][x.astype(int)] @ p["e"].T
    assert costs(tied, {"e": (11, 3)}, (4, 6)) == {"e": 2 * 6}
    looked_up = lambda p, x: p["e"][x.astype(int)]
    assert costs(looked_up, {"e": (11, 3)}, (4, 6)) == {"e": 0}


def test_what_the_model_does_not_use_costs_nothing():
    predict = lambda p, x: x @ p["w"]
    expected = {"w": 2, "unused": 0, "empty": 0}
    assert costs(predict, {"w": (3, 5), "unused": (3, 5), "empty": (0, 5)}, (4, 3)) == expected


def test_activations_are_not_taken_for_the_weights_that_scaled_them():
    predict = lambda p, x: jax.nn.relu(x * p["scale"]) @ p["w"]
    assert costs(predict, {"scale": (3,), "w": (3, 5)}, (4, 3)) == {"scale": 1, "w": 2}


def test_a_product_of_leaves_is_free_and_charges_all_of_them_where_it_is_used():
    predict = lambda p, x: x @ (p["w"] + p["a"] @ p["b"])
    params = {"w": (6, 6), "a": (6, 2), "b": (2, 6)}
    assert costs(predict, params, (4, 6)) == {"w": 2, "a": 6, "b": 6}
    predict = lambda p, x: x @ p["a"] @ p["b"]
    assert costs(predict, params, (4, 6)) == {"w": 0, "a": 2, "b": 2}


def test_concatenated_leaves_share_the_cost_by_size():
    def predict(p, x):
        keys, queries = jnp.split(x @ jnp.concatenate([p["k"], p["q"]], 1), [5], axis=1)
        return keys.sum(1) * queries.sum(1)

    assert costs(predict, {"k": (3, 5), "q": (3, 20)}, (4, 3)) == pytest.approx({"k": 2, "q": 2})


def test_a_scan_counts_every_step():
    def recurrent(p, x):
        step = lambda h, u: (jnp.tanh(h @ p["h"] + u @ p["u"] + p["b"]), None)
        h, _ = jax.lax.scan(step, jnp.zeros((len(x), 5)), x.swapaxes(0, 1))
        return h @ p["out"]

    params = {"h": (5, 5), "u": (3, 5), "b": (5,), "out": (5, 2)}
    assert costs(recurrent, params, (4, 7, 3)) == {"h": 14, "u": 14, "b": 7, "out": 2}


def test_layers_stacked_in_a_scan_or_taken_one_by_one_in_a_loop():
    """Each weight is used in one step only."""
    scanned = lambda w, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0]
    assert costs(scanned, (6, 3, 3), (4, 3)) == 2
    looped = lambda w, x: jax.lax.fori_loop(0, 6, lambda i, h: jnp.tanh(h @ w[i]), x)
    assert costs(looped, (6, 3, 3), (4, 3)) == 2


def test_weights_carried_through_a_loop_stay_weights():
    def predict(p, x):
        step = lambda _, w: w / jnp.linalg.norm(w) + p["v"]
        turn = lambda _, w: jnp.concatenate([w[1:], p["v"][:1]])
        w = jax.lax.fori_loop(0, 3, step, p["w"])
        return x @ jax.lax.fori_loop(0, 3, turn, w)

    assert costs(predict, {"w": (3, 5), "v": (3, 5)}, (4, 3)) == {"w": 2, "v": 2}


def test_nested_loops_multiply():
    inner = lambda w, h: jax.lax.fori_loop(0, 5, lambda _, h: jnp.tanh(h @ w), h)
    outer = lambda w, x: jax.lax.fori_loop(0, 3, lambda _, h: inner(w, h), x)
    assert costs(outer, (3, 3), (4, 3)) == 2 * 15


def test_a_cond_counts_for_each_leaf_the_branch_that_uses_it_most():
    def predict(p, x):
        twice = lambda x: x @ p["a"] @ p["a"]
        once = lambda x: x @ p["a"] + x @ p["b"]
        return jax.lax.cond(x.sum() > 0, twice, once, x)

    assert costs(predict, {"a": (3, 3), "b": (3, 3)}, (4, 3)) == {"a": 4, "b": 2}


@jax.custom_vjp
def _product(x, w):
    return x @ w


_product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


@jax.custom_jvp
def _product_jvp(x, w):
    return x @ w


_product_jvp.defjvp(lambda primals, tangents: (primals[0] @ primals[1],) * 2)


@pytest.mark.parametrize(
    "product",
    [
        jax.jit(jnp.matmul),
        jax.checkpoint(jnp.matmul),
        _product,
        _product_jvp,
        jax.vmap(jnp.matmul, (0, None)),
        lambda x, w: jax.lax.map(lambda row: row @ w, x),
        lambda x, w: jax.vmap(lambda row: jax.jit(jnp.dot)(w.T, row))(x),
        lambda x, w: jnp.matmul(*jax.lax.optimization_barrier((x, w))),
    ],
    ids=["jit", "checkpoint", "custom_vjp", "custom_jvp", "vmap", "map", "nested", "barrier"],
)
def test_functions_that_are_called_are_looked_into(product):
    assert costs(lambda w, x: product(x, w), (3, 5), (4, 3)) == 2


def test_constants_of_the_batch_are_no_activations():
    """Batch normalisation in evaluation mode is one multiplication and one addition."""

    def predict(p, x, statistics):
        factor = p["scale"] / jnp.sqrt(statistics["variance"] + 1e-5)
        return (x - statistics["mean"]) * factor + p["bias"]

    statistics = {"mean": (3,), "variance": (3,)}
    assert costs(predict, {"scale": (3,), "bias": (3,)}, (4, 6, 3), statistics) == {
        "scale": 6,
        "bias": 6,
    }


class Network(nn.Module):
    """A convolution, batch normalisation, attention and a readout."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), strides=2)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = x.reshape(len(x), -1, 8)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return nn.Dense(10)(x.mean(1))


def test_flax_linen_model():
    network = Network()
    x = jnp.ones((4, 8, 8, 3))
    variables = jax.eval_shape(network.init, jax.random.key(0), x)
    predict = lambda params, x, constants: network.apply({"params": params, **constants}, x)
    constants = {"batch_stats": variables["batch_stats"]}
    model = flj.Model(predict, flj.likelihoods.categorical())
    # shapes and dtypes suffice
    made = weight_costs(model, variables["params"], (x, None, constants))
    assert jax.tree.structure(made) == jax.tree.structure(variables["params"])
    positions = 16
    named = {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in _paths(made)}
    attention = {name: named.pop(name) for name in list(named) if "Attention" in name}
    assert named == {
        "Conv_0/kernel": 2 * positions,
        "Conv_0/bias": positions,
        "BatchNorm_0/scale": positions,
        "BatchNorm_0/bias": positions,
        "LayerNorm_0/scale": positions,
        "LayerNorm_0/bias": positions,
        "Dense_0/kernel": 2,
        "Dense_0/bias": 1,
    }
    assert len(attention) == 8
    for name, cost in attention.items():
        assert cost == (2 * positions if name.endswith("kernel") else positions)


def _paths(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def test_bytes_are_those_of_the_dtype(x64):
    dtypes = {"a": "bfloat16", "b": "float16", "c": "float32", "d": "float64"}
    params = {name: jnp.ones((2, 3), dtype) for name, dtype in dtypes.items()}
    made = weight_costs(None, params, None, unit="bytes")
    assert made == {"a": 2, "b": 2, "c": 4, "d": 8}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes_cost_the_same_operations(x64, dtype):
    model = flj.Model(lambda w, x: x @ w, GAUSSIAN)
    params, batch = jnp.ones((3, 5), dtype), (np.ones((4, 3), np.float32), None)
    assert weight_costs(model, params, batch) == 2


def test_the_model_is_not_run():
    def predict(w, x):
        jax.debug.callback(lambda w, x: pytest.fail("the model was run"), w, x)
        return x @ w

    assert costs(predict, (3, 5), (4, 3)) == 2
    jax.effects_barrier()


SHAPES = {"unit": "flops", "params": {"w": jnp.ones((3, 3))}, "inputs": jnp.ones((4, 3))}


def _until(w, x):
    return jax.lax.while_loop(lambda h: h.sum() < 9, lambda h: h @ w["w"], x)


def _solve(w, x):
    return jax.lax.linalg.triangular_solve(w["w"], x[:3], left_side=True)


def _host(w, x):
    return jax.pure_callback(lambda w, x: x @ w, x, w["w"], x)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"unit": "seconds"}, "unit must be one of flops, bytes, got 'seconds'"),
        ({"inputs": jnp.ones((0, 3))}, "batch must have inputs with a leading axis of examples"),
        ({"inputs": jnp.ones(())}, "batch must have inputs with a leading axis"),
        ({"inputs": {}}, "batch must have inputs with a leading axis of examples, got \\[\\]"),
        ({"predict": _until}, "model: 'w' meets activations in a while loop.*use jax.lax.scan"),
        ({"predict": _solve}, "model: cannot count the operations of 'triangular_solve'.*'w'"),
        ({"predict": _host}, "model: cannot count the operations of 'pure_callback'.*bytes"),
    ],
)
def test_bad_arguments(given, message):
    given = {"predict": lambda p, x: x @ p["w"], **SHAPES, **given}
    model = flj.Model(given["predict"], GAUSSIAN)
    with pytest.raises(ValueError, match=message):
        weight_costs(model, given["params"], (given["inputs"], None), unit=given["unit"])


@pytest.mark.parametrize("unit", ["flops", "bytes"])
def test_a_list_of_batches_is_refused(unit):
    model = flj.Model(lambda p, x: x @ p["w"], GAUSSIAN)
    with pytest.raises(ValueError, match="batch must be a tuple .*, got a list"):
        weight_costs(model, SHAPES["params"], [(SHAPES["inputs"], None)], unit=unit)


def test_while_loops_without_weights_are_fine():
    def predict(w, x):
        x = jax.lax.while_loop(lambda h: h.sum() < 9, lambda h: 2 * h, x)
        return x @ jax.lax.while_loop(lambda w: w.sum() < 9, lambda w: 2 * w, w)

    assert costs(predict, (3, 5), (4, 3)) == 2
