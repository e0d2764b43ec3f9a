"""What `prune_one_shot` is to reach, other than a sparsity: so much kept, or so much lost.

Each of these functions makes a value for its argument `sparsity`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fishleg_jax import _text
from fishleg_jax._checks import arrays, numbers


class Budget(NamedTuple):
    """At most so much is kept; made by `weights`, `bytes`, `flops` and `cost`.

    Attributes:
        unit: `weights`, `bytes`, `flops` or `cost`.
        at_most: how much of it.
        costs: of a weight, in the unit `cost`.
    """

    unit: str
    at_most: float
    costs: Any | None = None

    def __repr__(self) -> str:
        """One line, without the entries of arrays."""
        return _text.one_line(self)


class Limit(NamedTuple):
    """At most so much is lost; made by `loss_increase` and `metric`.

    Attributes:
        unit: `measured` or `predicted` nats per example, or that of a `metric`.
        at_most: how much of it.
        metric: what is measured, for `metric`.
        highest: the highest sparsity that is tried.
        resolution: how near in sparsity the end is looked for.
    """

    unit: str
    at_most: float
    metric: Callable[[Any], float] | None
    highest: float
    resolution: float

    def __repr__(self) -> str:
        """One line, without the entries of arrays."""
        return _text.one_line(self)


Target = Budget | Limit


def weights(at_most: int) -> Budget:
    """At most so many prunable weights are kept.

    Args:
        at_most: their number; with `scope="layer"` at least that of the leaves.

    Returns:
        A target: the lowest sparsity that keeps no more.

    Raises:
        ValueError: not a whole number of at least 1.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
        >>> result = flj.prune_one_shot(
        ...     model, jnp.array([[3.0], [0.1], [2.0]]), flj.inverse.identity(),
        ...     [(jnp.ones((1, 3)), None)], prunable=".*", sparsity=flj.targets.weights(2))
        >>> result.params[:, 0]
        Array([3., 0., 2.], dtype=float32)
    """
    return Budget("weights", numbers.check_count(at_most, "at_most"))


def bytes(at_most: float) -> Budget:
    """The prunable weights that are kept take at most so many bytes, each those of its dtype.

    Indices that a sparse format needs beside the weights are not counted.

    Args:
        at_most: how many bytes.

    Returns:
        A target: the lowest sparsity that keeps no more.

    Raises:
        ValueError: not a positive number.

    Example:
        >>> import fishleg_jax as flj
        >>> flj.targets.bytes(4e6)  # a million weights in float32
        Budget(unit='bytes', at_most=4000000.0, costs=None)
    """
    return Budget("bytes", numbers.check_positive(at_most, "at_most"))


def flops(at_most: float) -> Budget:
    """The prunable weights that are kept make at most so many operations per example.

    They are counted by `weight_costs` on the first batch.  That dear weights are pruned rather
    than cheap ones takes `costs=` as well.

    Args:
        at_most: how many floating-point operations.

    Returns:
        A target: the lowest sparsity that keeps no more.

    Raises:
        ValueError: not a positive number.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
        >>> result = flj.prune_one_shot(
        ...     model, jnp.array([[3.0], [0.1], [2.0]]), flj.inverse.identity(),
        ...     [(jnp.ones((1, 3)), None)], prunable=".*",
        ...     sparsity=flj.targets.flops(3))  # two for each weight
        >>> result.params[:, 0]
        Array([3., 0., 0.], dtype=float32)
    """
    return Budget("flops", numbers.check_positive(at_most, "at_most"))


def cost(at_most: float, costs: Any) -> Budget:
    """The prunable weights that are kept cost at most so much.

    Args:
        at_most: how much.
        costs: of a weight: a pytree like the parameters, for each leaf a number or an array of its
            shape, none negative; `weight_costs` makes some.

    Returns:
        A target: the lowest sparsity that keeps no more.

    Raises:
        ValueError: not a positive number; costs that are none.

    Example:
        >>> import fishleg_jax as flj
        >>> flj.targets.cost(10, {"kernel": 2.0, "bias": 1.0}).at_most
        10.0
    """
    at_most = numbers.check_positive(at_most, "at_most")
    arrays.check_costs_are_numbers(costs)
    return Budget("cost", at_most, costs)


def loss_increase(
    at_most: float, *, measured: bool = True, highest: float = 0.99, resolution: float = 1e-3
) -> Limit:
    """As much is pruned as raises the loss by at most so much.

    In one stage there is one fit, and a bisection over the sparsity with it.  Several stages go
    towards the highest sparsity, by the schedule, until one breaks the limit; the end is then
    looked for between it and the one before, with what is fitted there.

    Args:
        at_most: nats per example, from 0.
        measured: whether the loss is measured, on held-out batches where there are any and else on
            `batches`; both need labels.  Otherwise it is what the compensation predicts, or the sum
            of the scores where it predicts nothing, added up over the stages, which costs no
            evaluation; it is in nats for estimates of the Fisher only, not for the identity.
        highest: the highest sparsity that is tried, in (0, 1).
        resolution: the difference in sparsity at which the bisection ends, in (0, 1); it goes no
            finer than one weight.

    Returns:
        A target.  A loss that does not rise steadily with the sparsity may meet the limit several
        times; then it is one of these.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
        >>> w = jnp.array([[2.0], [0.1], [1.0], [0.2]])
        >>> result = flj.prune_one_shot(
        ...     model, w, flj.inverse.identity(), [(jnp.eye(4), jnp.eye(4) @ w)],
        ...     prunable=".*", sparsity=flj.targets.loss_increase(0.01))  # w² / 8 for each weight
        >>> result.params[:, 0]
        Array([2., 0., 1., 0.], dtype=float32)
    """
    unit = "measured" if numbers.check_flag(measured, "measured") else "predicted"
    return _limit(unit, at_most, "at_most", None, highest, resolution)


def metric(
    function: Callable[[Any], float],
    at_most_drop: float,
    *,
    highest: float = 0.99,
    resolution: float = 1e-3,
) -> Limit:
    """As much is pruned as lowers a metric, such as the accuracy, by at most so much.

    The search is that of `loss_increase`.

    Args:
        function: `(params) -> number`, higher is better: measured on training or calibration data,
            not on the data reported on.  It is called for every sparsity that is tried.
        at_most_drop: how far it may fall below that of the weights that came in, from 0, in its
            own unit: 0.01 is one percentage point of an accuracy in [0, 1].
        highest: see `loss_increase`.
        resolution: see `loss_increase`; a metric of few examples has steps of its own.

    Returns:
        A target.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
        >>> result = flj.prune_one_shot(
        ...     model, jnp.array([[3.0], [0.1], [2.0]]), flj.inverse.identity(),
        ...     [(jnp.ones((1, 3)), None)], prunable=".*",
        ...     sparsity=flj.targets.metric(lambda w: float(w.sum()), at_most_drop=1.0))
        >>> result.params[:, 0]
        Array([3., 0., 2.], dtype=float32)
    """
    numbers.check_function(function, "function", 1, "a function (params) -> number")
    return _limit("metric", at_most_drop, "at_most_drop", function, highest, resolution)


def _limit(unit: str, at_most: float, name: str, function: Any, *grid: float) -> Limit:
    at_most = numbers.check_not_negative(at_most, name)
    highest, resolution = (
        numbers.check_number(value, argument, lambda x: 0 < x < 1, "a number in (0, 1)")
        for argument, value in zip(("highest", "resolution"), grid, strict=True)
    )
    return Limit(unit, at_most, function, highest, resolution)


__all__: Sequence[str] = ("bytes", "cost", "flops", "loss_increase", "metric", "weights")


def __dir__() -> list[str]:
    """The public names, for completion."""
    return sorted(__all__)
