"""The order of training examples, and the lines of `metrics.jsonl`."""

import json

import numpy as np

from experiments.data.batches import batch_at, rows
from experiments.running import metrics


def test_an_epoch_sees_every_example_once_in_an_order_of_its_own():
    epochs = [np.concatenate([rows(0, 5 * e + i, 53, 10) for i in range(5)]) for e in range(2)]
    for epoch in epochs:
        assert len(epoch) == 50 == len(set(epoch.tolist())) and epoch.max() < 53
    assert (epochs[0] != epochs[1]).any() and (rows(1, 0, 53, 10) != rows(0, 0, 53, 10)).any()


def test_a_batch_follows_from_seed_and_step():
    rng = np.random.default_rng(0)
    train = rng.normal(size=(30, 32, 32, 3)).astype(np.float32), np.arange(30)
    first = batch_at("cifar10", train, seed=3, step=7, batch=8)
    batch_at("cifar10", train, seed=3, step=1, batch=8)
    again = batch_at("cifar10", train, seed=3, step=7, batch=8)
    for x, y in zip(first, again, strict=True):
        np.testing.assert_array_equal(x, y)
    other = batch_at("cifar10", train, seed=4, step=7, batch=8)
    assert (first[1] != other[1]).any()
    # shifted and flipped, but for the digits
    assert (first[0] != train[0][first[1]]).any()
    images, labels = batch_at("digits", train, seed=3, step=7, batch=8)
    np.testing.assert_array_equal(images, train[0][labels])


def test_a_run_that_goes_on_forgets_what_came_after_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics.append(path, [{"step": step, "loss": float("nan")} for step in (10, 20, 30)])
    with path.open("a") as file:
        file.write('{"step": 40, "lo')  # killed
    assert [row["step"] for row in metrics.load(path)] == [10, 20, 30]
    metrics.rewind(path, 20)
    metrics.append(path, [{"step": 30, "loss": 1.0}])
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert found == [
        {"step": 10, "loss": None},
        {"step": 20, "loss": None},
        {"step": 30, "loss": 1.0},
    ]
