"""ONNX files: the outputs of JAX in onnxruntime, zeros inside, and 2:4 where TensorRT wants it.

Slow because jax2onnx takes fifteen seconds to load before its first conversion.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest

import fishleg_jax as flj
from experiments.models.specs import MODELS

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


def test_inputs_in_a_dictionary_and_a_fixed_batch(tmp_path):
    path, params = tmp_path / "net.onnx", jnp.arange(6.0).reshape(3, 2)
    example = ({"x": jnp.ones((2, 3)), "y": jnp.ones((2, 2))},)
    add = lambda w, batch: {"sum": batch["x"] @ w + batch["y"]}
    assert flj.export.to_onnx(add, params, example, path, dynamic_batch=False) < 1e-5
    (found,) = outputs(path, jnp.eye(3)[:2], jnp.zeros((2, 2)))
    np.testing.assert_allclose(found, params[:2])


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), name="conv")(x))
        return nn.Dense(5, name="fc")(x.mean((1, 2)) @ jnp.ones((6, 8)))


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
