"""Packages of the extra `export`, imported on first use."""

import importlib
from types import ModuleType

INSTALL = 'pip install "fishleg-jax[export]"'


def package(name: str, purpose: str) -> ModuleType:
    """Imports a package of the extra.

    Args:
        name: Name of the module.
        purpose: What needs it, such as `to_onnx`, for the error message.

    Raises:
        ImportError: The package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != name.partition(".")[0]:
            raise
        raise ImportError(f"{purpose} needs {name}: {INSTALL}", name=name) from None
