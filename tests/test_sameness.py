"""Which models are one and the same, and what is done with an estimator of another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fishleg_jax as flj
from fishleg_jax._same_model import same


def linear(params, x, scale=1.0):
    return scale * (x @ params)


def make(scale, inner=None):
    """What a user calls twice, as in two cells of a notebook."""

    def predict(params, x):
        return scale * (linear if inner is None else inner)(params, x)

    return flj.Model(predict, flj.likelihoods.gaussian())


class Network:
    """One of a library's modules, which are equal where their fields are."""

    def __init__(self, width):
        self.width = width

    def __eq__(self, other):
        return self.width == other.width

    __hash__ = None

    def apply(self, params, x):
        return x @ params


ARRAY = np.arange(3.0)
SAME = [
    (linear, linear),
    (make(1.0).predict, make(1.0).predict),
    (make(ARRAY).predict, make(ARRAY.copy()).predict),
    (make(1, make(2).predict).predict, make(1, make(2).predict).predict),
    (functools.partial(linear, scale=2.0), functools.partial(linear, scale=2.0)),
    (flj.likelihoods.categorical(), flj.likelihoods.categorical()),
    (flj.likelihoods.gaussian(0.5), flj.likelihoods.gaussian(0.5)),
    (flj.remat(make(1.0)).predict, make(1.0).predict),
    (flj.remat(make(1.0), 2).predict, flj.remat(make(1.0), 3).predict),
    (jax.jit(linear), linear),
    (Network(3).apply, Network(3).apply),
    (lambda w, x: x @ w, lambda w, x: x @ w),
]
DIFFERENT = [
    (make(1.0).predict, make(2.0).predict),
    (make(ARRAY).predict, make(ARRAY + 1).predict),
    (make(1, make(2).predict).predict, make(1, make(3).predict).predict),
    (functools.partial(linear, scale=2.0), functools.partial(linear, scale=3.0)),
    (functools.partial(linear, scale=2.0), linear),
    (flj.likelihoods.categorical(), flj.likelihoods.gaussian()),
    (flj.likelihoods.gaussian(0.5), flj.likelihoods.gaussian(0.6)),
    (flj.remat(make(1.0)).predict, make(2.0).predict),
    (jax.jit(linear), functools.partial(linear)),
    (Network(3).apply, Network(4).apply),
    (lambda w, x: x @ w, lambda w, x: x @ w + 1),
    (lambda w, x, s=1: x @ w, lambda w, x, s=2: x @ w),
    (lambda w, x: jnp.tanh(x @ w), lambda w, x: jnp.sin(x @ w)),
]


@pytest.mark.parametrize("one, other", SAME)
def test_what_is_made_twice_of_the_same_is_the_same(one, other):
    assert same(one, other) and same(other, one)


@pytest.mark.parametrize("one, other", DIFFERENT)
def test_what_is_made_of_something_else_is_another(one, other):
    assert not same(one, other) and not same(other, one)


def test_functions_that_refer_to_themselves_are_compared():
    def factory(bound):
        def count(params, x):
            return x if bound == 0 else count(params, x)

        return count

    assert same(factory(1), factory(1)) and not same(factory(1), factory(2))


MODEL = make(1.0)
OTHER = flj.Model(linear, flj.likelihoods.gaussian())
UNLIKE = MODEL._replace(likelihood=flj.likelihoods.categorical())
MAKERS = [
    flj.inverse.diagonal,
    flj.inverse.kfac,
    flj.inverse.mfac,
    flj.inverse.fishleg,
    functools.partial(flj.inverse.woodfisher, gradients=4),
]


@pytest.mark.parametrize("maker", MAKERS)
def test_an_estimator_of_another_model_is_refused(maker):
    params, batch = jnp.ones((3, 2)), (jnp.ones((4, 3)), jnp.ones((4, 2)))
    estimator = maker(OTHER)
    message = "its predict is linear \\(line .*that of the model is make.<locals>.predict"
    with pytest.raises(ValueError, match=message):
        flj.prune_one_shot(MODEL, params, estimator, [batch], sparsity=0.5)
    inner = optax.sgd(0.1)
    for tx in (
        flj.gradual_prune(estimator, 0.5, model=MODEL),
        flj.fishleg_prune(MODEL, 0.5, estimator=estimator),
        flj.prune(inner, MODEL, 0.5, estimator=estimator),
    ):
        with pytest.raises(ValueError, match=message):
            tx.init(params)
    with pytest.raises(ValueError, match="its likelihood is categorical and .* is gaussian"):
        flj.fishleg_prune(MODEL, 0.5, estimator=maker(UNLIKE)).init(params)
    with pytest.raises(ValueError, match="its predict is .* with other values inside"):
        flj.fishleg_prune(MODEL, 0.5, estimator=maker(make(2.0))).init(params)
    for model in (make(1.0), flj.remat(MODEL)):
        flj.gradual_prune(maker(model), 0.5, model=MODEL).init(params)
        flj.gradual_prune(maker(MODEL), 0.5, model=model).init(params)


def test_an_estimator_of_a_recomputed_model_prunes_the_model():
    params = jax.random.normal(jax.random.key(0), (3, 2))
    batch = jax.random.normal(jax.random.key(1), (4, 3)), jnp.ones((4, 2))
    masks = [
        flj.prune_one_shot(
            *(MODEL, params, flj.inverse.diagonal(model, labels="empirical"), [batch]),
            sparsity=0.5,
            compensation=flj.compensation.none(),
        ).masks
        for model in (MODEL, flj.remat(MODEL))
    ]
    np.testing.assert_array_equal(*masks)
