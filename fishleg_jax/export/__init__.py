"""Files and functions for networks after pruning: parameters on disk, ONNX, StableHLO, BCSR.

Needs the extra `export` (`pip install "fishleg-jax[export]"`), whose packages are imported when a
function needs them.
"""

from fishleg_jax.export._params import Loaded, load_params, save_params

__all__ = ["Loaded", "load_params", "save_params"]


def __dir__() -> list[str]:
    """Returns the public names, for tab completion."""
    return sorted(__all__)
