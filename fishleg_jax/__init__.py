"""Second-order pruning of neural networks in JAX, with a learned inverse Fisher (FishLeg).

The API consists of pure functions over pytrees; the README has a two-minute tour.
"""

from fishleg_jax import inverse, likelihoods
from fishleg_jax._curvature import Curvature, curvature
from fishleg_jax.fisher import fisher_vector_product
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.memory import Memory, peak_memory
from fishleg_jax.model import Batch, Model, loss, losses
from fishleg_jax.per_example import per_example_gradients
from fishleg_jax.pruning import compensation, schedules, selection, targets
from fishleg_jax.pruning.apply import apply_masks, sparsity
from fishleg_jax.pruning.costs import weight_costs
from fishleg_jax.pruning.gradual.fishleg import fishleg_prune
from fishleg_jax.pruning.gradual.state import Check, GradualState, check, masks
from fishleg_jax.pruning.gradual.train_state import TrainStateMixin
from fishleg_jax.pruning.gradual.transform import gradual_prune
from fishleg_jax.pruning.gradual.wrapper import MultiSteps, PruneState, prune
from fishleg_jax.pruning.leaves import Leaves
from fishleg_jax.pruning.masks.build import make_masks
from fishleg_jax.pruning.masks.files import load_masks, save_masks
from fishleg_jax.pruning.one_shot.fit import fit
from fishleg_jax.pruning.one_shot.prune import prune_one_shot
from fishleg_jax.pruning.one_shot.result import Result
from fishleg_jax.pruning.one_shot.stages import Stages
from fishleg_jax.pruning.report import Report
from fishleg_jax.pruning.schedules import stage_sparsities
from fishleg_jax.pruning.scores import obs_saliency
from fishleg_jax.pruning.trust import Trust, trust
from fishleg_jax.rematerialise import remat

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Check",
    "Curvature",
    "GradualState",
    "InverseFisher",
    "Leaves",
    "Memory",
    "Model",
    "MultiSteps",
    "PruneState",
    "Report",
    "Result",
    "Stages",
    "TrainStateMixin",
    "Trust",
    "apply_masks",
    "check",
    "compensation",
    "curvature",
    "fisher_vector_product",
    "fishleg_prune",
    "fit",
    "gradual_prune",
    "inverse",
    "likelihoods",
    "load_masks",
    "loss",
    "losses",
    "make_masks",
    "masks",
    "obs_saliency",
    "peak_memory",
    "per_example_gradients",
    "prune",
    "prune_one_shot",
    "remat",
    "save_masks",
    "schedules",
    "selection",
    "sparsity",
    "stage_sparsities",
    "targets",
    "trust",
    "weight_costs",
]


def __dir__() -> list[str]:
    """Returns the public names, for tab completion."""
    return sorted(__all__)
