"""The curvature `δᵀ F̂ δ` that an estimate of the inverse Fisher gives a change of the weights.

The library's estimates hand out `Q = F̂_γ⁻¹` and nothing else, and what a quadratic model of the
loss needs is the F̂ behind it, without the damping γ, which stands for trust and not for curvature.
Where F̂ is known by its definition it is used directly; no system is solved then:

- `woodfisher` and `mfac`: `F̂ = Σ g gᵀ / m`, so `mean (gᵀδ)²` over the same gradients, whose slopes
  `gᵀδ` are directional derivatives of the losses;
- `kfac`: `F̂ = a ⊗ b`, from the moments in its state.  Its damping is inside the factors, and
  `F̂_γ − γI` would still hold the cross terms `a √γ`, which are often the greater part.

Of all others `Q x = δ` is solved by conjugate gradients, preconditioned with the diagonal of Q, and
the form is `δᵀx − γ ‖δ‖²`; a diagonal Q takes no step at all.  A residual r makes an error of
`rᵀ F̂_γ r` in `δᵀx`, of second order.  Where its relative size stays above 1e-2 the form is NaN.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.sparse.linalg import cg

import fishleg_jax as flj

HIGHEST = jax.lax.Precision.HIGHEST
USABLE_RESIDUAL = 1e-2


class Form(NamedTuple):
    """A quadratic form at a vector.

    Attributes:
        value: `δᵀ F̂ δ`, undamped; NaN where the residual is not small.
        residual: `‖Qx − δ‖ / ‖δ‖` of the system that was solved; 0 where none was.
    """

    value: float
    residual: float


def quadratic_form(
    method: str,
    estimator: flj.InverseFisher,
    state: Any,
    delta: Any,
    slopes: np.ndarray,
) -> Form:
    """The quadratic form of an estimate.

    Args:
        method: its name in `experiments.estimates.methods.METHODS`.
        estimator: the estimate.
        state: its fitted state.
        delta: the change of the weights.
        slopes: of the gradients that it was fitted to, see `gradient_slopes`.

    Returns:
        The undamped form.
    """
    if method in ("woodfisher", "mfac"):
        return Form(float(np.mean(slopes**2)), 0.0)
    if method == "kfac":
        return Form(float(kronecker_form(state, delta)), 0.0)
    value, residual = map(float, _solved_form(estimator)(state, delta))
    return Form(value if residual <= USABLE_RESIDUAL else float("nan"), residual)


def gradient_slopes(
    model: flj.Model,
    params: Any,
    batches: Sequence[tuple],
    delta: Any,
    examples_per_gradient: int = 1,
) -> np.ndarray:
    """The slope `gᵀδ` of every gradient of the data's own labels, without making the gradients.

    Args:
        model: the model.
        params: the weights.
        batches: the data that the estimate was fitted to.
        delta: the change of the weights.
        examples_per_gradient: consecutive examples that share a gradient, that of their mean loss.

    Returns:
        As many numbers as there are gradients; their mean is the slope of the mean loss.
    """
    slopes = [np.asarray(_slopes(model, params, batch, delta), np.float64) for batch in batches]
    return np.concatenate(slopes).reshape(-1, examples_per_gradient).mean(axis=1)


@partial(jax.jit, static_argnames="model")
def _slopes(model, params, batch, delta):
    return jax.jvp(lambda p: flj.losses(model, p, batch), (params,), (delta,))[1]


def exact_form(model: flj.Model, params: Any, batches: Sequence[tuple], delta: Any) -> float:
    """`δᵀ F δ` with the exact Fisher of the data, the Gauss-Newton matrix.

    Args:
        model: the model.
        params: the weights.
        batches: the data.
        delta: the change of the weights.
    """
    # batch by batch from Python: inside a loop XLA for the CPU is slow at gradients of convolutions
    sizes = [len(batch[0]) for batch in batches]
    forms = [float(_exact_form(model, params, batch, delta)) for batch in batches]
    return float(np.average(forms, weights=sizes))


@partial(jax.jit, static_argnames="model")
def _exact_form(model, params, batch, delta):
    return _dot(delta, flj.fisher_vector_product(model, params, batch, delta))


def kronecker_form(state: flj.inverse.KfacState, delta: Any) -> jax.Array:
    """`δᵀ (a ⊗ b) δ` summed over the leaves, and squares of the diagonal for vectors.

    Args:
        state: a fitted state of `inverse.kfac` without a cap.
        delta: the change of the weights.
    """
    count = jnp.maximum(state.count - state.skipped, 1)
    total = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(delta):
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        if state.squares[name] is not None:
            total += jnp.sum(leaf.reshape(-1) ** 2 * state.squares[name]) / count
            continue
        x = y = leaf.reshape(-1, leaf.shape[-1])
        # an axis of size one has no moment
        axes = [axis for axis in (0, 1) if x.shape[axis] > 1]
        for axis, (moment,) in zip(axes, state.moments[name], strict=True):
            y = jnp.tensordot(moment / count, y, axes=(1, axis), precision=HIGHEST)
            y = jnp.moveaxis(y, 0, axis)
        # E[M Mᵀ] and E[Mᵀ M] have the trace of the Fisher, their product shall have it once
        trace = jnp.trace(moment) / count
        total += jnp.sum(x * y) / jnp.maximum(trace, jnp.finfo(x.dtype).tiny) ** (len(axes) - 1)
    return total


def _solved_form(estimator: flj.InverseFisher):
    @jax.jit
    def form(state, delta):
        damping = getattr(state, "damping", 0.0)
        q = estimator.diagonal(state, delta)
        precondition = partial(jax.tree.map, lambda q, v: v / q, q)
        product = partial(estimator.multiply, state)
        start = precondition(delta)
        x, _ = cg(product, delta, x0=start, M=precondition, tol=1e-6, maxiter=1000)
        residual = jax.tree.map(jnp.subtract, product(x), delta)
        value = _dot(delta, jax.tree.map(lambda x, d: x - damping * d, x, delta))
        return value, jnp.sqrt(_dot(residual, residual) / _dot(delta, delta))

    return form


def _dot(x, y):
    return sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), x, y)))
