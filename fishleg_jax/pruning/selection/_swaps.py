"""Selection that lowers the loss after compensation, by swaps."""

import jax

from fishleg_jax._checks.numbers import check_count, check_tolerance
from fishleg_jax._jit import jitted
from fishleg_jax.pruning.selection._border import Selection
from fishleg_jax.pruning.selection._choice import Free, choosing
from fishleg_jax.pruning.selection._conditional import conditional
from fishleg_jax.pruning.selection._swap_search import swap_search


def swaps(
    *,
    border: int = 256,
    steps: int = 1000,
    iterations: int = 50,
    tolerance: float = 1e-4,
    columns_at_once: int = 16,
) -> Selection:
    """Swaps pruned weights with kept ones while that lowers the loss after compensation.

    The set S costs `½ w_Sᵀ(Q_SS)⁻¹w_S` with Q the estimate of the inverse Fisher: the increase of
    the loss that remains after a group update.  Only the weights nearest to the threshold are free;
    all others stay as the scores decide, and the pruned ones among them count as compensated for:
    weights and inverse on the border are conditional on that, by conjugate gradients with
    `multiply`, so that only the Fisher is approximated, and the solve up to a tolerance.  (`group`
    works with exact Fisher products instead, so its cost need not be lower if the estimate is
    poor.)

    Args:
        border: Number of free weights, half of them on either side of the threshold, 256 by
            default.
        steps: Largest number of swaps, 1000 by default.
        iterations: Largest number of iterations of a solve, 50 by default, each a product with the
            inverse, none with the Fisher; there are `border` + 1 solves.
        tolerance: Residual at which a solve ends, relative to its right side, 0.0001 by default.
        columns_at_once: Number of solves that run at a time, 16 by default; memory is some ten
            times as many copies of the weights.

    Returns:
        A selection.  With `costs` it uses weights whose OBS scores are the divided scores, so that
        of equal scores the dearer weight still goes first.  If numbers are not finite the mask
        stays as it is.

    Raises:
        ValueError: An argument out of its range.

    References:
        Yu et al., The combinatorial brain surgeon, ICML 2022, the problem before it is
        taken apart.

    Example:
        >>> import jax, jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
        >>> inputs = jnp.array([[1.0, 1.0, 0.0], [1.0, 0.9, 0.0], [0.0, 0.0, 1.7]])
        >>> weights = jnp.array([[1.0], [1.0], [1.0]])
        >>> result = flj.prune_one_shot(
        ...     model, weights, flj.inverse.woodfisher(model, gradients=3),
        ...     [(inputs, inputs @ weights + 1)],
        ...     sparsity=0.67, prunable=".*", selection=flj.selection.swaps())
        >>> result.masks[:, 0].tolist()
        [True, False, False]
    """
    steps, iterations = check_count(steps, "steps"), check_count(iterations, "iterations")
    columns_at_once = check_count(columns_at_once, "columns_at_once")
    tolerance = check_tolerance(tolerance)

    def choose(free: Free) -> jax.Array:
        edge = free.edge
        weights, inverse = jitted(conditional, free.estimator, columns_at_once)(
            free.state,
            free.target,
            free.old_masks,
            free.gone,
            edge.leaves,
            edge.places,
            iterations,
            tolerance,
        )
        return swap_search(weights, inverse, edge.pruned, groups=free.groups, steps=steps).pruned

    return choosing(border, choose, with_gradient=True)
