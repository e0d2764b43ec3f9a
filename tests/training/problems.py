"""Small problems to train on: least squares, and a network of two layers."""

import jax
import jax.numpy as jnp
import optax

import fishleg_jax as flj

STEPS = 12
RATE = 3.0  # the empirical Fisher is large where residuals are


def predict(params, x):
    return x @ params["w"] + params["b"]


LINEAR = flj.Model(predict, flj.likelihoods.gaussian())
DIAGONAL = flj.inverse.diagonal(LINEAR, 0.1, labels="empirical")


def initial(dtype=jnp.float32):
    weights = jax.random.normal(jax.random.key(0), (4, 3)).astype(dtype)
    return {"w": weights, "b": jnp.zeros(3, dtype)}


def batches(steps=STEPS, examples=8, dtype=jnp.float32):
    """A batch for every step, stacked."""
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (steps, examples, 4)) * jnp.array([0.1, 0.5, 1.0, 3.0])
    y = x @ jax.random.normal(keys[1], (4, 3)) + jax.random.normal(keys[2], (steps, examples, 3))
    return jax.tree.map(lambda a: a.astype(dtype), (x, y))


def lowered(params, data=None):
    """Loss on all batches over that of the initial weights."""
    whole = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batches() if data is None else data)
    return float(flj.loss(LINEAR, params, whole) / flj.loss(LINEAR, initial(), whole))


def at(index, tree):
    return jax.tree.map(lambda x: x[index], tree)


def gradient(params, batch, model=LINEAR):
    return jax.grad(lambda p: flj.loss(model, p, batch))(params)


def make_step(tx, model=LINEAR, **extra):
    """`(params, state), batch -> (params, state), loss`."""
    tx = optax.with_extra_args_support(tx)

    def step(carry, batch):
        params, state = carry
        value, grads = jax.value_and_grad(lambda p: flj.loss(model, p, batch))(params)
        updates, state = tx.update(grads, state, params, batch=batch, **extra)
        return (optax.apply_updates(params, updates), state), value

    return step


def train(tx, params=None, data=None, model=LINEAR, **extra):
    """A `lax.scan` over batches: weights and state at the end, and the losses."""
    params = initial() if params is None else params
    data = batches() if data is None else data
    step = make_step(tx, model, **extra)
    run = jax.jit(lambda params, state, data: jax.lax.scan(step, (params, state), data))
    (params, state), losses = run(params, tx.init(params), data)
    return params, state, losses
