"""CURVES: strokes where they should be, always the same ones, and kept on disk."""

import numpy as np
import pytest

from experiments.data import curves, datasets
from experiments.models.specs import MODELS


def straight(begin, end):
    begin, end = np.array(begin, float), np.array(end, float)
    return curves.strokes(np.stack([begin, (begin + end) / 2, end])[None])[0]


def test_a_straight_stroke_has_ink_of_one_along_it_whatever_its_length():
    for end in (12, 20, 24):
        image = straight((14, 4), (14, end))
        np.testing.assert_allclose(image[14, 7 : end - 2], 1, atol=0.01)
        across = np.exp(-0.5 * (np.arange(28) - 14) ** 2 / curves.BRUSH**2)
        np.testing.assert_allclose(image[:, 8], across, atol=0.01)
        assert image[:, :2].max() < 0.02 and image[:, end + 3 :].max() < 0.02


def test_a_stroke_goes_through_its_three_points():
    points = np.array([[[4.0, 5.0], [20.0, 13.0], [9.0, 22.0]]])
    image = curves.strokes(points)[0]
    for row, column in points[0].astype(int):
        assert image[row, column] > 0.4
    assert image[5, 13] < 0.05  # the straight way from end to end is empty


def test_turned_points_give_a_turned_image():
    points = np.random.default_rng(1).uniform(3, 24, (5, 3, 2))
    turned = curves.strokes(points[..., ::-1])
    np.testing.assert_allclose(turned, curves.strokes(points).swapaxes(1, 2), atol=1e-6)


def test_images_follow_from_the_seed_alone(monkeypatch):
    images = curves.draw(7, seed=3)
    assert images.shape == (7, 28, 28) and images.dtype == np.uint8
    monkeypatch.setattr(curves, "CHUNK", 2)
    np.testing.assert_array_equal(curves.draw(7, seed=3), images)
    np.testing.assert_array_equal(curves.draw(5, seed=3), images[:5])
    assert (curves.draw(7, seed=4) != images).any(axis=(1, 2)).all()
    assert images.max(axis=(1, 2)).min() > 150  # there is something in each


def test_a_data_set_is_kept_and_found_again(tmp_path, monkeypatch):
    cache = tmp_path / "curves.npy"
    train, test = curves.load(cache, 6, 4)
    assert train[0].shape == (6, 28, 28, 1) and test[1].shape == (4, 784)
    assert train[0].dtype == np.float32 and 0 <= train[0].min() < train[0].max() <= 1
    np.testing.assert_array_equal(train[0].reshape(6, 784), train[1])
    with monkeypatch.context() as patch:
        patch.setattr(curves, "draw", lambda *_: pytest.fail("drawn again"))
        again = curves.load(cache, 6, 4)
    np.testing.assert_array_equal(again[1][0], test[0])
    assert len(curves.load(cache, 7, 4)[0][0]) == 7  # another number is drawn anew
    cache.write_text("no images")
    with pytest.raises(ValueError, match="curves.npy has no curves"):
        curves.load(cache, 6, 4)


def test_the_auto_encoder_is_that_of_the_papers(monkeypatch):
    monkeypatch.setattr(curves, "EXAMPLES", 3)
    monkeypatch.setattr(curves.load, "__defaults__", (None, 3, 2))
    split, spec = datasets.load("curves"), MODELS["curves"]
    datasets.check("curves")
    assert split.train[0].shape[1:] == spec.input_shape
    assert spec.module.features[:6] == (400, 200, 100, 50, 25, 6)
    assert spec.module.features[6:] == (25, 50, 100, 200, 400, 784)
    assert spec.module.linear == 5  # the code of six
