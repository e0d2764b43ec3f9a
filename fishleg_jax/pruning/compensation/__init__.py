"""Changes of the kept weights that make up for the pruned ones.

A compensation is a function `(params, old_mask, new_mask, curvature, estimator, state) -> (delta,
info)`: a change of the parameters that makes the newly pruned ones exactly zero, and a dictionary
of numbers to report.  The state may be prepared for many products (`InverseFisher.prepare`), so a
compensation must not update it or change its damping.  With `adjustable=` it also receives the
keyword `adjustable`, a pytree of one boolean for each leaf: leaves that are False must not move.
"""

from fishleg_jax.pruning.compensation._group import group
from fishleg_jax.pruning.compensation._independent import STEPS, Compensation, independent, none

__all__ = ["STEPS", "Compensation", "group", "independent", "none"]


def __dir__() -> list[str]:
    """Public names, for completion."""
    return sorted(__all__)
