"""What stands around an optimiser: a pruning that it does not see, and mini-steps."""

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


class PruneState(NamedTuple):
    """State of `prune`.

    Attributes:
        pruning: that of the gradual pruning.
        inner: that of the optimiser inside.
    """

    pruning: GradualState
    inner: Any

    def __repr__(self) -> str:
        """One line, without the entries of arrays."""
        return _text.one_line(self)


class Options(TypedDict, total=False):
    """The keyword arguments of `fishleg_prune`, for type checkers and completion in `prune`."""

    prunable: _prunable.LeafSelection | Leaves
    masks: Any | None
    scope: str
    damping: float | None
    aux_every: int
    aux_optimizer: optax.GradientTransformation | None
    mask_every: int
    compensation: _compensation.Compensation | None
    estimator: InverseFisher | None
    renew: int | None
    regrow: float | Callable[[jax.Array], Any] | None
    examples_per_chunk: int | None
    axis_name: str | None
    seed: int


def prune(
    inner: optax.GradientTransformation,
    model: Model,
    sparsity: Sparsity,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    """An optimiser with gradual pruning around it, which sees nothing of pruned weights.

    Their gradients are zero where the optimiser clips and takes moments, norms and trust ratios,
    and what it keeps of them is put to zero, as the last in a chain can't do.  What comes out ends
    in the same exact zeros.

    Args:
        inner: the optimiser; whatever clips or decays belongs in here.
        model: see `fishleg_prune`.
        sparsity: see `fishleg_prune`.
        **options: those of `fishleg_prune`.

    Returns:
        A transformation whose state is a `PruneState`.  Its `update` takes the same arguments as
        that of `fishleg_prune`; `grad` is by default the gradient that comes in.

    Raises:
        ValueError: see `fishleg_prune`.

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
            kept = apply_mask(updates, state.pruning.masks)
            moved, inner_state = inner.update(kept, state.inner, params, **extra)
        else:
            moved, inner_state = updates, state.inner  # refused in a moment
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
        return out, PruneState(pruned, _cut(inner_state, pruned.masks))

    return optax.GradientTransformationExtraArgs(init, update)


def _explicit(function: Any) -> inspect.Signature:
    """The signature of `prune` with those options by name, for help and `inject_hyperparams`."""
    own = inspect.signature(function)
    positional = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = inspect.signature(fishleg_prune).parameters.values()
    return own.replace(parameters=[*positional, *(p for p in options if p.kind is p.KEYWORD_ONLY)])


prune.__signature__ = _explicit(prune)


def _cut(state: Any, masks: Any) -> Any:
    """A state with zeros in what it keeps of pruned weights: moments and the like.

    These are the leaves whose path ends in that of a weight, and that have its shape and are
    floating-point numbers.
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
    """`optax.MultiSteps` that has the curvature of a gradual pruning paid for once a step.

    optax calls the optimiser at every mini-step and throws all but the last away.  This one says
    which is the last, on whose batch the curvature then is assimilated.
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
            opt: The optimiser, with the gradual pruning in it.
            every_k_schedule: Number of mini-steps in a step; an integer, or a function of the step.
            use_grad_mean: Whether the gradients of a step's mini-steps are averaged; their sum is
                taken otherwise.
            should_skip_update_fn: Decides by the gradients whether a mini-step is left out, see
                `optax.MultiSteps`; None for all of them.
            **options: What else `optax.MultiSteps` takes, in its newer versions.

        Raises:
            ValueError: an argument of another type.
        """
        check_optimizer(opt, "opt")
        if not callable(every_k_schedule):
            check_count(every_k_schedule, "every_k_schedule")
        super().__init__(opt, every_k_schedule, use_grad_mean, should_skip_update_fn, **options)

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        """See `optax.MultiSteps.update`."""
        last = state.mini_step == self._every_k_schedule(state.gradient_step) - 1
        return super().update(updates, state, params, emit=last, **extra)

    def gradient_transformation(self) -> optax.GradientTransformationExtraArgs:
        """A transformation that hands extra arguments on, as that of optax does not."""
        return optax.GradientTransformationExtraArgs(self.init, self.update)


__all__: Sequence[str] = ("MultiSteps", "PruneState", "prune")
