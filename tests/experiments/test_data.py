"""The data sets: sound splits, and quick words where data are missing."""

import time

import numpy as np
import pytest

from experiments.data import datasets as data


def test_digits_are_split_without_overlap_and_stratified():
    split = data.digits()
    assert split.train[0].shape == (1297, 8, 8, 1) and split.test[0].shape == (500, 8, 8, 1)
    assert split.train[0].dtype == np.float32 and split.train[1].dtype == np.int32
    assert split.train[0].min() == 0 and split.train[0].max() == 1
    shares = [np.bincount(labels) / len(labels) for _, labels in split]
    np.testing.assert_allclose(*shares, atol=2e-3)


def test_digits_are_all_there_once_and_always_the_same():
    from sklearn.datasets import load_digits

    split = data.digits()
    joined = np.concatenate([split.train[0], split.test[0]]).reshape(-1, 64)
    everything = load_digits().data / 16
    # equal as multisets: nothing is in both parts
    np.testing.assert_array_equal(
        joined[np.lexsort(joined.T)], everything[np.lexsort(everything.T)]
    )
    np.testing.assert_array_equal(split.test[1], data.digits().test[1])


def test_missing_data_are_named_at_once(tmp_path):
    begin = time.perf_counter()
    with pytest.raises(ValueError, match="--data-dir .* has no mnist .* tfds") as caught:
        data.load("mnist", tmp_path)
    assert time.perf_counter() - begin < 1
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_half_prepared_data_set_is_missing(tmp_path):
    version = tmp_path / "mnist" / "3.0.1"
    version.mkdir(parents=True)
    (version / "dataset_info.json").write_text("{}")
    (version / "mnist-train.array_record-00000-of-00001").touch()
    with pytest.raises(ValueError, match="has no mnist"):
        data.check("mnist", tmp_path)


def test_text_targets_are_the_next_characters(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abc" * 1000)
    split = data.tinyshakespeare(path)
    inputs = np.concatenate([split.train[0], split.test[0]]).ravel()
    targets = np.concatenate([split.train[1], split.test[1]]).ravel()
    np.testing.assert_array_equal(targets[:-1], inputs[1:])
    assert split.train[0].shape[1] == data.CONTEXT and inputs.max() == 2


def test_augmented_images_are_shifted_and_flipped_with_black_borders():
    rng = np.random.default_rng(0)
    pixels = rng.uniform(0.1, 1, (50, 32, 32, 3)).astype(np.float32)  # none is black
    mean, scale = data.NORMALISATION["cifar10"]
    images = (pixels - mean) / scale
    made = data.augmented("cifar10", images, np.random.default_rng(1)) * scale + mean
    assert made.shape == pixels.shape and made.dtype == np.float32
    seen = set()
    for before, after in zip(pixels, made, strict=True):
        inside = np.argwhere((after > 0.05).all(axis=-1))
        (top, left), (bottom, right) = inside.min(axis=0), inside.max(axis=0) + 1
        window = after[top:bottom, left:right]
        assert min(window.shape[:2]) >= 28 and np.allclose(after[:top], 0, atol=1e-6)
        rows = slice(0, bottom - top) if top else slice(32 - (bottom - top), 32)
        for flipped in (False, True):
            image = before[:, ::-1] if flipped else before
            columns = slice(0, right - left) if left else slice(32 - (right - left), 32)
            # shifts are those of the image before it is flipped or after: both are in range
            if np.allclose(image[rows, columns], window, atol=1e-6):
                seen.add((flipped, top > 0 or bottom < 32, left > 0 or right < 32))
                break
        else:
            pytest.fail("an image that is neither shifted nor flipped")
    assert {flipped for flipped, *_ in seen} == {False, True} and len(seen) > 4


def test_other_images_are_not_augmented():
    images = np.ones((2, 28, 28, 1), np.float32)
    assert data.augmented("mnist", images, np.random.default_rng(0)) is images
