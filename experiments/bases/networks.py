"""The networks: the digits CNN, one with larger kernels, and ResNet-20."""

import flax.linen as nn
import jax

from experiments.models.specs import MODELS, make_spec


class Cnn5(nn.Module):
    """Two 5x5 convolutions and two dense layers, for the 8x8 digits."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images `(examples, 8, 8, 1)` to logits `(examples, 10)`."""
        x = nn.relu(nn.Conv(16, (5, 5), name="conv1")(x))
        x = nn.relu(nn.Conv(32, (5, 5), strides=2, name="conv2")(x))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(64, name="fc1")(x))
        return nn.Dense(10, name="fc2")(x)


CNN5 = make_spec(
    "cnn5",
    Cnn5(),
    "digits",
    (8, 8, 1),
    epochs=60,
    train_batch=64,
    examples=1280,
    batch=128,
)
NETWORKS = {"cnn": MODELS["cnn"], "cnn5": CNN5, "resnet20": MODELS["resnet20"]}


def prunable_in(name: str) -> str:
    """Expression for the kernels that are pruned: convolutions that are larger than 1x1.

    Args:
        name: a name in `NETWORKS`.
    """
    return "layer.*conv.*/kernel" if name == "resnet20" else "conv.*/kernel"
