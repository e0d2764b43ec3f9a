"""The network and photos of `experiments.imagenet`, and the evaluation of pruned weights."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import fishleg_jax as flj
from experiments.imagenet.photos import Photos
from experiments.models import recalibration
from experiments.running import processes
from fishleg_jax import _prunable, _tree
from fishleg_jax._jit import jitted


class Network(NamedTuple):
    """A network with batch norm.

    Attributes:
        name: its name.
        model: the network, whose constants have the statistics of batch norm.
        by_batch: `(params, images, constants) -> (logits, constants)`, with the statistics of these
            images themselves.
        preprocess: from pixels to images.
        size: of an image.
    """

    name: str
    model: flj.Model
    by_batch: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]
    preprocess: Callable[[np.ndarray], np.ndarray]
    size: int


class Job(NamedTuple):
    """Data and options shared by all methods.

    Attributes:
        args: the arguments.
        network: the network.
        params: its weights.
        constants: its constants, with the statistics of batch norm as stored.
        fit: the photos that the curvature sees, and on which batch norm is recomputed.
        held_out: the photos by which dampings are chosen.
        validation: the photos to evaluate on.
        prunable: as `prune_one_shot` wants it.
    """

    args: argparse.Namespace
    network: Network
    params: Any
    constants: Any
    fit: Photos
    held_out: Photos
    validation: Photos
    prunable: Any


class Scores(NamedTuple):
    """How good a network is on some photos.

    Attributes:
        ranks: for every photo, the number of other classes rated at least as likely as its own.
        loss: in nats per photo.
    """

    ranks: np.ndarray
    loss: float

    def right(self, top: int) -> np.ndarray:
        """Whether each photo's class is among the `top` most likely ones."""
        return self.ranks < top

    def percent(self, top: int) -> float:
        """Share of photos whose class is among the `top` most likely ones, in percent."""
        return 100 * float(self.right(top).mean())


class Batches(Sequence):
    """Photos in batches as the library wants them, read when they are asked for.

    Of several processes each reads its share of a batch.
    """

    def __init__(self, job: Job, photos: Photos, size: int, *, labels: bool = True):
        """Cuts photos into batches; the last one may be smaller.

        Args:
            job: data and options shared by all methods.
            photos: the photos.
            size: photos in a batch.
            labels: whether the batches have any.
        """
        self._job, self._photos, self._size, self._labels = job, photos, size, labels

    def __len__(self) -> int:
        """How many batches there are."""
        return -(-len(self._photos) // self._size)

    def __getitem__(self, index: int) -> tuple:
        """One of the batches."""
        begin = range(0, len(self._photos), self._size)[index]
        rows = range(begin, min(begin + self._size, len(self._photos)))
        images, labels, constants = batch_of(self._job, self._photos, rows)
        return images, labels if self._labels else None, constants


def batch_of(job: Job, photos: Photos, rows: Sequence[int]) -> tuple:
    """Some photos as one batch; each process reads its share."""
    pixels, labels = photos.read(rows[processes.share(len(rows))])
    return *processes.joint((job.network.preprocess(pixels), labels)), job.constants


def _ranks_and_losses(model: flj.Model, params, constants, images, labels):
    logits = model.predict(params, images, constants)
    return ranks(logits, labels), model.likelihood.negative_log_likelihood(logits, labels)


def ranks(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """For every example, the number of other classes at least as likely as its own."""
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    # ties count against it, and so does NaN
    return jnp.sum(~(logits < own), axis=1) - 1


def evaluate(job: Job, params: Any, constants: Any) -> Scores:
    """Evaluates a network on the validation photos, `--chunk` at a time."""
    compiled = jitted(_ranks_and_losses, job.network.model)
    photos, parts = len(job.validation), []
    size = processes.dealt(min(job.args.chunk, photos))
    for begin in tqdm(range(0, photos, size), desc="evaluating", disable=None, leave=False):
        # the last one is filled up with one photo: one shape, one compilation
        rows = np.minimum(np.arange(begin, begin + size), photos - 1)
        images, labels, _ = batch_of(job, job.validation, rows)
        found = processes.whole(compiled(params, constants, images, labels))
        parts.append([x[: photos - begin] for x in found])
    ranks, losses = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Scores(ranks, float(losses.mean()))


def recomputed(job: Job, params: Any) -> Any:
    """Constants with the statistics of other weights, on the photos that the curvature sees."""
    compiled = jitted(_statistics, job.network.by_batch)
    size = processes.dealt(job.args.chunk)
    parts = [
        (compiled(params, images, constants), len(images))
        for images, _, constants in Batches(job, job.fit, size)
    ]
    return recalibration.averaged(*zip(*parts, strict=True))


def _statistics(by_batch: Callable, params, images, constants):
    return by_batch(params, images, constants)[1]


def held_out_loss(job: Job, params: Any) -> float:
    """The loss of pruned weights on the held-out photos, in nats per photo.

    Batch norm has the statistics of these photos themselves: as stored a pruned network may be
    beyond telling good from bad, and to recompute them first would take another pass.
    """
    compiled = jitted(_loss_by_batch, job.network.model, job.network.by_batch)
    batch = batch_of(job, job.held_out, range(len(job.held_out)))
    return float(compiled(params, *batch))


def _loss_by_batch(model: flj.Model, by_batch: Callable, params, images, labels, constants):
    logits = by_batch(params, images, constants)[0]
    return jnp.mean(model.likelihood.negative_log_likelihood(logits, labels))


def mean_diagonal(job: Job) -> float:
    """The mean of the Fisher's diagonal over prunable weights: where the search of dampings starts.

    From one product with random signs, of the photos of one solve.
    """
    leaves, tree = jax.tree.flatten(job.params)
    chosen = _prunable.select(job.params, job.prunable, "prunable")
    keys = jax.random.split(jax.random.key(job.args.seed), len(leaves))
    signs = [
        jax.random.rademacher(key, x.shape, x.dtype) if yes else jnp.zeros_like(x)
        for key, x, yes in zip(keys, leaves, chosen, strict=True)
    ]
    signs = processes.everywhere(tree.unflatten(signs))
    around = flj.curvature(
        job.network.model, solve_batches(job), examples_per_chunk=job.args.examples_per_chunk
    )
    image = around.product(job.params, signs)
    weights = sum(x.size for x, yes in zip(leaves, chosen, strict=True) if yes)
    return float(_tree.dot(signs, image)) / weights


def solve_batches(job: Job) -> Batches:
    """The photos that the solves of group updates see, without labels."""
    photos = job.fit.part(range(job.args.solve))
    return Batches(job, photos, job.args.batch, labels=False)
