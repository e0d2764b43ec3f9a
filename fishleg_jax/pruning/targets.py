"""Values of `sparsity` in `prune_one_shot` other than a number: a budget, a limit, or masks."""

from collections.abc import Callable
from typing import Any

from fishleg_jax._checks import arrays, numbers
from fishleg_jax.pruning.target_types import Budget, Given, Limit
from fishleg_jax.pruning.target_types import Target as Target


def weights(at_most: int) -> Budget:
    """Target that keeps at most a number of prunable weights.

    Args:
        at_most: Number of weights; with `scope="layer"` at least the number of leaves.

    Returns:
        A target: the lowest sparsity that keeps no more.

    Raises:
        ValueError: Not a whole number of at least 1.

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
    """Target whose kept prunable weights take at most a number of bytes, by their dtypes.

    Indices that a sparse format stores beside the weights are not counted.

    Args:
        at_most: Number of bytes.

    Returns:
        A target: the lowest sparsity that keeps no more.

    Raises:
        ValueError: Not a positive number.

    Example:
        >>> import fishleg_jax as flj
        >>> flj.targets.bytes(4e6)  # a million weights in float32
        Budget(unit='bytes', at_most=4000000.0, costs=None)
    """
    return Budget("bytes", numbers.check_positive(at_most, "at_most"))


def flops(at_most: float) -> Budget:
    """Target whose kept prunable weights take part in at most a number of operations per example.

    They are counted by `weight_costs` on the first batch.  To prune dear weights rather than cheap
    ones, set the costs of `flj.Leaves` as well.

    Args:
        at_most: Number of floating-point operations per example.

    Returns:
        A target: the lowest sparsity that keeps no more.

    Raises:
        ValueError: Not a positive number.

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


def seconds(at_most: float) -> Budget:
    """Target for `choose_units`: a smaller network that takes at most some time for its inputs.

    The time is measured on the device at hand after compilation, in turn with that of the whole
    network: the ratio of the shortest of fifteen calls each, times the whole network's shortest.

    Args:
        at_most: Seconds for one call of the compiled network.

    Returns:
        A target.  Scattered zeros save no time, so `prune_one_shot` refuses it.

    Raises:
        ValueError: Not a positive number.

    Example:
        >>> import fishleg_jax as flj
        >>> flj.targets.seconds(0.01)
        Budget(unit='seconds', at_most=0.01, costs=None)
    """
    return Budget("seconds", numbers.check_positive(at_most, "at_most"))


def time_share(at_most: float) -> Budget:
    """Target for `choose_units`: a smaller network that takes at most a share of the whole's time.

    As `seconds`, without need to know how long the whole network takes: machines are faster at one
    moment than at the next, ratios measured in turn less so.

    Args:
        at_most: Time of one call of the compiled network, as a share of the whole network's, in
            (0, 1].

    Returns:
        A target.  Scattered zeros save no time, so `prune_one_shot` refuses it.

    Raises:
        ValueError: Not a number in (0, 1], such as a percentage.

    Example:
        >>> import fishleg_jax as flj
        >>> flj.targets.time_share(0.5)
        Budget(unit='time_share', at_most=0.5, costs=None)
    """
    expected = "a share of the whole network's time, in (0, 1]"
    return Budget("time_share", numbers.check_number(at_most, "at_most", _is_share, expected))


def cost(at_most: float, costs: Any) -> Budget:
    """Target whose kept prunable weights have at most a given total cost.

    Args:
        at_most: Upper bound on the total cost, in the unit of `costs`.
        costs: Cost of each weight: a pytree like the parameters, with a number or an array of the
            leaf's shape for each leaf, none negative; `weight_costs` returns one.

    Returns:
        A target: the lowest sparsity that keeps no more.

    Raises:
        ValueError: Not a positive number; invalid costs.

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
    """Target that prunes as much as raises the loss by at most a given amount.

    A single stage has one fit, and bisects over the sparsity with it.  Several stages go towards
    the highest sparsity, by the schedule, until one exceeds the limit; the end is then bisected
    between it and the stage before, with the inverse fitted there.

    Args:
        at_most: Highest increase of the loss in nats per example, from 0.
        measured: Whether to measure the loss, True by default, on held-out batches if there are any
            and else on `batches`; both need labels.  False takes the increase that the compensation
            predicts, or the sum of the scores if it predicts nothing, summed over the stages, which
            costs no evaluation; it is in nats for estimates of the Fisher only, not for the
            identity.
        highest: Highest sparsity to try, in (0, 1), 0.99 by default.
        resolution: Difference in sparsity at which the bisection ends, in (0, 1), 0.001 by default;
            it goes no finer than one weight.

    Returns:
        A target.  A loss that does not rise monotonically with the sparsity may cross the limit
        several times; the target is then one of these sparsities.

    Raises:
        ValueError: An argument out of its range.

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
    """Target that prunes as much as lowers a metric, such as the accuracy, by a given amount.

    The search is that of `loss_increase`.

    Args:
        function: Function `(params) -> number`, higher is better: measured on training or
            calibration data, not on the data reported on.  It is called at every sparsity that is
            tried.
        at_most_drop: Largest drop below the metric of the initial weights, from 0, in the metric's
            unit: 0.01 is one percentage point of an accuracy in [0, 1].
        highest: Highest sparsity to try, in (0, 1), 0.99 by default.
        resolution: Difference in sparsity at which the bisection ends, in (0, 1), 0.001 by default;
            it goes no finer than one weight, and a metric of few examples has steps of its own.

    Returns:
        A target.

    Raises:
        ValueError: An argument out of its range.

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


def masks(masks: Any) -> Given:
    """Target that ends at masks chosen elsewhere, such as by `choose_units`, and compensates.

    Args:
        masks: Pytree of booleans like the parameters, False for pruned; any leaf may have some.

    Returns:
        A target.  Scores decide which of these weights go first if there are several stages.

    Example:
        >>> import fishleg_jax as flj
        >>> flj.targets.masks({"bias": False}).masks
        {'bias': False}
    """
    return Given(masks)


def _is_share(x: float) -> bool:
    return 0 < x <= 1


def _limit(unit: str, at_most: float, name: str, function: Any, *grid: float) -> Limit:
    at_most = numbers.check_not_negative(at_most, name)
    highest, resolution = (
        numbers.check_number(value, argument, lambda x: 0 < x < 1, "a number in (0, 1)")
        for argument, value in zip(("highest", "resolution"), grid, strict=True)
    )
    return Limit(unit, at_most, function, highest, resolution)


__all__ = [
    "bytes",
    "cost",
    "flops",
    "loss_increase",
    "masks",
    "metric",
    "seconds",
    "time_share",
    "weights",
]


def __dir__() -> list[str]:
    """Public names, for completion."""
    return sorted(__all__)
