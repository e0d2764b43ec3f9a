"""Selection that lowers the loss without compensation: a QUBO."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _text
from fishleg_jax._checks.numbers import check_count, check_not_negative
from fishleg_jax._jit import jitted
from fishleg_jax.pruning.selection._annealing import anneal, require_sampler
from fishleg_jax.pruning.selection._border import Selection, gather, scatter
from fishleg_jax.pruning.selection._choice import Free, choosing
from fishleg_jax.pruning.selection._swap_search import swap_search

SOLVERS = ("swaps", "annealing")


def qubo(
    *,
    border: int = 256,
    solver: str = "swaps",
    damping: float | None = None,
    steps: int = 1000,
    reads: int = 32,
    sweeps: int = 1000,
    seed: int = 0,
) -> Selection:
    """Swaps pruned weights with kept ones while that lowers the loss without compensation.

    The set S costs `½ w_Sᵀ F_SS w_S` with the damped Fisher: a quadratic form in binary variables
    of a given sum, a QUBO.  It is a surrogate that ignores the later compensation by kept weights.
    Only the weights nearest to the threshold are free; the other pruned weights add linear terms.
    Costs one exact Fisher product for these, and one for every weight of the border.

    Args:
        border: Number of free weights, half of them on either side of the threshold, 256 by
            default.
        solver: `swaps`, the default, for `swap_search`, `annealing` for simulated annealing by
            dwave-samplers (`pip install fishleg_jax[selection]`).
        damping: Damping γ, in units of the Fisher per example; None takes that of the estimate's
            state, or zero if it has none.
        steps: Largest number of swaps, 1000 by default, for `swaps`.
        reads: Number of starts of the annealing, 32 by default; the best result wins.
        sweeps: Number of passes over the weights in each read, 1000 by default.
        seed: Seed of the annealing, 0 by default.

    Returns:
        A selection.  It ignores the gradient; with `costs`, of equal scores the dearer weight still
        goes first, as for `swaps`.  If numbers are not finite the mask stays as it is.

    Raises:
        ValueError: An argument out of its range, an unknown solver.
        ImportError: The solver is `annealing` and dwave-samplers is not installed.

    References:
        Yu et al., The combinatorial brain surgeon, ICML 2022.

    Example:
        >>> import jax, jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
        >>> inputs = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.7]])
        >>> weights = jnp.array([[1.0], [1.0], [1.0]])
        >>> result = flj.prune_one_shot(
        ...     model, weights, flj.inverse.identity(), [(inputs, None)],
        ...     sparsity=0.67, prunable=".*", selection=flj.selection.qubo())
        >>> result.masks[:, 0].tolist()
        [True, False, False]
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {_text.shown(solver)}")
    if damping is not None:
        damping = check_not_negative(damping, "damping", " or None")
    steps, reads = check_count(steps, "steps"), check_count(reads, "reads")
    sweeps, seed = check_count(sweeps, "sweeps"), check_count(seed, "seed", least=0)
    if solver == "annealing":
        require_sampler()

    def choose(free: Free) -> jax.Array:
        gamma = getattr(free.state, "damping", 0.0) if damping is None else damping
        form, start, groups = _quadratic_form(free, gamma), free.edge.pruned, free.groups
        if solver == "swaps":
            return swap_search(*form, start, objective="qubo", groups=groups, steps=steps).pruned
        return anneal(*form, start, groups=groups, reads=reads, sweeps=sweeps, seed=seed).pruned

    return choosing(border, choose, curvature_for="the Fisher products of a QUBO")


def _quadratic_form(free: Free, gamma: Any) -> tuple[jax.Array, jax.Array]:
    """Arrays c and H of `qubo_cost` on the border."""
    params, leaves, places = free.params, free.edge.leaves, free.edge.places
    product = free.curvature.product
    weights = jitted(gather)(free.target, leaves, places)
    others = jax.tree.map(lambda u, m: jnp.where(m, u, 0), free.target, free.gone)
    linear = weights * jitted(gather)(product(params, others), leaves, places)
    # a loop on the host, as XLA for the CPU is slow at convolutions inside its own
    rows = []
    for unit in np.eye(len(leaves), dtype=weights.dtype):
        image = product(params, jitted(scatter)(params, leaves, places, unit))
        rows.append(jitted(gather)(image, leaves, places))
    fisher = jnp.stack(rows) + gamma * jnp.eye(len(leaves), dtype=weights.dtype)
    return linear, jnp.outer(weights, weights) * (fisher + fisher.T) / 2
