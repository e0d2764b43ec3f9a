"""The networks: the digits CNN, one with larger kernels, and ResNet-20."""

from experiments.models import networks
from experiments.models.specs import MODELS, make_spec

CNN5 = make_spec(
    "cnn5",
    networks.Cnn(size=5),
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
