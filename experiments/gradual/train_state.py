"""The `TrainState` of flax for `fishleg_jax.fishleg_prune`; the other recipes are its tests."""

from flax.training import train_state

import fishleg_jax as flj


class PruningTrainState(flj.TrainStateMixin, train_state.TrainState):
    """A `TrainState` whose `apply_gradients` hands the batch to the transformation.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> model = flj.Model(lambda params, x: x @ params["kernel"], flj.likelihoods.gaussian())
        >>> estimator = flj.inverse.diagonal(model)
        >>> pruning = flj.fishleg_prune(model, 0.5, estimator=estimator, prunable="kernel")
        >>> tx = optax.chain(optax.sgd(0.1), pruning)
        >>> params, batch = {"kernel": jnp.ones((4, 1))}, (jnp.eye(4), jnp.zeros((4, 1)))
        >>> state = PruningTrainState.create(apply_fn=model.predict, params=params, tx=tx)
        >>> state = state.apply_gradients(grads=params, batch=batch)
        >>> flj.sparsity(state.params, "kernel")
        0.5
    """
