"""The table of models: a network, what its outputs mean, its data set, and its usual settings."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import fishleg_jax as flj
from experiments.data.datasets import CONTEXT
from experiments.models import networks


class Spec(NamedTuple):
    """A model and the settings that it is trained and pruned with unless a user says otherwise.

    Attributes:
        name: its name in `MODELS`.
        module: the flax linen network.
        model: the network in evaluation mode, as the library wants it.
        dataset: the name of the data set, see `experiments.data.datasets.load`.
        input_shape: the shape of one example.
        input_dtype: the type of the inputs.
        prunable: a regular expression over key paths, or None for every leaf with two or more
            dimensions.
        epochs: how long it is trained.
        train_batch: examples in a training step.
        learning_rate: the largest one, of AdamW.
        examples: training examples for the curvature.
        batch: examples in a batch of the curvature.
        checkpoint: the trained weights in the shared folder, if there are any.
        mean: of an auto-encoder, from its outputs to its reconstruction; None for a classifier.
    """

    name: str
    module: nn.Module
    model: flj.Model
    dataset: str
    input_shape: tuple[int, ...]
    input_dtype: Any
    prunable: str | None
    epochs: int
    train_batch: int
    learning_rate: float
    examples: int
    batch: int
    checkpoint: str | None
    mean: Callable[[Any], Any] | None

    @property
    def data(self) -> str:
        """The name of the data set, whatever is done to its pixels."""
        return self.dataset.removesuffix("_raw")

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Random parameters and the constants (batch-norm statistics; empty without them)."""
        inputs = jnp.zeros((1, *self.input_shape), self.input_dtype)
        variables = self.module.init(key, inputs)
        return variables["params"], variables.get("batch_stats", {})


def as_batch(inputs: Any, targets: Any, constants: Any) -> tuple:
    """A batch as the library wants it: without constants where there are none."""
    return (inputs, targets, constants) if constants else (inputs, targets)


def make_spec(
    name: str,
    module: nn.Module,
    dataset: str,
    input_shape: tuple[int, ...],
    *,
    epochs: int,
    train_batch: int,
    examples: int,
    batch: int,
    learning_rate: float = 2e-3,
    likelihood: flj.likelihoods.Likelihood | None = None,
    input_dtype: Any = jnp.float32,
    prunable: str | None = None,
    checkpoint: str | None = None,
    mean: Callable[[Any], Any] | None = None,
) -> Spec:
    """Makes a `Spec` whose model applies the network in evaluation mode.

    Args:
        name: its name.
        module: the flax linen network.
        dataset: the name of the data set, see `experiments.data.datasets.load`.
        input_shape: the shape of one example.
        epochs: number of epochs of training.
        train_batch: examples in a training step.
        examples: training examples for the curvature.
        batch: examples in a batch of the curvature.
        learning_rate: the largest one, of AdamW.
        likelihood: of the outputs; None for `categorical`.
        input_dtype: the type of the inputs.
        prunable: see `Spec`.
        checkpoint: see `Spec`.
        mean: see `Spec`.
    """

    def predict(params, inputs, constants=None):
        statistics = {"batch_stats": constants} if constants else {}
        return module.apply({"params": params, **statistics}, inputs)

    return Spec(
        name,
        module,
        flj.Model(predict, likelihood or flj.likelihoods.categorical()),
        dataset,
        input_shape,
        input_dtype,
        prunable,
        epochs,
        train_batch,
        learning_rate,
        examples,
        batch,
        checkpoint,
        mean,
    )


_AUTOENCODER = (1000, 500, 250, 30, 250, 500, 1000, 784)
_CURVES = (400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784)
_FACES = (2000, 1000, 500, 30, 500, 1000, 2000, 625)

# ResNet-20 prunes the 18 convolutions of its blocks and the two 1x1 shortcuts, 269,824 weights,
# and keeps the first convolution and the classifier; the transformer keeps its embeddings.
MODELS = {
    spec.name: spec
    for spec in (
        make_spec(
            "cnn",
            networks.Cnn(),
            "digits",
            (8, 8, 1),
            epochs=60,
            train_batch=64,
            examples=1280,
            batch=128,
        ),
        make_spec(
            "mlp",
            networks.Mlp((128, 64, 10)),
            "digits",
            (8, 8, 1),
            epochs=60,
            train_batch=64,
            examples=1280,
            batch=128,
        ),
        make_spec(
            "mlpnet",
            networks.Mlp((40, 20, 10), use_bias=False),
            "mnist",
            (28, 28, 1),
            epochs=10,
            train_batch=128,
            examples=16_000,
            batch=1000,
            checkpoint="data/checkpoints/mlpnet_mnist.npz",
        ),
        make_spec(
            "resnet20",
            networks.ResNet20(),
            "cifar10",
            (32, 32, 3),
            prunable="layer.*/kernel",
            epochs=30,
            train_batch=128,
            examples=8192,
            batch=128,
            checkpoint="data/checkpoints/resnet20_cifar10.npz",
        ),
        make_spec(
            "autoencoder",
            networks.Mlp(_AUTOENCODER, linear=3),
            "mnist_raw",
            (28, 28, 1),
            likelihood=flj.likelihoods.bernoulli(),
            epochs=2,
            train_batch=100,
            learning_rate=1e-3,
            examples=10_000,
            batch=100,
            mean=jax.nn.sigmoid,
        ),
        make_spec(
            "faces",
            networks.Mlp(_FACES, linear=3),
            "faces",
            (25, 25, 1),
            likelihood=flj.likelihoods.gaussian(),
            epochs=20,
            train_batch=100,
            learning_rate=1e-3,
            examples=10_000,
            batch=100,
            mean=lambda outputs: outputs,
        ),
        make_spec(
            "curves",
            networks.Mlp(_CURVES, linear=5),
            "curves",
            (28, 28, 1),
            likelihood=flj.likelihoods.bernoulli(),
            epochs=10,
            train_batch=100,
            learning_rate=1e-3,
            examples=10_000,
            batch=100,
            mean=jax.nn.sigmoid,
        ),
        make_spec(
            "transformer",
            networks.Transformer(),
            "tinyshakespeare",
            (CONTEXT,),
            input_dtype=jnp.int32,
            prunable="(block|head).*/kernel",
            epochs=2,
            train_batch=64,
            examples=4096,
            batch=64,
        ),
    )
}
