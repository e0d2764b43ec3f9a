"""The methods of the arena, all at the library's defaults."""

from typing import Any, NamedTuple

import fishleg_jax as flj
from experiments.arena import networks
from experiments.estimates.methods import GRADIENTS, METHODS
from experiments.models.specs import Spec


class Arguments(NamedTuple):
    """What a method is given beside model, weights, data and sparsity.

    Attributes:
        estimator: of its estimate of the inverse Fisher.
        one_shot: of `prune_one_shot`.
        gradual: of `gradual_prune`, or of `fishleg_prune`.
    """

    estimator: dict[str, Any] = {}
    one_shot: dict[str, Any] = {}
    gradual: dict[str, Any] = {}


# nothing is tuned: whatever stands here has to be what defines the method
ARGUMENTS = {
    "magnitude": Arguments(),
    "diagonal": Arguments(),
    "kfac": Arguments(),
    "woodfisher": Arguments(),
    "mfac": Arguments(),
    "fishleg": Arguments(),
}
OURS = "fishleg"
PEERS = tuple(name for name in ARGUMENTS if name != OURS)
_KNOW_STACKS = ("kfac", "fishleg")  # estimates with factors for each layer of a stack


def make_estimator(method: str, spec: Spec, examples: int) -> flj.InverseFisher:
    """The estimate of a method at its defaults.

    Two settings follow from the network and the data: which leaves are stacked layers, and that
    WoodFisher can't be made of more gradients than there are examples.

    Args:
        method: a name in `ARGUMENTS`.
        spec: the model.
        examples: number of examples that the estimate will see.
    """
    given = dict(ARGUMENTS[method].estimator)
    if method in _KNOW_STACKS and networks.stacked(spec):
        given["stacked"] = networks.stacked(spec)
    if method == "woodfisher" and examples < GRADIENTS:
        given["gradients"] = examples
    return METHODS[method].make(spec.model, **given)


def prunable(spec: Spec) -> dict[str, Any]:
    """The argument `prunable` where a network has stacked layers or leaves to be spared."""
    stacked = networks.stacked(spec)
    if stacked:
        return {"prunable": flj.Leaves(spec.prunable, stacked=stacked)}
    return {"prunable": spec.prunable} if spec.prunable else {}
