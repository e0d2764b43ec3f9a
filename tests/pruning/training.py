"""A small problem to train and prune on: least squares with twelve weights and a bias."""

import functools

import jax
import jax.numpy as jnp
import optax

import fishleg_jax as flj

STEPS = 40


def predict(params, x):
    return x @ params["w"] + params["b"]


MODEL = flj.Model(predict, flj.likelihoods.gaussian())
# labels of the data, so that nothing is random
DIAGONAL = flj.inverse.diagonal(MODEL, labels="empirical", examples_per_gradient=4)
MAGNITUDE = flj.inverse.identity()
CUBIC = flj.schedules.cubic(0.7, begin=5, end=30)
ZEROS = 8  # floor(0.7 · 12)
PRUNING = flj.gradual_prune(DIAGONAL, CUBIC, aux_every=3, mask_every=4)
CHAIN = optax.chain(optax.sgd(0.02), PRUNING)  # one for many tests, as each new one compiles


def initial(dtype=None):
    weights = jax.random.normal(jax.random.key(0), (4, 3)).astype(dtype or jnp.float32)
    return {"w": weights, "b": jnp.zeros(3, weights.dtype)}


def batches(steps=STEPS, examples=16, dtype=None):
    """A batch for every step, stacked."""
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (steps, examples, 4)) * jnp.array([0.1, 0.5, 1.0, 3.0])
    y = x @ jax.random.normal(keys[1], (4, 3)) + jax.random.normal(keys[2], (steps, examples, 3))
    return jax.tree.map(lambda a: a.astype(dtype or jnp.float32), (x, y))


def at(index, tree):
    """One of stacked trees, or some of them."""
    return jax.tree.map(lambda x: x[index], tree)


def gradient(params, batch):
    return jax.grad(lambda p: flj.loss(MODEL, p, batch))(params)


def make_step(tx, **extra):
    """`(params, state), batch -> (params, state), (params, masks)`."""

    def step(carry, batch):
        params, state = carry
        updates, state = tx.update(gradient(params, batch), state, params, batch=batch, **extra)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, flj.masks(state))

    return step


@functools.partial(jax.jit, static_argnums=0)
def _train(tx, params, state, data):
    return jax.lax.scan(make_step(tx), (params, state), data)


def train(tx, params=None, data=None, state=None):
    """A `lax.scan` over batches: weights and state at the end, and weights and masks throughout."""
    params = initial() if params is None else params
    state = tx.init(params) if state is None else state
    (params, state), history = _train(tx, params, state, batches() if data is None else data)
    return params, state, history


def zeros(masks):
    """How many weights are pruned, at the end or at every step."""
    return (~masks["w"]).sum(axis=(-2, -1))
