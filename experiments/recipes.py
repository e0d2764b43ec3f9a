"""What a user of flax needs for `fishleg_jax.fishleg_prune`; the rest of the recipes are its tests.

`flax.nnx.Optimizer.update(model, grads, batch=batch)` hands the batch on; `TrainState` does not.
"""

from functools import partial
from typing import Any

from flax.training import train_state


class PruningTrainState(train_state.TrainState):
    """A `TrainState` whose `apply_gradients` hands the batch to the transformation.

    Example:
        >>> import jax.numpy as jnp, optax, fishleg_jax as flj
        >>> model = flj.Model(lambda params, x: x @ params["kernel"], flj.likelihoods.gaussian())
        >>> estimator = flj.inverse.diagonal(model)
        >>> tx = optax.chain(optax.sgd(0.1), flj.fishleg_prune(model, 0.5, estimator=estimator))
        >>> params, batch = {"kernel": jnp.ones((4, 1))}, (jnp.eye(4), jnp.zeros((4, 1)))
        >>> state = PruningTrainState.create(apply_fn=model.predict, params=params, tx=tx)
        >>> state = state.apply_gradients(grads=params, batch=batch)
        >>> flj.sparsity(state.params)
        0.5
    """

    def apply_gradients(
        self, *, grads: Any, batch: tuple | None = None, told: dict | None = None, **kwargs: Any
    ) -> "PruningTrainState":
        """Makes a step.

        Args:
            grads: the gradients, like the parameters.
            batch: what they were taken on, `(inputs, targets[, constants])`.
            told: what else the `update` of `fishleg_prune` is told, such as `{"hold": True}`.
            **kwargs: fields to replace, such as `batch_stats`.
        """
        tx, told = self.tx, told or {}
        seeing = self.replace(tx=tx._replace(update=partial(tx.update, batch=batch, **told)))
        stepped = train_state.TrainState.apply_gradients(seeing, grads=grads, **kwargs)
        return stepped.replace(tx=tx)
