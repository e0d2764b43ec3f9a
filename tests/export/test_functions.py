"""Functions on disk: JAX alone reads them, for any batch, and a damaged file is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj

PARAMS = {"w": jnp.arange(6.0).reshape(3, 2) - 2, "b": jnp.ones(2)}


def predict(params, x):
    return jnp.tanh(x @ params["w"] + params["b"])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("function") / "net.stablehlo"
    flj.export.save_function(path, predict, PARAMS, jnp.ones((1, 3)))
    return path


@pytest.mark.parametrize("batch", [1, 5])
def test_any_batch(path, batch):
    x = jax.random.normal(jax.random.key(0), (batch, 3))
    np.testing.assert_allclose(flj.export.load_function(path)(x), predict(PARAMS, x), atol=1e-6)


def test_jax_alone_reads_it(path):
    """The checksum behind the function is passed over."""
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    x = jnp.ones((4, 3))
    np.testing.assert_allclose(exported.call(x), predict(PARAMS, x), atol=1e-6)


def test_masks_and_several_inputs(tmp_path):
    def scaled(params, batch, scale):
        return {"y": (batch["x"] @ params["w"]) * scale}

    masks = {"w": jnp.array([[True, False]] * 3), "b": jnp.zeros(2, bool)}
    example = ({"x": jnp.ones((1, 3))}, jax.ShapeDtypeStruct((), jnp.float32))
    flj.export.save_function(tmp_path / "f", scaled, PARAMS, example, masks)
    found = flj.export.load_function(tmp_path / "f")({"x": jnp.ones((2, 3))}, jnp.float32(2))
    np.testing.assert_allclose(found["y"], [[0, 0]] * 2)  # -2 + 0 + 2, and pruned
    found = flj.export.load_function(tmp_path / "f")({"x": jnp.eye(3)}, jnp.float32(1))
    np.testing.assert_allclose(found["y"], [[-2, 0], [0, 0], [2, 0]])


def test_a_fixed_batch(tmp_path):
    def halves(params, x):
        return jnp.stack([part.sum() * params for part in jnp.split(x, 2)])

    with pytest.raises(ValueError, match="function can't be exported for any batch size"):
        flj.export.save_function(tmp_path / "f", halves, jnp.ones(()), jnp.ones((4, 3)))
    assert not list(tmp_path.iterdir())
    flj.export.save_function(
        tmp_path / "f", halves, jnp.ones(()), jnp.ones((4, 3)), dynamic_batch=False
    )
    found = flj.export.load_function(tmp_path / "f")(jnp.ones((4, 3)))
    np.testing.assert_allclose(found, [6, 6])


def test_damaged_files_are_refused(path, tmp_path):
    content, damaged = path.read_bytes(), tmp_path / "damaged"
    for length in range(0, len(content), 97):
        damaged.write_bytes(content[:length])
        with pytest.raises(ValueError, match="path: '.*damaged' can't be read as a function"):
            flj.export.load_function(damaged)
    for i in range(0, len(content), 97):
        damaged.write_bytes(content[:i] + bytes([content[i] ^ 4]) + content[i + 1 :])
        with pytest.raises(ValueError, match="path: '.*damaged' can't be read as a function"):
            flj.export.load_function(damaged)
    with pytest.raises(ValueError, match="nothing"):
        flj.export.load_function(tmp_path / "nothing")


@pytest.mark.parametrize(
    "example, options, message",
    [
        ((), {}, "example_inputs must have at least one array"),
        (jnp.ones((1, 3)), {"masks": {"w": jnp.ones(3, bool)}}, "masks must have the structure"),
    ],
)
def test_bad_input_gets_one_sentence(tmp_path, example, options, message):
    with pytest.raises(ValueError, match=message):
        flj.export.save_function(tmp_path / "f", predict, PARAMS, example, **options)
    assert not list(tmp_path.iterdir())
