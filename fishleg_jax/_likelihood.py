"""Type of a likelihood: functions of a network's outputs and targets."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fishleg_jax import _text
from fishleg_jax._checks import numbers

Outputs = Any


class _Functions(NamedTuple):
    """Fields of a `Likelihood`, validated there."""

    negative_log_likelihood: Callable[[Outputs, Any], jax.Array]
    sample: Callable[..., Any] | None = None
    fisher: Callable[..., Outputs] | None = None
    check_targets: Callable[[Outputs, Any], None] | None = None
    takes_targets: bool = False
    root: Callable[..., Outputs] | None = None
    ignore: int | None = None


class Likelihood(_Functions):
    """A distribution `p(target | outputs)` as pure functions.

    Attributes:
        negative_log_likelihood: Function `(outputs, targets) -> (examples,)`, in nats, summed over
            all but the leading axis.  A target outside the distribution's support should make both
            the value and its gradient NaN: estimates skip such gradients and count them.
        sample: Function `(key, outputs) -> targets` that draws one target per output.  None for a
            likelihood without sampling, enough for empirical Fishers and losses.
        fisher: Function `(outputs, tangent) -> cotangent`, the product of the Fisher information in
            output space `E[∇log p ∇log pᵀ]` with a tangent of the same structure as the outputs,
            not averaged over examples.  None for a likelihood without an exact Fisher.
        check_targets: Function `(outputs, targets) -> None` that raises a ValueError for targets
            outside the support.  It is given the shapes and dtypes of the outputs and concrete
            targets, before anything is compiled.  None to skip the check.
        takes_targets: Whether `sample` and `fisher` take a third argument, the batch's targets or
            None, which marks outputs to exclude (padding).  A sample then has the structure and
            shapes of the targets and marks the same outputs.  Default False.
        root: Function `(outputs, tangent) -> cotangent` that multiplies a tangent, of the structure
            of the outputs, by a matrix R with `R Rᵀ` the Fisher in output space; it takes targets
            if `takes_targets`.  Random signs times R are far less heavy-tailed than the scores of
            sampled labels where outputs are nearly certain.  None to sample labels instead.
        ignore: Label of padding, for targets that are class labels: `disagreement` leaves it out of
            its counts, as the functions above leave it out of losses and Fishers.  None, the
            default, if all labels count.

    Raises:
        ValueError: A field that is not a function, a flag that is not a boolean, or a label to
            ignore that is not a whole number.

    Example:
        >>> import jax.numpy as jnp
        >>> from fishleg_jax import likelihoods
        >>> laplace = likelihoods.Likelihood(
        ...     lambda outputs, targets: jnp.abs(outputs - targets).sum(axis=1))
        >>> laplace.negative_log_likelihood(jnp.ones((1, 2)), jnp.zeros((1, 2)))
        Array([2.], dtype=float32)
    """

    __slots__ = ()

    def __new__(
        cls,
        negative_log_likelihood: Callable[[Outputs, Any], jax.Array],
        sample: Callable[..., Any] | None = None,
        fisher: Callable[..., Outputs] | None = None,
        check_targets: Callable[[Outputs, Any], None] | None = None,
        takes_targets: bool = False,
        root: Callable[..., Outputs] | None = None,
        ignore: int | None = None,
    ) -> "Likelihood":
        """Returns the likelihood, or raises a ValueError."""
        functions = negative_log_likelihood, sample, fisher, check_targets
        self = super().__new__(cls, *functions, takes_targets, root, ignore)
        for name, value in zip(self._fields, self, strict=True):
            if name in ("takes_targets", "ignore"):
                continue
            optional = name != "negative_log_likelihood"
            if not callable(value) and not (optional and value is None):
                raise ValueError(
                    f"Likelihood: {name} must be a function{' or None' * optional}, got "
                    f"{_text.shown(value)}"
                )
        numbers.check_flag(self.takes_targets, "takes_targets")
        check_ignore(ignore)
        return self

    @classmethod
    def _make(cls, iterable):  # `_replace` goes through it
        return cls(*iterable)

    def __repr__(self) -> str:
        """Returns one line: the function that built it, and the optional fields that are set."""
        return _text.by_maker(self)


def check_ignore(ignore: int | None) -> int | None:
    """Returns a label of padding as an int, or None; raises a ValueError for anything else."""
    if ignore is None:
        return None
    ignore = numbers.check_count(ignore, "ignore", -(2**31), " or None")
    if ignore >= 2**31:
        raise ValueError(f"ignore must be below 2³¹, got {ignore}")
    return ignore


Likelihood.__module__ = "fishleg_jax.likelihoods"  # where users find it, and pickles look for it


def sum_per_example(values: jax.Array) -> jax.Array:
    return values.reshape(values.shape[0], -1).sum(axis=1)
