"""ONNX files: the outputs of JAX in onnxruntime, zeros inside, and 2:4 where TensorRT wants it.

Slow because jax2onnx takes fifteen seconds to load before its first conversion.
"""

from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest

import fishleg_jax as flj
from experiments.models.specs import MODELS
from fishleg_jax.export import _onnx

pytestmark = pytest.mark.slow


def initializers(path):
    return {x.name: onnx.numpy_helper.to_array(x) for x in onnx.load(path).graph.initializer}


def outputs(path, *inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    return session.run(None, dict(zip(names, map(np.asarray, inputs), strict=True)))


@pytest.mark.parametrize("name", ["cnn", "mlp", "resnet20", "transformer"])
def test_networks_of_the_experiments(tmp_path, name):
    spec, path = MODELS[name], tmp_path / "net.onnx"
    params, constants = jax.jit(spec.init)(jax.random.key(0))
    further = (constants,) if constants else ()
    predict = lambda params, x: spec.model.predict(params, x, *further)
    random = jax.random.randint(jax.random.key(1), (3, *spec.input_shape), 0, 65)
    x = random if spec.input_dtype == jnp.int32 else random / 65
    masks = jax.tree.map(
        lambda w: jnp.arange(w.size).reshape(w.shape) % 10 < (10 if w.ndim < 2 else 1), params
    )
    assert flj.export.to_onnx(predict, params, x, path, masks) < 1e-5
    pruned = flj.apply_masks(params, masks)
    (found,) = outputs(path, x[:2])
    np.testing.assert_allclose(found, predict(pruned, x[:2]), atol=1e-5)
    # zeros are in the file, and masks are not
    kernels = {str(sorted(w.shape)): w for w in jax.tree.leaves(pruned) if w.ndim >= 2}
    stored = [x for x in initializers(path).values() if str(sorted(x.shape)) in kernels]
    assert stored and sum(x.size for x in stored) <= sum(w.size for w in jax.tree.leaves(params))
    assert sum((x != 0).sum() for x in stored) < 0.12 * sum(x.size for x in stored)


def test_jax_numpy_is_afterwards_as_it_was(tmp_path):
    """jax2onnx leaves a `cumsum` behind that takes no axis by position."""
    before = dict(vars(jnp))
    for _ in range(2):
        x = jnp.ones((2, 3))
        flj.export.to_onnx(
            lambda p, x: jnp.cumsum(x * p, axis=1), jnp.ones(3), x, tmp_path / "net.onnx"
        )
        assert [name for name, value in before.items() if vars(jnp)[name] is not value] == []
        assert jnp.cumsum(x, 0)[1].tolist() == [2.0, 2.0, 2.0]


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), name="conv")(x))
        return nn.Dense(5, name="fc")(x.mean((1, 2)) @ jnp.ones((6, 8)))


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5)(nn.relu(nn.Dense(20)(x)))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5)(nn.MultiHeadDotProductAttention(2)(x).mean(1))


def with_einsum(params, x):
    hidden = jnp.tanh(jnp.einsum("bi,ij->bj", x, params["in"]))
    return jnp.einsum("bj,jk->bk", hidden, params["out"])


def network(name):
    """Function, parameters and inputs."""
    keys = jax.random.split(jax.random.key(0), 3)
    if name == "einsum":
        params = {
            "in": jax.random.normal(keys[0], (12, 20)),
            "out": jax.random.normal(keys[1], (20, 5)),
        }
        return with_einsum, params, jax.random.normal(keys[2], (4, 12))
    module, shape = {
        "dense": (Dense, (12,)),
        "conv": (ConvNet, (5, 5, 8)),
        "attention": (Attention, (5, 12)),
    }[name]
    x = jax.random.normal(keys[0], (4, *shape))
    params = module().init(keys[1], x)["params"]
    return lambda params, x: module().apply({"params": params}, x), params, x


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("name", ["dense", "conv", "attention", "einsum"])
def test_decomposed_networks(tmp_path, name, jitted):
    """jax2onnx replaces layers of flax by operations that know nothing of factors."""
    predict, params, x = network(name)
    model = flj.Model(predict, flj.likelihoods.categorical())
    small = flj.low_rank.decompose(model, params, [(x, None)], 0.6, metric="identity")
    function = jax.jit(small.model.predict) if jitted else small.model
    path = tmp_path / "net.onnx"
    assert flj.export.to_onnx(function, small.params, x, path) < 1e-6
    (found,) = outputs(path, x[:3])
    np.testing.assert_allclose(found, small.model.predict(small.params, x[:3]), atol=1e-5)
    # the factors are in the file, and none of the kernels that they take the place of
    sizes = Counter(x.size for x in jax.tree.leaves(small.params) if x.ndim > 1)
    stored = Counter(x.size for x in initializers(path).values() if x.ndim > 1)
    replaced = {row.weights[0] for row in small.report.rows if row.form is not None}
    assert replaced and sizes <= stored and not (replaced - set(sizes)) & set(stored)


@pytest.mark.parametrize("name", ["dense", "conv", "attention"])
def test_decomposed_networks_compile_and_are_sparse(tmp_path, name):
    predict, params, x = network(name)
    model = flj.Model(predict, flj.likelihoods.categorical())
    small = flj.low_rank.decompose(model, params, [(x, None)], 0.6, metric="identity")
    flj.export.save_function(tmp_path / "net", small.model, small.params, x)
    found = flj.export.load_function(tmp_path / "net")(x[:3])
    np.testing.assert_allclose(found, small.model.predict(small.params, x[:3]), atol=1e-6)

    masks = jax.tree.map(lambda w: jnp.arange(w.size).reshape(w.shape) % 2 == 0, small.params)
    measure = lambda *key: flj.export.MatmulTimes(dense=2e-6, sparse=1e-6)
    sparse = flj.export.sparse_apply(small.model, small.params, x, masks, measure=measure)
    factors = [layer for layer in sparse.layers if layer.sparse and layer.name.endswith("left")]
    assert factors or name == "conv"  # whose factors are convolutions, which stay dense
    pruned = flj.apply_masks(small.params, masks)
    np.testing.assert_allclose(sparse(x), small.model.predict(pruned, x), atol=1e-5)


def test_networks_in_another_basis(tmp_path):
    predict, params, x = network("conv")
    basis = flj.bases.dct()
    spectral = flj.bases.in_basis(flj.Model(predict, flj.likelihoods.categorical()), basis)
    coefficients, path = basis.coefficients(params), tmp_path / "net.onnx"
    assert flj.export.to_onnx(spectral, coefficients, x, path) < 1e-6
    (found,) = outputs(path, x[:3])
    np.testing.assert_allclose(found, predict(params, x[:3]), atol=1e-5)


def test_a_function_that_decides_by_shapes(tmp_path):
    """jax2onnx has `jnp.shape` return traced numbers."""
    predict = lambda w, x: x @ w if jnp.shape(w)[0] > 2 else x
    path = tmp_path / "net.onnx"
    assert flj.export.to_onnx(predict, jnp.ones((3, 2)), jnp.ones((2, 3)), path) < 1e-6


def test_functions_under_jit_run_afterwards(tmp_path):
    """As do functions inside of them: `jit` keeps what jax2onnx traced, which XLA does not know."""
    predict, params, x = network("dense")
    turned = jax.jit(lambda w: jnp.einsum("ij->ji", w))

    @jax.jit
    def run(params, x):
        return predict(params, x) @ turned(jnp.ones((3, 5)))

    for dynamic in (False, True):
        flj.export.to_onnx(run, params, x, tmp_path / "net.onnx", dynamic_batch=dynamic)
        expected = predict(params, x).sum(-1, keepdims=True).repeat(3, -1)
        np.testing.assert_allclose(run(params, x), expected, atol=1e-5)
        np.testing.assert_allclose(turned(jnp.ones((3, 5))), np.ones((5, 3)))


def test_inputs_in_a_dictionary_and_a_fixed_batch(tmp_path):
    path, params = tmp_path / "net.onnx", jnp.arange(6.0).reshape(3, 2)
    example = ({"x": jnp.ones((2, 3)), "y": jnp.ones((2, 2))},)
    add = lambda w, batch: {"sum": batch["x"] @ w + batch["y"]}
    assert flj.export.to_onnx(add, params, example, path, dynamic_batch=False) < 1e-5
    (found,) = outputs(path, jnp.eye(3)[:2], jnp.zeros((2, 2)))
    np.testing.assert_allclose(found, params[:2])


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.float16])
def test_inputs_of_numpy_have_the_dtypes_that_jax_gives_them(tmp_path, dtype):
    """As in the other functions of `export`; arrays, and scalars of Python beside them."""
    path, params = tmp_path / "net.onnx", jnp.arange(6.0).reshape(3, 2)
    x = np.arange(6).reshape(2, 3).astype(dtype)
    scaled = lambda w, x, scale: x.astype(jnp.float32) @ w * scale
    assert flj.export.to_onnx(scaled, params, (x, 2.0), path) < 1e-5
    own = jnp.asarray(x)
    (found,) = outputs(path, own[:1], np.float32(2))
    np.testing.assert_allclose(found, scaled(params, own[:1], 2.0), rtol=1e-6)


def test_two_of_four_along_the_axis_of_the_sum(tmp_path):
    """Of an HWIO kernel along I, of an (in, out) kernel along in, after the conversion."""
    x, path = jnp.ones((1, 5, 5, 8)), tmp_path / "net.onnx"
    params = ConvNet().init(jax.random.key(0), x)["params"]
    predict = lambda params, x: ConvNet().apply({"params": params}, x)
    along = lambda w, axis: jnp.broadcast_to(
        jnp.expand_dims(
            jnp.arange(w.shape[axis]) % 4 < 2, [i for i in range(w.ndim) if i != axis % w.ndim]
        ),
        w.shape,
    )
    good = jax.tree.map(lambda w: along(w, -2) if w.ndim > 1 else jnp.ones(w.shape, bool), params)
    flj.export.to_onnx(predict, params, x, path, good)
    rows = {row.operator: row for row in flj.export.two_four_layout(path) if row.dense_groups == 0}
    assert rows["Conv"].shape == (6, 8, 3, 3) and rows["Conv"].axis == 1
    assert rows["Conv"].groups == 6 * 9 * 2 and rows["Conv"].is_two_four
    assert rows["Gemm"].groups == 5 * 2 and rows["Gemm"].is_two_four

    flj.export.to_onnx(predict, params, x, path)
    dense = flj.export.two_four_layout(path)
    assert not any(row.is_two_four for row in dense)
    assert {row.dense_groups for row in dense if row.operator == "Conv"} == {108}


def test_a_kernel_that_four_does_not_divide(tmp_path):
    path = tmp_path / "net.onnx"
    flj.export.to_onnx(lambda w, x: x @ w, jnp.ones((6, 3)), jnp.ones((2, 6)), path)
    (row,) = flj.export.two_four_layout(path)
    assert (row.shape, row.groups, row.dense_groups, row.left) == ((6, 3), 3, 3, 6)
    assert not row.is_two_four and "\n" not in repr(row)


def conv(x, kernel):
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)


def test_a_convolution_of_lax_has_its_kernel_as_the_operator_reads_it(tmp_path):
    path, keys = tmp_path / "net.onnx", jax.random.split(jax.random.key(0), 3)
    params = {"c": jax.random.normal(keys[0], (3, 2, 8, 4)), "o": jnp.ones((4, 3))}
    masks = {"c": jnp.arange(8)[:, None] % 4 < 2, "o": jnp.ones((4, 3), bool)}
    masks["c"] = jnp.broadcast_to(masks["c"], params["c"].shape)
    x = jax.random.normal(keys[1], (2, 5, 5, 8))
    predict = lambda p, x: jax.nn.relu(conv(x, p["c"])).mean((1, 2)) @ p["o"]
    flj.export.to_onnx(predict, params, x, path, masks)
    first, second = flj.export.two_four_layout(path)
    assert (first.operator, first.shape, first.axis) == ("Conv", (4, 8, 3, 2), 1)
    assert first.is_two_four and second.operator == "Gemm"
    wanted = jnp.where(masks["c"], params["c"], 0).transpose(3, 2, 0, 1)
    np.testing.assert_array_equal(initializers(path)[first.name], wanted)
    onnx.checker.check_model(path, full_check=True)
    # the kernel is there once: nothing is left of the one before
    assert sum(x.size == wanted.size for x in initializers(path).values()) == 1


def test_transposed_and_cast_kernels_are_stored_as_they_are_read(tmp_path):
    path, x = tmp_path / "net.onnx", jnp.ones((2, 8))
    params = [jnp.ones((6, 8)), jnp.ones(36), jnp.ones((6, 5), jnp.bfloat16)]
    predict = lambda p, x: x @ p[0].T @ p[1].reshape(6, 6).T @ p[2].astype(jnp.float32)
    flj.export.to_onnx(predict, params, x, path)
    rows = flj.export.two_four_layout(path)
    assert [row.shape for row in rows] == [(8, 6), (6, 6), (6, 5)]
    assert not any(row.computed for row in rows)
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert operators.isdisjoint({"Transpose", "Reshape", "Cast"})


def scanned(params, x):
    return jax.lax.scan(lambda h, w: (h @ w, None), x, params)[0]


def recurrent(params, x):
    """Multiplies the kernel, which the loop hands on, by a state that starts from a constant."""
    step = lambda h, x: (jnp.tanh(h) @ params[0] + x, None)
    return jax.lax.scan(step, jnp.zeros((2, 8)), jnp.stack([x, x]))[0]


@pytest.mark.parametrize(
    "predict, computed",
    [
        (lambda params, x: x @ params[0] @ params[0].T, [False, True]),
        (scanned, [True]),
        (lambda params, x: jax.lax.cond(x.sum() > 0, *[lambda: x @ params[0]] * 2), [False] * 2),
        (lambda params, x: (x @ params[0]) @ (x @ params[1]).T, [False, False]),
        (recurrent, [True]),
    ],
    ids=["two readers", "scan", "branches", "attention", "recurrent"],
)
def test_every_kernel_has_a_row(tmp_path, predict, computed):
    params, x = jnp.ones((2, 8, 8)), jnp.ones((2, 8))
    path, arrays = tmp_path / "net.onnx", tuple(params)
    flj.export.to_onnx(
        predict, params if predict is scanned else arrays, x, path, dynamic_batch=False
    )
    rows = flj.export.two_four_layout(path)
    assert [row.computed for row in rows] == computed
    assert not any(row.is_two_four for row in rows)
    assert [row.shape for row in rows] == [() if row.computed else (8, 8) for row in rows]


NARROW = jnp.ones((3, 2), jnp.bfloat16)


@pytest.mark.parametrize(
    "predict, params, message",
    [
        (lambda w, x: x @ w, NARROW, "lacks operators for bfloat16; cast to float32"),
        (
            lambda w, x: x.reshape(len(x), -1) @ w,
            jnp.ones((3, 2)),
            r"for any batch size; write x.shape\[0\] instead of len\(x\), or fix the size with "
            "dynamic_batch=False",
        ),
    ],
)
def test_errors_name_the_cause_once(tmp_path, predict, params, message):
    with pytest.raises(ValueError, match=message) as caught:
        flj.export.to_onnx(predict, params, jnp.ones((2, 3)), tmp_path / "net.onnx")
    text = str(caught.value)
    assert ("batch" in text) == ("len" in message)
    assert text.count("; ") == 1 and not list(tmp_path.iterdir())


def test_outputs_that_differ_are_refused(tmp_path, monkeypatch):
    """At a difference that was let through before."""
    real = _onnx._outputs
    monkeypatch.setattr(_onnx, "_outputs", lambda *args: [x * (1 + 3e-5) for x in real(*args)])
    with pytest.raises(ValueError, match="outputs differ by 3e-05 of the largest"):
        flj.export.to_onnx(lambda w, x: x @ w, jnp.ones((3, 2)), jnp.ones((2, 3)), tmp_path / "f")


def test_what_cannot_be_converted_is_refused(tmp_path):
    path = tmp_path / "net.onnx"
    called = lambda w, x: jax.pure_callback(np.sin, jax.ShapeDtypeStruct((2, 3), jnp.float32), x)
    with pytest.raises(ValueError, match="function can't be converted to ONNX"):
        flj.export.to_onnx(called, jnp.ones(2), jnp.ones((2, 3)), path, dynamic_batch=False)
    with pytest.raises(ValueError, match="example_inputs must have at least one array"):
        flj.export.to_onnx(called, jnp.ones(2), (), path)
    with pytest.raises(ValueError, match="masks must have the structure"):
        flj.export.to_onnx(called, jnp.ones(2), jnp.ones((2, 3)), path, {"w": True})
    assert not list(tmp_path.iterdir())
    path.write_text("hello")
    with pytest.raises(ValueError, match="can't be read as ONNX"):
        flj.export.two_four_layout(path)
