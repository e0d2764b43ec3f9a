"""Looking into traced functions."""

from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def opened(function: Jaxpr | ClosedJaxpr) -> Jaxpr:
    """A traced function without its constants."""
    return getattr(function, "jaxpr", function)


def functions(equation: Any) -> list[Jaxpr | ClosedJaxpr]:
    """Every traced function among an equation's parameters, alone or in a tuple."""
    values = [x if isinstance(x, tuple) else (x,) for x in equation.params.values()]
    return [x for group in values for x in group if isinstance(x, (Jaxpr, ClosedJaxpr))]


def has(function: Jaxpr | ClosedJaxpr, name: str) -> bool:
    """Whether there is an operation of this name in a traced function, or in one that it calls."""
    return any(
        equation.primitive.name == name or any(has(inner, name) for inner in functions(equation))
        for equation in opened(function).eqns
    )
