"""ResNet-50 as Keras computes it, on two small blocks, against loops in numpy."""

import numpy as np
import pytest

from experiments.imagenet import evaluation as imagenet_run
from experiments.imagenet import photos as imagenet_data
from experiments.imagenet import resnet50
from experiments.running import files

CLASSES, BASE, SIZE = 5, 2, 20


@pytest.fixture
def small(monkeypatch):
    """Weights of two stages, the second one at stride 2."""
    monkeypatch.setattr(resnet50, "BLOCKS", {"2": "ab", "3": "a"})
    rng = np.random.default_rng(0)
    entries = {
        name: rng.uniform(0.5, 1.5, shape) if "var" in name else rng.normal(size=shape)
        for name, shape in resnet50.shapes(BASE, CLASSES).items()
    }
    images = rng.normal(size=(3, SIZE, SIZE, 3)).astype(np.float32)
    return entries, images


def convolved(x, entries, name, stride=1, padding=0):
    kernel, bias = entries[f"{name}/kernel"], entries[f"{name}/bias"]
    x = np.pad(x, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    rows, columns = kernel.shape[:2]
    height, width = ((n - rows) // stride + 1 for n in x.shape[1:3])
    out = np.zeros((len(x), height, width, kernel.shape[3]))
    for i in range(height):
        for j in range(width):
            window = x[:, i * stride : i * stride + rows, j * stride : j * stride + columns]
            out[:, i, j] = np.einsum("bhwi,hwio->bo", window, kernel)
    return out + bias


def normed(x, entries, name, stored):
    mean, variance = entries[f"{name}/moving_mean"], entries[f"{name}/moving_variance"]
    if not stored:
        mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (
        entries[f"{name}/gamma"] * (x - mean) / np.sqrt(variance + 1e-3) + entries[f"{name}/beta"]
    )


def by_keras(entries, x, stored=True):
    """`keras.applications.resnet50` of before 2.2, line by line."""

    def conv_norm(x, name, **how):
        return normed(convolved(x, entries, f"res{name}", **how), entries, f"bn{name}", stored)

    def block(x, name, stride, shortcut):
        y = np.maximum(conv_norm(x, f"{name}2a", stride=stride), 0)
        y = np.maximum(conv_norm(y, f"{name}2b", padding=1), 0)
        y = conv_norm(y, f"{name}2c")
        return np.maximum(y + (conv_norm(x, f"{name}1", stride=stride) if shortcut else x), 0)

    x = normed(convolved(x, entries, "conv1", stride=2, padding=3), entries, "bn_conv1", stored)
    x = np.pad(np.maximum(x, 0), [(0, 0), (1, 1), (1, 1), (0, 0)])
    side = (x.shape[1] - 3) // 2 + 1
    windows = [
        [x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3] for j in range(side)] for i in range(side)
    ]
    x = np.stack([np.stack([w.max((1, 2)) for w in row], 1) for row in windows], 1)
    x = block(x, "2a_branch", 1, True)
    x = block(x, "2b_branch", 1, False)
    x = block(x, "3a_branch", 2, True)
    return x.mean((1, 2)) @ entries["fc1000/kernel"] + entries["fc1000/bias"]


@pytest.mark.slow
def test_logits_are_those_of_keras(small):
    entries, images = small
    params, constants = resnet50.tree_of(entries)
    got = resnet50.predict(params, images, constants)
    np.testing.assert_allclose(got, by_keras(entries, images), rtol=2e-4, atol=2e-3)


def test_statistics_of_a_batch_take_the_place_of_those_stored(small):
    entries, images = small
    params, constants = resnet50.tree_of(entries)
    logits, found = resnet50.by_batch(params, images, constants)
    np.testing.assert_allclose(
        logits, by_keras(entries, images, stored=False), rtol=1e-3, atol=5e-3
    )
    again = resnet50.predict(params, images, found)
    np.testing.assert_allclose(again, logits, rtol=1e-3, atol=5e-3)
    first = convolved(images, entries, "conv1", stride=2, padding=3)
    np.testing.assert_allclose(
        found["bn_conv1"]["moving_variance"], first.var((0, 1, 2)), rtol=1e-4
    )
    np.testing.assert_array_equal(found["bn_conv1"]["gamma"], constants["bn_conv1"]["gamma"])


def test_pixels_become_bgr_without_the_mean():
    pixels = np.array([[[[255, 10, 0]]]], np.uint8)
    expected = [[[[0 - 103.939, 10 - 116.779, 255 - 123.68]]]]
    got = resnet50.preprocess(pixels)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert got.dtype == np.float32


def test_all_weights_are_counted():
    shapes = resnet50.shapes()
    kernels = {name: np.prod(s) for name, s in shapes.items() if name.endswith("kernel")}
    trained = [np.prod(s) for name, s in shapes.items() if "moving" not in name]
    assert sum(trained) == 25_583_592  # what Keras says of trainable parameters
    assert len(kernels) == 54 and sum(kernels.values()) == 25_502_912


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.pop("conv1/bias"), "conv1/bias is missing, expected"),
        (lambda e: e.update({"conv1/bias": np.zeros(3)}), "conv1/bias has shape"),
        (lambda e: e.update({"conv1/bias": np.full(BASE, np.nan)}), "not finite"),
        (lambda e: e.update({"other/bias": np.zeros(3)}), "other/bias is unknown"),
    ],
)
def test_weights_of_another_network_are_refused(small, tmp_path, monkeypatch, change, message):
    entries, _ = small
    expected = resnet50.shapes(BASE, CLASSES)
    monkeypatch.setattr(resnet50, "shapes", lambda: expected)
    path = tmp_path / "weights.npz"
    np.savez(path, **entries)
    params, _ = resnet50.load(path)
    np.testing.assert_allclose(params["conv1"]["kernel"], entries["conv1/kernel"], rtol=1e-6)
    change(entries)
    np.savez(path, **entries)
    with pytest.raises(ValueError, match=message):
        resnet50.load(path)


def test_missing_weights_are_named_with_what_makes_them(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.npz are missing.*prepare.py resnet50"):
        resnet50.load(tmp_path / "nowhere.npz")


@pytest.mark.slow
def test_the_real_network_knows_real_photos():
    path = resnet50.folder() / resnet50.FILE
    try:
        tar = files.shared(imagenet_data.TARS["validation"])
        params, constants = resnet50.load(path)
    except ValueError as error:
        pytest.skip(str(error))
    pixels, labels = imagenet_data.read_tar(tar, 16, resnet50.SIZE).read(range(16))
    logits = resnet50.predict(params, resnet50.preprocess(pixels), constants)
    ranks = np.asarray(imagenet_run.ranks(logits, labels))
    # three quarters of all photos are right: fewer than eight of 16 are one chance in a hundred
    assert (ranks == 0).sum() >= 8 and (ranks < 5).sum() >= 12
