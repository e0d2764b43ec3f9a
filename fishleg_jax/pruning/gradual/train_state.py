"""A mixin for flax's `TrainState`, which drops the arguments that a gradual pruning needs."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import optax

from fishleg_jax.model import BatchLike


class TrainStateMixin:
    """Makes a flax `TrainState` pass the batch on to `fishleg_prune`.

    `flax.training.train_state.TrainState` calls the optimiser with gradients and weights alone,
    which leaves no data for a curvature.  Put this class in front of it; `flax.nnx` does not need
    it, as `nnx.Optimizer.update(model, grads, batch=batch)` passes the batch on.

    Example:
        >>> import dataclasses, jax.numpy as jnp, optax, fishleg_jax as flj
        >>> @dataclasses.dataclass
        ... class TrainState:  # stands in for that of flax.training.train_state
        ...     params: dict
        ...     tx: optax.GradientTransformation
        ...     opt_state: tuple
        ...     def replace(self, **fields):
        ...         return dataclasses.replace(self, **fields)
        ...     def apply_gradients(self, *, grads, **kwargs):
        ...         updates, state = self.tx.update(grads, self.opt_state, self.params)
        ...         params = optax.apply_updates(self.params, updates)
        ...         return self.replace(params=params, opt_state=state, **kwargs)
        >>> class PruningTrainState(flj.TrainStateMixin, TrainState):
        ...     pass
        >>> model = flj.Model(lambda params, x: x @ params["kernel"], flj.likelihoods.gaussian())
        >>> estimator = flj.inverse.diagonal(model)
        >>> pruning = flj.fishleg_prune(model, 0.5, estimator=estimator, prunable="kernel")
        >>> tx = optax.chain(optax.sgd(0.1), pruning)
        >>> params, batch = {"kernel": jnp.ones((4, 1))}, (jnp.eye(4), jnp.zeros((4, 1)))
        >>> state = PruningTrainState(params, tx, tx.init(params))
        >>> state = state.apply_gradients(grads=params, batch=batch)
        >>> int((state.params["kernel"] == 0).sum())
        2
    """

    def apply_gradients(
        self,
        *,
        grads: Any,
        batch: BatchLike | None = None,
        extra_args: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Makes a step, as flax does.

        Args:
            grads: Gradients, a pytree like the parameters.
            batch: Batch that they were taken on, `(inputs, targets[, constants])`.
            extra_args: Further arguments for the `update` of `fishleg_prune`, such as
                `{"hold": True}`; None for no others.
            **kwargs: Fields to replace, such as `batch_stats`.

        Returns:
            The state after the step, of the same class.
        """
        whole: Any = self  # the class of flax stands behind this one
        tx = whole.tx
        extra = dict(extra_args or {}, batch=batch)
        update = partial(optax.with_extra_args_support(tx).update, **extra)
        seeing = whole.replace(tx=tx._replace(update=update))
        stepped = super(TrainStateMixin, seeing).apply_gradients(grads=grads, **kwargs)
        return stepped.replace(tx=tx)


__all__: Sequence[str] = ("TrainStateMixin",)
