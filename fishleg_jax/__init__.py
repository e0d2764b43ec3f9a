"""Second-order pruning of neural networks in JAX, with a learned inverse Fisher (FishLeg).

The API consists of pure functions over pytrees; the README has a two-minute tour.  Every name is
imported on first use (PEP 562), so that `import fishleg_jax` takes the time of its dependencies.
"""

import importlib
import typing

# The dependencies load at once, so that a missing one is an error of the import.
import jax as _jax  # noqa: F401
import optax as _optax  # noqa: F401

if typing.TYPE_CHECKING:
    from fishleg_jax import bases, export, inverse, likelihoods, low_rank, storage
    from fishleg_jax._curvature import Curvature, curvature
    from fishleg_jax.compaction.choice import choose_units
    from fishleg_jax.compaction.compact import compact
    from fishleg_jax.compaction.finding import find_couplings
    from fishleg_jax.compaction.gate_scores import gate_scores
    from fishleg_jax.compaction.report import CompactReport
    from fishleg_jax.compaction.result import Compact
    from fishleg_jax.compaction.unit_scores import UnitScores, unit_scores
    from fishleg_jax.fisher import fisher_vector_product
    from fishleg_jax.inverse.base import InverseFisher
    from fishleg_jax.memory import Memory, peak_memory
    from fishleg_jax.mismatch.disagreement import disagreement
    from fishleg_jax.mismatch.label_free import label_free
    from fishleg_jax.mismatch.memorisation import Memorisation, influence, memorisation
    from fishleg_jax.mismatch.report import Disagreement
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
    from fishleg_jax.pruning.masks import patterns
    from fishleg_jax.pruning.masks.build import make_masks
    from fishleg_jax.pruning.masks.files import load_masks, save_masks
    from fishleg_jax.pruning.one_shot.fit import fit
    from fishleg_jax.pruning.one_shot.prune import prune_one_shot
    from fishleg_jax.pruning.one_shot.result import Result
    from fishleg_jax.pruning.one_shot.stages import Stages
    from fishleg_jax.pruning.report import Report
    from fishleg_jax.pruning.schedules import stage_sparsities
    from fishleg_jax.pruning.scores import obd_saliency, obs_saliency
    from fishleg_jax.pruning.trust import Trust, trust
    from fishleg_jax.rematerialise import remat
    from fishleg_jax.training.low_rank import LowRankState, low_rank_updates
    from fishleg_jax.training.optimizer import fishleg_optimizer, scale_by_fishleg
    from fishleg_jax.training.precondition import scale_by_inverse_fisher
    from fishleg_jax.training.sharing import SharedState
    from fishleg_jax.training.state import NaturalState
    from fishleg_jax.training.trajectory import (
        SubspaceState,
        trajectory_subspace,
        within_subspace,
    )

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Check",
    "Compact",
    "CompactReport",
    "Curvature",
    "Disagreement",
    "GradualState",
    "InverseFisher",
    "Leaves",
    "LowRankState",
    "Memorisation",
    "Memory",
    "Model",
    "MultiSteps",
    "NaturalState",
    "PruneState",
    "Report",
    "Result",
    "SharedState",
    "Stages",
    "SubspaceState",
    "TrainStateMixin",
    "Trust",
    "UnitScores",
    "apply_masks",
    "bases",
    "check",
    "choose_units",
    "compact",
    "compensation",
    "curvature",
    "disagreement",
    "export",
    "find_couplings",
    "fisher_vector_product",
    "fishleg_optimizer",
    "fishleg_prune",
    "fit",
    "gate_scores",
    "gradual_prune",
    "influence",
    "inverse",
    "label_free",
    "likelihoods",
    "load_masks",
    "loss",
    "losses",
    "low_rank",
    "low_rank_updates",
    "make_masks",
    "masks",
    "memorisation",
    "obd_saliency",
    "obs_saliency",
    "patterns",
    "peak_memory",
    "per_example_gradients",
    "prune",
    "prune_one_shot",
    "remat",
    "save_masks",
    "scale_by_fishleg",
    "scale_by_inverse_fisher",
    "schedules",
    "selection",
    "sparsity",
    "stage_sparsities",
    "storage",
    "targets",
    "trajectory_subspace",
    "trust",
    "unit_scores",
    "weight_costs",
    "within_subspace",
]

# Public names by home below the package, as in the imports above, and modules as attributes.
_MODULES = {
    "bases": "bases",
    "compaction": "compaction",
    "compensation": "pruning.compensation",
    "export": "export",
    "fisher": "fisher",
    "inverse": "inverse",
    "likelihoods": "likelihoods",
    "low_rank": "low_rank",
    "memory": "memory",
    "mismatch": "mismatch",
    "model": "model",
    "patterns": "pruning.masks.patterns",
    "per_example": "per_example",
    "pruning": "pruning",
    "rematerialise": "rematerialise",
    "schedules": "pruning.schedules",
    "selection": "pruning.selection",
    "storage": "storage",
    "targets": "pruning.targets",
    "training": "training",
}
_HOMES = {
    "Batch": "model",
    "Check": "pruning.gradual.state",
    "Compact": "compaction.result",
    "CompactReport": "compaction.report",
    "Curvature": "_curvature",
    "Disagreement": "mismatch.report",
    "GradualState": "pruning.gradual.state",
    "InverseFisher": "inverse.base",
    "Leaves": "pruning.leaves",
    "LowRankState": "training.low_rank",
    "Memorisation": "mismatch.memorisation",
    "Memory": "memory",
    "Model": "model",
    "MultiSteps": "pruning.gradual.wrapper",
    "NaturalState": "training.state",
    "PruneState": "pruning.gradual.wrapper",
    "Report": "pruning.report",
    "Result": "pruning.one_shot.result",
    "SharedState": "training.sharing",
    "Stages": "pruning.one_shot.stages",
    "SubspaceState": "training.trajectory",
    "TrainStateMixin": "pruning.gradual.train_state",
    "Trust": "pruning.trust",
    "UnitScores": "compaction.unit_scores",
    "apply_masks": "pruning.apply",
    "check": "pruning.gradual.state",
    "choose_units": "compaction.choice",
    "compact": "compaction.compact",
    "curvature": "_curvature",
    "disagreement": "mismatch.disagreement",
    "find_couplings": "compaction.finding",
    "fisher_vector_product": "fisher",
    "fishleg_optimizer": "training.optimizer",
    "fishleg_prune": "pruning.gradual.fishleg",
    "fit": "pruning.one_shot.fit",
    "gate_scores": "compaction.gate_scores",
    "gradual_prune": "pruning.gradual.transform",
    "influence": "mismatch.memorisation",
    "label_free": "mismatch.label_free",
    "load_masks": "pruning.masks.files",
    "loss": "model",
    "losses": "model",
    "low_rank_updates": "training.low_rank",
    "make_masks": "pruning.masks.build",
    "masks": "pruning.gradual.state",
    "memorisation": "mismatch.memorisation",
    "obd_saliency": "pruning.scores",
    "obs_saliency": "pruning.scores",
    "peak_memory": "memory",
    "per_example_gradients": "per_example",
    "prune": "pruning.gradual.wrapper",
    "prune_one_shot": "pruning.one_shot.prune",
    "remat": "rematerialise",
    "save_masks": "pruning.masks.files",
    "scale_by_fishleg": "training.optimizer",
    "scale_by_inverse_fisher": "training.precondition",
    "sparsity": "pruning.apply",
    "stage_sparsities": "pruning.schedules",
    "trajectory_subspace": "training.trajectory",
    "trust": "pruning.trust",
    "unit_scores": "compaction.unit_scores",
    "weight_costs": "pruning.costs",
    "within_subspace": "training.trajectory",
}

if not typing.TYPE_CHECKING:  # with it, type checkers would accept every name

    def __getattr__(name: str) -> typing.Any:
        """Returns a public name or module, imported on first use."""
        if name in _MODULES:
            value = importlib.import_module(f"{__name__}.{_MODULES[name]}")
        elif name in _HOMES:
            value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """Returns the public names, for tab completion."""
    return sorted(__all__)
