"""Dense algebra for small models: what the library computes without forming a matrix, formed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import fishleg_jax as flj


def ravel(tree):
    return np.concatenate([np.asarray(x).reshape(-1) for x in jax.tree.leaves(tree)])


def matrix_of(linear, like):
    """The matrix of a linear function of pytrees, column by column."""
    flat, unravel = ravel_pytree(like)
    product = lambda v: ravel_pytree(linear(unravel(v)))[0]
    return np.asarray(jax.jit(lambda vs: jax.lax.map(product, vs))(jnp.eye(flat.size))).T


def estimator_of(inverse):
    """An `InverseFisher` that is one dense matrix, cut to a mask."""

    def masked(tree, mask):
        return tree if mask is None else jax.tree.map(lambda x, m: jnp.where(m, x, 0), tree, mask)

    def multiply(state, v, mask=None):
        flat, unravel = ravel_pytree(masked(v, mask))
        return masked(unravel(inverse @ flat), mask)

    def diagonal(state, params, mask=None):
        return masked(ravel_pytree(params)[1](jnp.diag(inverse)), mask)

    return flj.InverseFisher(
        init=lambda params: (),
        update=lambda state, *_: state,
        multiply=multiply,
        diagonal=diagonal,
    )


# the same with the matrix for its state, so that other matrices compile nothing anew
STATED = flj.InverseFisher(
    init=lambda params: jnp.eye(sum(x.size for x in jax.tree.leaves(params))),
    update=lambda state, *_: state,
    multiply=lambda state, v, mask=None: estimator_of(state).multiply((), v, mask),
    diagonal=lambda state, params, mask=None: estimator_of(state).diagonal((), params, mask),
)


def random_like(key, tree, scale=1.0):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten(
        [scale * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    )


def mlp_params(key, sizes=(3, 4, 3), dtype=None):
    """A nested dictionary {"Dense_i": {"kernel", "bias"}}."""
    leaf = functools.partial(jax.ShapeDtypeStruct, dtype=dtype or jnp.result_type(float))
    shapes = {
        f"Dense_{i}": {"kernel": leaf((m, n)), "bias": leaf((n,))}
        for i, (m, n) in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
    }
    return random_like(key, shapes, 0.7)


def mlp(params, x):
    layers = [params[f"Dense_{i}"] for i in range(len(params))]
    for layer in layers[:-1]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x @ layers[-1]["kernel"] + layers[-1]["bias"]


@functools.cache
def categorical_mlp():
    """One model for all tests, so that what is compiled for it is found again."""
    return flj.Model(mlp, flj.likelihoods.categorical())


def classification_batch(key, examples=12, inputs=3, classes=3, dtype=None):
    input_key, label_key = jax.random.split(key)
    return (
        jax.random.normal(input_key, (examples, inputs), dtype),
        jax.random.randint(label_key, (examples,), 0, classes),
    )


@functools.partial(jax.jit, static_argnums=0)
def jacobian(model, params, batch):
    """Outputs and Jacobians of every example, flat: (examples, outputs), (examples, outputs, d)."""
    flat, unravel = ravel_pytree(params)

    def outputs(w):
        out = model.predict(unravel(w), batch[0], *batch[2:])
        return jnp.concatenate([x.reshape(x.shape[0], -1) for x in jax.tree.leaves(out)], axis=1)

    return outputs(flat), jax.jacrev(outputs)(flat)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def categorical_information(logits):
    p = softmax(logits)
    return np.diag(p) - np.outer(p, p)


def exact_fisher(model, params, batch, information=categorical_information):
    """`E[Jᵀ H J]` with the Fisher in output space given as a matrix of one example's outputs."""
    outputs, jacobians = map(np.asarray, jacobian(model, params, batch))
    terms = [j.T @ information(o) @ j for o, j in zip(outputs, jacobians, strict=True)]
    return np.mean(terms, axis=0)


def gradients(model, params, batch):
    """The gradient of every example's loss, in a loop: (examples, d)."""
    return np.asarray(_gradients(model, params, batch))


@functools.partial(jax.jit, static_argnums=0)
def _gradients(model, params, batch):
    inputs, targets, *constants = batch

    def row(example):
        one = jax.tree.map(lambda x: x[None], example)
        gradient = jax.grad(lambda p: flj.loss(model, p, (*one, *constants)))(params)
        return ravel_pytree(gradient)[0]

    return jax.lax.map(row, (inputs, targets))


def gram(rows):
    return rows.T @ rows / len(rows)


@functools.cache
def _looped(update):
    def loop(state, params, batch, mask, updates, key):
        def step(i, state):
            return update(state, params, batch, jax.random.fold_in(key, i), mask)

        return jax.lax.fori_loop(0, updates, step, state)

    return jax.jit(loop)


def run(estimator, params, batch, updates, key, mask=None, state=None):
    """Many updates on one batch, compiled once an estimator; for models without convolutions."""
    state = estimator.init(params) if state is None else state
    return _looped(estimator.update)(state, params, batch, mask, updates, key)


@functools.cache
def _columns(multiply):
    def columns(state, params, mask):
        flat, unravel = ravel_pytree(params)
        product = lambda v: ravel_pytree(multiply(state, unravel(v), mask))[0]
        return jax.lax.map(product, jnp.eye(flat.size))

    return jax.jit(columns)


def inverse_matrix(estimator, state, params, mask=None):
    """The matrix of an estimator's `multiply`, compiled once an estimator."""
    return np.asarray(_columns(estimator.multiply)(state, params, mask)).T


@functools.cache
def jitted(function):
    """A function compiled, once for all tests: a step at a time has many more to compile."""
    return jax.jit(function)


def inverse_diagonal(estimator, state, params, mask=None):
    """What an estimator's `diagonal` says, as a vector, compiled once an estimator."""
    return ravel(jitted(estimator.diagonal)(state, params, mask))
