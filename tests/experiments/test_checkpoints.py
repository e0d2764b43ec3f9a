"""Checkpoints: what doesn't fit is refused by name; the stored ones are as good as said."""

import jax
import numpy as np
import pytest

from experiments.data import datasets as data
from experiments.models import checkpoints, training
from experiments.models.specs import MODELS
from experiments.running import files

MLPNET = MODELS["mlpnet"]
SHAPES = {"fc1": (40, 784), "fc2": (20, 40), "fc3": (10, 20)}


def entries(**changes):
    arrays = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()} | changes
    return {name: array for name, array in arrays.items() if array is not None}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"fc2": np.ones((40, 20))}, r"entry fc2 has shape \(40, 20\), expected \(20, 40\)"),
        ({"fc3": None}, r"entry fc3.weight is missing, expected one of shape \(10, 20\)"),
        ({"fc4": np.ones(3)}, r"entry fc4 of shape \(3,\) is unknown"),
        ({"fc1": np.full((40, 784), np.nan)}, "entry fc1 .* expected finite floats"),
        ({"fc1": np.ones((40, 784), int)}, "entry fc1 is of type int64"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, changes, message):
    path = tmp_path / "weights.npz"
    np.savez(path, **entries(**changes))
    with pytest.raises(ValueError, match=message):
        checkpoints.load(path, MLPNET)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "weights.npz"
    with pytest.raises(ValueError, match="does not exist"):
        checkpoints.load(path, MLPNET)
    for content in (b"", b"not an npz file", b"PK\x03\x04 broken"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not an npz file"):
            checkpoints.load(path, MLPNET)
    with open(path, "wb") as file:
        np.save(file, np.ones(3))  # a single array, though its name ends in npz
    with pytest.raises(ValueError, match="is not an npz file"):
        checkpoints.load(path, MLPNET)


def test_torch_layout_is_transposed(tmp_path):
    path = tmp_path / "weights.npz"
    kernel = np.arange(800, dtype=np.float32).reshape(20, 40)
    np.savez(path, **entries(fc2=kernel))
    params, constants = checkpoints.load(path, MLPNET)
    np.testing.assert_array_equal(params["fc2"]["kernel"], kernel.T)
    assert constants == {}


def test_saved_weights_come_back(tmp_path):
    spec = MODELS["resnet20"]
    shapes = jax.eval_shape(spec.init, jax.random.key(0))
    draw = np.random.default_rng(0).normal
    saved = jax.tree.map(lambda x: draw(size=x.shape).astype(np.float32), shapes)
    loaded = checkpoints.load(checkpoints.save(tmp_path / "weights.npz", *saved), spec)
    jax.tree.map(np.testing.assert_array_equal, loaded, saved)


@pytest.mark.parametrize(
    "name, accuracy",
    [("mlpnet", 93.97), pytest.param("resnet20", 91.43, marks=pytest.mark.slow)],
)
def test_stored_checkpoints_reach_their_accuracy(name, accuracy):
    spec = MODELS[name]
    try:
        weights = checkpoints.load(files.shared(spec.checkpoint), spec)
        test = data.load(spec.dataset).test
    except ValueError as error:
        pytest.skip(str(error))
    params, constants = weights
    assert training.evaluate(spec.model, params, test, constants)[0] == pytest.approx(
        accuracy, abs=0.011 if name == "mlpnet" else 0.1
    )
