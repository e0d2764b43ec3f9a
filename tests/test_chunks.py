"""Bounded memory: whatever the chunk, also one that does not divide, the result is the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fishleg_jax as flj
from tests import dense
from tests.marks import some_slow

MODEL = dense.categorical_mlp()
EXAMPLES, CHUNK = 12, 5

UPDATES = 6
# with fewer samples in the start eigenvectors would not be unique; Adam would make a step out of
# the rounding of a gradient that is zero, as along the sum of logits
fishleg = functools.partial(
    flj.inverse.fishleg, learn=True, start=4, updates=UPDATES, optimizer=optax.sgd(1e-2)
)
ESTIMATORS = {
    "fishleg": flj.inverse.fishleg,
    "fishleg, groups, sampled": functools.partial(
        flj.inverse.fishleg, kind="sampled", examples_per_sample=2
    ),
    "fishleg, learning": fishleg,
    "fishleg, sampled, probe": functools.partial(fishleg, kind="sampled", probe="gradient"),
    "woodfisher": functools.partial(flj.inverse.woodfisher, gradients=100, block_size=5),
    "mfac": functools.partial(flj.inverse.mfac, window=100),
    "kfac": flj.inverse.kfac,
    "kfac, means of 6": functools.partial(flj.inverse.kfac, examples_per_gradient=6),
    "diagonal": flj.inverse.diagonal,
}


def problem():
    params = dense.mlp_params(jax.random.key(1))
    return params, dense.classification_batch(jax.random.key(2), EXAMPLES)


def close(found, expected, atol=1e-13):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), found, expected)


# variants of others, which take long to compile
VARIANTS = ("fishleg, groups, sampled", "fishleg, sampled, probe", "kfac, means of 6")


@pytest.mark.parametrize("name", some_slow(ESTIMATORS, lambda name: name in VARIANTS))
def test_updates(x64, name):
    params, batch = problem()

    def fitted(chunk):
        estimator = ESTIMATORS[name](MODEL, examples_per_chunk=chunk)
        state = jax.jit(estimator.init)(params)
        update = jax.jit(estimator.update)
        for i in range(UPDATES):
            state = update(state, params, batch, jax.random.key(i))
        assert state.guard.skipped == 0 if hasattr(state, "guard") else state.skipped == 0
        return state, jax.jit(estimator.multiply)(state, params)

    close(fitted(CHUNK), fitted(None), atol=1e-10)


@pytest.mark.parametrize("kind", ["exact", "sampled", "empirical"])
def test_curvature(x64, kind):
    params, (inputs, labels) = problem()
    batches = [(inputs[:7], labels[:7]), (inputs[7:], labels[7:])]
    v = dense.random_like(jax.random.key(3), params)

    def all_of(chunk):
        around = flj.curvature(
            MODEL, batches, kind=kind, key=jax.random.key(4), examples_per_chunk=chunk
        )
        return around.loss(params), around.gradient(params), around.product(params, v)

    expected = all_of(None)
    close(all_of(3), expected)
    if kind != "sampled":  # whose labels are others under jit
        close(jax.jit(lambda: all_of(3))(), expected)


def test_sampled_products_and_gradients(x64, key):
    params, (inputs, _) = problem()
    options = {"key": key}
    product = functools.partial(
        flj.fisher_vector_product, MODEL, params, (inputs, None), params, kind="sampled", key=key
    )
    compiled = lambda f, chunk: jax.jit(lambda: f(examples_per_chunk=chunk))()
    close(compiled(product, CHUNK), compiled(product, None))
    rows = functools.partial(
        flj.per_example_gradients,
        MODEL,
        params,
        (inputs, None),
        labels="sampled",
        examples_per_gradient=3,
        **options,
    )
    for chunk in (2, CHUNK):
        close(compiled(rows, chunk), compiled(rows, None))


def test_sampled_labels_of_a_shared_log_scale(x64, key):
    """What all examples share is no row of an example."""
    model = flj.Model(lambda p, x: (x @ p["w"], p["s"]), flj.likelihoods.gaussian(None))
    params = {"w": jnp.ones((3, 1)), "s": jnp.array([0.3])}
    batch = (problem()[1][0], None)
    product = functools.partial(
        flj.fisher_vector_product, model, params, batch, params, kind="sampled", key=key
    )
    close(product(examples_per_chunk=CHUNK), product())


def test_a_loss_and_its_gradient(x64):
    params, batch = problem()
    found = jax.value_and_grad(lambda p: flj.loss(MODEL, p, batch, examples_per_chunk=CHUNK))
    close(found(params), jax.value_and_grad(lambda p: flj.loss(MODEL, p, batch))(params))
    chunked = flj.losses(MODEL, params, batch, examples_per_chunk=CHUNK)
    close(chunked, flj.losses(MODEL, params, batch))


def test_a_gradient_has_the_activations_of_one_chunk():
    """Of 64 layers of 64 units on 512 examples: 8 MB, and an eighth of that in chunks."""
    kernels = jnp.ones((64, 64, 64))
    model = flj.Model(
        lambda p, x: functools.reduce(lambda h, w: jnp.tanh(h @ w), p, x),
        flj.likelihoods.gaussian(),
    )
    batch = jax.ShapeDtypeStruct((512, 64), float), jax.ShapeDtypeStruct((512, 64), float)

    def temporary(chunk):
        gradient = jax.grad(lambda p, b: flj.loss(model, list(p), b, examples_per_chunk=chunk))
        return (
            jax.jit(gradient).lower(kernels, batch).compile().memory_analysis().temp_size_in_bytes
        )

    assert temporary(64) < temporary(None) / 2


def test_pruning_and_trust():
    params, batch = problem()
    estimator = flj.inverse.diagonal(MODEL)

    def pruned(chunk):
        return flj.prune_one_shot(
            MODEL,
            params,
            estimator,
            [batch],
            sparsity=0.5,
            compensation=flj.compensation.group(iterations=3),
            stages=flj.Stages(examples_per_chunk=chunk),
        ).params

    close(pruned(CHUNK), pruned(None), atol=1e-5)
    with pytest.raises(ValueError, match="examples_per_chunk must be a whole number of at least 1"):
        pruned(0)


def test_gradual_pruning_takes_a_chunk():
    with pytest.raises(ValueError, match="axis_name and examples_per_chunk cannot be combined"):
        flj.fishleg_prune(MODEL, 0.5, examples_per_chunk=2, axis_name="devices")
    with pytest.raises(ValueError, match="examples_per_chunk must be a whole number of at least 1"):
        flj.fishleg_prune(MODEL, 0.5, examples_per_chunk=0)
