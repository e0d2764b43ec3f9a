"""Columns of a data set: the rows that are asked for are read, and no others."""

import numpy as np
import pytest

from experiments.data import batches, columns
from experiments.data import datasets as data
from experiments.data.columns import Column
from experiments.running import processes


class Source:
    """Examples that count how often each was decoded."""

    def __init__(self, examples=20):
        rng = np.random.default_rng(0)
        self.images = rng.integers(0, 256, (examples, 4, 4, 1), dtype=np.uint8)
        self.labels = rng.integers(0, 10, examples).astype(np.int32)
        self.decoded = []

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        self.decoded.append(i)
        return {"image": self.images[i], "label": int(self.labels[i])}


@pytest.fixture
def unwritable(monkeypatch):
    def refuse(*_):
        raise PermissionError("read only")

    monkeypatch.setattr(columns.files, "write", refuse)


@pytest.fixture
def second_of_two(monkeypatch):
    """The second of two processes, as far as reading goes."""
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes.jax, "process_index", lambda: 1)
    monkeypatch.setattr(processes.jax, "device_count", lambda: 2)
    monkeypatch.setattr(processes, "wait", lambda name: None)
    monkeypatch.setattr(processes, "joint", lambda own: own)


def prepared_mnist(monkeypatch, folder, source):
    folder = folder / "mnist" / "1.0.0"
    monkeypatch.setattr(data, "prepared", lambda *_: folder)
    monkeypatch.setattr(data, "source", lambda *_: source)
    return folder.parents[1]


@pytest.mark.parametrize("index", [np.array([3, 1, 3, -1]), [2, 0], 5, -2, np.arange(20) % 3 == 0])
@pytest.mark.parametrize("part", [slice(None), slice(4, 17), slice(None, None, 2), slice(-9, None)])
def test_a_column_is_indexed_like_an_array(index, part):
    whole = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    column = Column(lambda rows: whole[rows], range(20), (3,), whole.dtype)[part]
    array = whole[part]
    if isinstance(index, np.ndarray) and index.dtype == bool:
        index = index[: len(array)]
    assert (len(column), column.shape, column.dtype) == (len(array), array.shape, array.dtype)
    np.testing.assert_array_equal(column[index], array[index])
    np.testing.assert_array_equal(column.then(lambda rows: -rows)[index], -array[index])
    with pytest.raises(IndexError):
        column[[len(array)]]


def test_a_process_decodes_its_share_and_no_more(monkeypatch, tmp_path, unwritable, second_of_two):
    source = Source()
    prepared_mnist(monkeypatch, tmp_path, source)
    train = data.load("mnist").train
    assert (train[0].shape, train[1].shape) == ((20, 4, 4, 1), (20,))
    source.decoded.clear()  # the shape is that of the first one
    rows = np.array([7, 3, 19, 0, 11, 2])
    images, labels = processes.read(train, rows)
    assert source.decoded == [0, 11, 2]
    expected = (source.images[rows[3:]].astype(np.float32) / 255 - 0.1307) / 0.3081
    np.testing.assert_allclose(images, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(labels, source.labels[rows[3:]])
    source.decoded.clear()
    _, labels = batches.batch_at("mnist", train, seed=0, step=1, batch=8)
    own = batches.rows(0, 1, 20, 8)[4:]
    assert source.decoded == own.tolist()
    np.testing.assert_array_equal(labels, source.labels[own])
    source.decoded.clear()
    shorter = train[0][:5], train[1][:5]
    assert not source.decoded and len(shorter[0]) == 5


@pytest.mark.parametrize("name", ["mnist", "mnist_raw"])
def test_columns_have_the_values_of_whole_arrays(monkeypatch, tmp_path, name, request):
    source = Source()
    prepared_mnist(monkeypatch, tmp_path, source)
    whole = data.load(name)
    assert all(isinstance(x, np.ndarray) for part in whole for x in part)
    request.getfixturevalue("second_of_two")
    source.decoded.clear()
    lazy = data.load(name)
    assert not source.decoded  # the files are there
    rows = np.array([4, 0, 19])
    for part, arrays in zip(lazy, whole, strict=True):
        for column, array in zip(part, arrays, strict=True):
            assert isinstance(column, Column) and column.shape == array.shape
            assert column.dtype == array.dtype == column[rows].dtype
            np.testing.assert_array_equal(column[rows], array[rows])


def test_only_the_first_process_writes(monkeypatch, tmp_path, second_of_two):
    cache = prepared_mnist(monkeypatch, tmp_path, Source())
    data.load("mnist")
    assert not list(cache.iterdir())
    monkeypatch.setattr(processes.jax, "process_index", lambda: 0)
    data.load("mnist")
    parts = [f"{split}-{what}" for split in ("test", "train") for what in ("images", "labels")]
    assert sorted(path.name for path in cache.iterdir()) == [f"mnist-1.0.0-{p}.npy" for p in parts]


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY broken", None])
@pytest.mark.parametrize("what", ["images", "labels"])
def test_files_that_are_broken_are_written_again(tmp_path, content, what):
    source, cache = Source(), tmp_path / "mnist-1.0.0-train"
    columns.split(cache, lambda: source)
    path = tmp_path / f"mnist-1.0.0-train-{what}.npy"
    path.write_bytes(path.read_bytes()[:-1] if content is None else content)
    for decoded in (True, False):  # from what was decoded, and from what was kept of it
        source.decoded.clear()
        found = columns.split(cache, lambda: source)
        assert bool(source.decoded) == decoded
        np.testing.assert_array_equal(found.images.whole(), source.images)
        np.testing.assert_array_equal(found.labels.whole(), source.labels)


def test_an_end_amid_decoding_leaves_nothing(tmp_path):
    source, cache = Source(), tmp_path / "mnist-1.0.0-train"
    whole = source.images
    source.images = whole[:12]  # and the next one is an error
    with pytest.raises(IndexError):
        columns.split(cache, lambda: source)
    assert not list(tmp_path.iterdir())
