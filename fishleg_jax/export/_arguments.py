"""Arguments that the functions of this room share, checked."""

from collections.abc import Callable
from typing import Any

import jax

from fishleg_jax import _tree
from fishleg_jax._checks import numbers
from fishleg_jax.model import Model
from fishleg_jax.pruning.masks.groups import check_masks

OUTSIDE = "it compiles the function itself"  # why a function of this room refuses traced arrays


def function_of(function: Any, inputs: tuple[Any, ...]) -> Callable[..., Any]:
    """Returns a user's function, or that of a model, if it takes parameters and these inputs.

    Raises:
        ValueError: Anything else.
    """
    function = function.predict if isinstance(function, Model) else function
    names = "inputs" if len(inputs) == 1 else f"{len(inputs)} inputs"
    expected = f"a function (params, {names}) -> outputs, or a Model"
    numbers.check_function(function, "function", 1 + len(inputs), expected)
    return function


def as_tuple(example_inputs: Any) -> tuple[Any, ...]:
    """Inputs of a function as a tuple, or raises a ValueError if there is no array in them."""
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    if not jax.tree.leaves(inputs):
        raise ValueError("example_inputs must have at least one array, got none")
    return inputs


def masked(params: Any, masks: Any | None) -> Any:
    """Parameters with zeros outside the masks, if there are any.

    Raises:
        ValueError: Masks of another structure, shape or dtype.
    """
    if masks is None:
        return params
    check_masks(params, masks)
    return _tree.apply_mask(params, masks)
