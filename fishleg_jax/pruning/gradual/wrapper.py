"""Wrappers of an optimiser: pruning that the optimiser does not see, and mini-steps."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import optax

from fishleg_jax import _prunable, _text
from fishleg_jax._checks.numbers import check_count
from fishleg_jax._tree import apply_mask
from fishleg_jax.inverse.base import InverseFisher
from fishleg_jax.model import Model
from fishleg_jax.pruning import compensation as _compensation
from fishleg_jax.pruning.gradual.checks import check_optimizer
from fishleg_jax.pruning.gradual.counting import Sparsity
from fishleg_jax.pruning.gradual.fishleg import fishleg_prune
from fishleg_jax.pruning.gradual.state import GradualState
from fishleg_jax.pruning.leaves import Leaves
from fishleg_jax.pruning.masks.densities import Scope
from fishleg_jax.pruning.masks.patterns import Pattern
from fishleg_jax.pruning.scores import Saliency


class PruneState(NamedTuple):
    """State of `prune`.

    Attributes:
        pruning: State of the gradual pruning.
        inner: State of the inner optimiser.
    """

    pruning: GradualState
    inner: Any

    def __repr__(self) -> str:
        """Returns one line, without the entries of arrays."""
        return _text.one_line(self)


class Options(TypedDict, total=False):
    """Keyword arguments of `fishleg_prune`, for type checkers and completion in `prune`."""

    prunable: _prunable.LeafSelection | Leaves
    masks: Any | None
    scope: Scope
    damping: float | None
    aux_every: int
    aux_optimizer: optax.GradientTransformation | None
    mask_every: int
    compensation: _compensation.Compensation | None
    estimator: InverseFisher | None
    renew: int | None
    regrow: float | Callable[[jax.Array], Any] | None
    saliency: Saliency
    training_model: Model | None
    examples_per_chunk: int | None
    axis_name: str | None
    seed: int
    pattern: Pattern | None


def prune(
    inner: optax.GradientTransformation,
    model: Model,
    sparsity: Sparsity | None,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimiser in gradual pruning, so that it sees nothing of pruned weights.

    Gradients of pruned weights are zero where the optimiser clips and computes moments, norms and
    trust ratios, and its state for these weights is reset to zero, which the last transformation of
    a chain can't do.  The updates end in the same exact zeros.  With `regrow` and magnitude scores
    the optimiser does see pruned weights, since its updates are what brings them back.

    Args:
        inner: Optimiser; clipping and weight decay belong in here.
        model: Model, in evaluation mode.
        sparsity: Fraction of the prunable weights that is zero: a number in [0, 1), a function of
            the step (the first is 1) such as `schedules.cubic` returns, or an array by
            `optax.inject_hyperparams`.
        **options: Keyword arguments of `fishleg_prune`.

    Returns:
        A transformation whose state is a `PruneState`.  Its `update` takes the same arguments as
        that of `fishleg_prune`; `grad` is by default the incoming gradient.

    Raises:
        ValueError: An argument that `fishleg_prune` rejects, or an invalid optimiser.

    Example:
        >>> import jax.numpy as jnp, optax, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
        >>> inner = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
        >>> tx = flj.prune(inner, model, 0.5, estimator=flj.inverse.identity(), prunable=".*")
        >>> params = jnp.array([[1.0], [4.0]])
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = tx.update(jnp.array([[9.0], [0.5]]), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> params[:, 0] == 0, state.inner[1][0].trace[:, 0] == 0
        (Array([ True, False], dtype=bool), Array([ True, False], dtype=bool))
    """
    check_optimizer(inner, "inner")
    pruning = fishleg_prune(model, sparsity, **options)
    inner = optax.with_extra_args_support(inner)

    def init(params):
        return PruneState(pruning.init(params), inner.init(params))

    def update(
        updates,
        state,
        params=None,
        *,
        batch=None,
        grad=None,
        assimilate=None,
        hold=False,
        emit=None,
        **extra,
    ):
        if params is not None:
            # Hide pruned weights from the optimiser, unless it moves their shadows.
            hidden = None if state.pruning.shadow is not None else state.pruning.masks
            kept = apply_mask(updates, hidden)
            moved, inner_state = inner.update(kept, state.inner, params, **extra)
        else:
            moved, inner_state = updates, state.inner  # rejected below
        # Prune, and clear the optimiser's state of newly pruned weights.
        out, pruned = pruning.update(
            moved,
            state.pruning,
            params,
            batch=batch,
            grad=updates if grad is None else grad,
            assimilate=assimilate,
            hold=hold,
            emit=emit,
        )
        if pruned.shadow is None:
            inner_state = _cut(inner_state, pruned.masks)
        return out, PruneState(pruned, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _explicit(function: Any) -> inspect.Signature:
    """Signature of `prune` with these options by name, for help and `inject_hyperparams`."""
    own = inspect.signature(function)
    positional = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = inspect.signature(fishleg_prune).parameters.values()
    return own.replace(parameters=[*positional, *(p for p in options if p.kind is p.KEYWORD_ONLY)])


prune.__signature__ = _explicit(prune)


def _cut(state: Any, masks: Any) -> Any:
    """Zeros the entries of pruned weights in an optimiser's state: moments and the like.

    These are the floating-point leaves whose path ends in that of a weight and which have its
    shape.
    """
    by_path = dict(jax.tree_util.tree_leaves_with_path(masks))

    def cut(path, leaf):
        for k in range(len(path) + 1):
            mask = by_path.get(path[k:])
            fits = mask is not None and jnp.shape(leaf) == mask.shape
            if fits and jnp.issubdtype(leaf.dtype, jnp.inexact):
                return jnp.where(mask, leaf, jnp.zeros_like(leaf))
        return leaf

    return jax.tree_util.tree_map_with_path(cut, state)


class MultiSteps(optax.MultiSteps):
    """`optax.MultiSteps` that computes the curvature of a gradual pruning once a step.

    optax calls the optimiser at every mini-step and discards all updates but the last.  This class
    flags the last mini-step, on whose batch the curvature is then assimilated.
    """

    def __init__(
        self,
        opt: optax.GradientTransformation,
        every_k_schedule: int | Callable[[Any], Any],
        use_grad_mean: bool = True,
        should_skip_update_fn: Callable[..., Any] | None = None,
        **options: Any,
    ):
        """Wraps an optimiser.

        Args:
            opt: Optimiser that contains the gradual pruning.
            every_k_schedule: Number of mini-steps in a step; an integer, or a function of the step.
            use_grad_mean: Whether to average the gradients of a step's mini-steps; False sums them.
            should_skip_update_fn: Function that decides by the gradients whether to skip a
                mini-step, as in `optax.MultiSteps`; None skips none.
            **options: Further arguments of `optax.MultiSteps` in its newer versions.

        Raises:
            ValueError: An argument of another type.
        """
        check_optimizer(opt, "opt")
        if not callable(every_k_schedule):
            check_count(every_k_schedule, "every_k_schedule")
        super().__init__(opt, every_k_schedule, use_grad_mean, should_skip_update_fn, **options)

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        """Updates like `optax.MultiSteps.update`, with `emit` set at the last mini-step."""
        last = state.mini_step == self._every_k_schedule(state.gradient_step) - 1
        return super().update(updates, state, params, emit=last, **extra)

    def gradient_transformation(self) -> optax.GradientTransformationExtraArgs:
        """A transformation that passes extra arguments on, unlike that of optax."""
        return optax.GradientTransformationExtraArgs(self.init, self.update)


__all__: Sequence[str] = ("MultiSteps", "PruneState", "prune")
