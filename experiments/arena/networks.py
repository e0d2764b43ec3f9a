"""The networks of the arena: each of another kind, trained in a minute or two."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import fishleg_jax as flj
from experiments.data import datasets
from experiments.models import checkpoints, networks, training
from experiments.models.specs import MODELS, Spec, make_spec
from experiments.running import files

STACKED = "^layers/"  # the scanned layers of `ScannedTransformer`
# layer inputs that are sown inside of a scan come out with the scan's axis in front
SOWN = {"intermediates": 0}


class LeNet(nn.Module):
    """Two 5x5 convolutions and three dense layers (LeCun et al. 1998), for the 28x28 digits."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images `(examples, 28, 28, 1)` to logits `(examples, 10)`."""
        for i, width in enumerate((6, 16)):
            x = nn.relu(nn.Conv(width, (5, 5), padding="VALID", name=f"conv{i + 1}")(x))
            x = nn.avg_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate((120, 84)):
            x = nn.relu(nn.Dense(width, name=f"fc{i + 1}")(x))
        return nn.Dense(10, name="fc3")(x)


class Separable(nn.Module):
    """Depthwise and pointwise convolutions in turn with batch norm, as in MobileNet.

    Attributes:
        widths: channels behind each pointwise convolution; the first and the last keep the size of
            the image, those between halve it.
    """

    widths: tuple[int, ...] = (32, 64, 64)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images `(examples, height, width, channels)` to logits `(examples, 10)`.

        Args:
            x: the images.
            train: whether batch norm uses (and averages) the statistics of the batch.
        """
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=networks.MOMENTUM)
        conv = partial(nn.Conv, use_bias=False)
        x = nn.relu(norm(name="norm")(conv(16, (3, 3), name="conv")(x)))
        for i, width in enumerate(self.widths):
            channels = x.shape[-1]
            stride = 2 if 0 < i < len(self.widths) - 1 else 1
            depthwise = conv(
                channels, (3, 3), strides=stride, feature_group_count=channels, name=f"depth{i}"
            )
            x = nn.relu(norm(name=f"depth{i}_norm")(depthwise(x)))
            x = nn.relu(norm(name=f"point{i}_norm")(conv(width, (1, 1), name=f"point{i}")(x)))
        return nn.Dense(10, name="fc")(x.mean(axis=(1, 2)))


class _Cell(nn.Module):
    """A step of an LSTM, whose weights are those of two dense layers."""

    @nn.compact
    def __call__(self, carry: tuple, x: jax.Array) -> tuple:
        cell, hidden = carry
        width = cell.shape[-1]
        gates = nn.Dense(4 * width, name="input")(x)
        gates += nn.Dense(4 * width, use_bias=False, name="hidden")(hidden)
        forget, update, output, new = jnp.split(gates, 4, axis=-1)
        # a memory that starts out by keeping what it has
        cell = cell * nn.sigmoid(forget + 1) + nn.sigmoid(update) * jnp.tanh(new)
        hidden = nn.sigmoid(output) * jnp.tanh(cell)
        return (cell, hidden), None


class Lstm(nn.Module):
    """An LSTM that reads an image row by row, and a dense layer on its last state.

    Attributes:
        width: of the hidden state.
    """

    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images `(examples, rows, columns, 1)` to logits `(examples, 10)`."""
        zero = jnp.zeros((x.shape[0], self.width), x.dtype)
        scan = nn.scan(
            _Cell,
            variable_axes=SOWN,
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=1,
        )
        (_, hidden), _ = scan(name="lstm")((zero, zero), x[..., 0])
        return nn.Dense(10, name="fc")(hidden)


class _ScannedBlock(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple:
        return networks.TransformerBlock(self.heads, name="block")(x), None


class ScannedTransformer(nn.Module):
    """A causal language model over characters whose layers are scanned, with stacked weights.

    Attributes:
        vocabulary: number of characters.
        width: of the residual stream.
        layers: number of layers.
    """

    vocabulary: int = 65
    width: int = 44
    layers: int = 2

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens `(examples, context)` to logits `(examples, context, vocabulary)`."""
        x = nn.Embed(self.vocabulary, self.width, name="embed_token")(tokens)
        positions = jnp.arange(tokens.shape[1])
        x = x + nn.Embed(tokens.shape[1], self.width, name="embed_position")(positions)
        scan = nn.scan(
            _ScannedBlock,
            variable_axes={"params": 0, **SOWN},
            split_rngs={"params": True},
            length=self.layers,
        )
        x, _ = scan(4, name="layers")(x, None)
        return nn.Dense(self.vocabulary, name="head")(nn.LayerNorm(name="norm")(x))


class VisionTransformer(nn.Module):
    """Self-attention between the patches of an image, and a dense layer on their mean.

    Attributes:
        patch: height and width of a patch in pixels.
        width: of the residual stream.
        layers: number of layers.
        heads: number of attention heads.
    """

    patch: int = 4
    width: int = 48
    layers: int = 2
    heads: int = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images `(examples, height, width, channels)` to logits `(examples, 10)`."""
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, strides=size, name="patches")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        positions = nn.Embed(x.shape[1], self.width, name="embed_position")
        x = x + positions(jnp.arange(x.shape[1]))
        for i in range(self.layers):
            y = nn.LayerNorm(name=f"norm{i}_1")(x)
            qkv = nn.Dense(3 * self.width, use_bias=False, name=f"qkv{i}")(y)
            q, k, v = jnp.moveaxis(qkv.reshape(*y.shape[:2], 3, self.heads, -1), 2, 0)
            attended = jax.nn.dot_product_attention(q, k, v).reshape(y.shape)
            x = x + nn.Dense(self.width, use_bias=False, name=f"out{i}")(attended)
            y = nn.gelu(nn.Dense(4 * self.width, name=f"up{i}")(nn.LayerNorm(name=f"norm{i}_2")(x)))
            x = x + nn.Dense(self.width, name=f"down{i}")(y)
        return nn.Dense(10, name="head")(nn.LayerNorm(name="norm")(x).mean(axis=1))


def _make(name: str, module: nn.Module, dataset: str, shape: tuple, epochs: int, **more: Any):
    settings = {"train_batch": 128, "examples": 1024, "batch": 64} | more
    return make_spec(name, module, dataset, shape, epochs=epochs, **settings)


_IMAGE = (28, 28, 1)
NETWORKS = {
    spec.name: spec
    for spec in (
        MODELS["mlpnet"],
        _make("dense", networks.Mlp((300, 100, 10)), "mnist", _IMAGE, 3),
        _make("lenet", LeNet(), "mnist", _IMAGE, 3),
        MODELS["cnn"],
        MODELS["resnet20"],
        # digits, as XLA for the CPU is slow at gradients of depthwise convolutions: four epochs of
        # CIFAR-10 were not over after nine minutes
        _make("separable", Separable(), "digits", (8, 8, 1), 60, train_batch=64),
        _make(
            "autoencoder",
            networks.Mlp((128, 64, 16, 64, 128, 784), linear=2),
            "mnist_raw",
            _IMAGE,
            6,
            likelihood=flj.likelihoods.bernoulli(),
            mean=jax.nn.sigmoid,
        ),
        _make("lstm", Lstm(), "digits", (8, 8, 1), 60, train_batch=64),
        _make(
            "transformer",
            ScannedTransformer(),
            "tinyshakespeare",
            (datasets.CONTEXT,),
            4,
            train_batch=64,
            input_dtype=jnp.int32,
        ),
        _make("vit", VisionTransformer(), "mnist", _IMAGE, 2),
    )
}


class Contestant(NamedTuple):
    """A trained network and its data.

    Attributes:
        spec: the model; what it may prune is left to the library.
        params: its parameters.
        constants: its constants; may be empty.
        split: the data set, with the first test examples, at most as many as were asked for.
    """

    spec: Spec
    params: Any
    constants: Any
    split: datasets.Data


def load(
    name: str, *, train_in: Path, data_dir: Path | None = None, test_examples: int | None = None
) -> Contestant:
    """A network at its checkpoint, or trained and kept for the next time.

    Args:
        name: a name in `NETWORKS`.
        train_in: the folder of networks without a checkpoint.
        data_dir: see `experiments.data.datasets.prepared`.
        test_examples: number of test examples at most; None for all.

    Raises:
        ValueError: the data set or the checkpoint is missing.
    """
    spec = NETWORKS[name]
    split = datasets.load(spec.dataset, data_dir)
    split = split._replace(test=tuple(column[:test_examples] for column in split.test))
    if spec.checkpoint:
        weights = checkpoints.load(files.shared(spec.checkpoint), spec)
    else:
        path = train_in / f"{name}_{spec.epochs}epochs.npz"
        weights = training.trained(spec, split.train, path)
    return Contestant(spec, *weights, split)


def check(name: str, data_dir: Path | None = None) -> None:
    """Raises a ValueError if a network's data set or checkpoint is missing, without reading it."""
    spec = NETWORKS[name]
    datasets.check(spec.dataset, data_dir)
    if spec.checkpoint:
        files.shared(spec.checkpoint)


def stacked(spec: Spec) -> str | None:
    """The leaves of a network with a leading axis of layers, as a regular expression, or None."""
    return STACKED if isinstance(spec.module, ScannedTransformer) else None
