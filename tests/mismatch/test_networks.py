"""Which functions get the constants of batches, and which are refused before they are compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj

KEYS = jax.random.split(jax.random.key(0), 2)
W = jax.random.normal(KEYS[0], (4, 3))
X = jax.random.normal(KEYS[1], (20, 4))
SHIFT = jnp.array([3.0, 0.0, -3.0])  # constants that change predictions
OWN = 2 * SHIFT[::-1]
BATCHES = [(X, (X @ W).argmax(axis=1), SHIFT)]


def plain(x):
    return x @ W


def wanted(shift):
    return np.asarray((X @ W + shift).argmax(axis=1))


def predicted(network, batches=BATCHES):
    return flj.disagreement(network, plain, batches).predictions[0]


def shifted(x, constants):
    return x @ W + constants


def with_params(params, x, constants):
    return x @ params + constants


def with_flag(x, train=False):
    """As networks with dropout: constants for `train` would change the outputs."""
    return x @ W if train is False else -(x @ W)


def keeps_signature(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Network:
    """Callable objects and bound methods."""

    def __call__(self, x, train=False):
        return with_flag(x, train)

    def shifted(self, x, constants):
        return shifted(x, constants)

    def flagged(self, x, *, train=False):
        return with_flag(x, train)


WITHOUT = {
    "default": with_flag,
    "keyword-only flag": lambda x, *, train=False: with_flag(x, train),
    "anything": lambda x, *rest, **options: with_flag(x, *rest, **options),
    "partial flag": functools.partial(lambda x, train: with_flag(x, train), train=False),
    "partial params": functools.partial(lambda w, x, train=False: with_flag(x, train), W),
    "jitted": jax.jit(with_flag, static_argnames="train"),
    "wrapped": keeps_signature(with_flag),
    "object": Network(),
    "bound method": Network().flagged,
    "pair": (lambda w, x, train=False: with_flag(x, train), W),
    "pair of inputs alone": (lambda w, x: x @ w, W),
    "pair with anything": (lambda w, x, *_: x @ w, W),
}
WITH = {
    "positional": lambda x, stats: x @ W + stats,
    "keyword-only": lambda x, *, constants: shifted(x, constants),
    "keyword-only or None": lambda x, *, constants=None: shifted(x, constants),
    "or None": lambda x, constants=None: shifted(x, constants),
    "behind a flag": lambda x, train=False, constants=None: with_flag(x, train) + constants,
    "star": lambda x, *constants: shifted(x, *constants),
    "partial params": functools.partial(with_params, W),
    "partial of a jitted one": functools.partial(jax.jit(with_params), W),
    "partial of a wrapped one": functools.partial(keeps_signature(with_params), W),
    "jitted": jax.jit(shifted),
    "vmapped": jax.vmap(shifted, in_axes=(0, None)),
    "checkpointed": jax.checkpoint(shifted),
    "bound method": Network().shifted,
    "pair": (with_params, W),
    "pair, keyword-only": (lambda w, x, *, constants: with_params(w, x, constants), W),
    "model": (flj.Model(with_params, flj.likelihoods.categorical()), W),
}
OF_ITS_OWN = {
    "default": lambda x, constants=OWN: shifted(x, constants),
    "partial": functools.partial(shifted, constants=OWN),
    "keyword-only": lambda x, *, constants=OWN: shifted(x, constants),
}


def test_the_constants_change_predictions():
    assert (wanted(0) != wanted(SHIFT)).any() and (wanted(SHIFT) != wanted(OWN)).any()
    assert (wanted(0) != wanted(OWN)).any()


@pytest.mark.parametrize("name", WITHOUT)
def test_options_keep_their_default(name):
    np.testing.assert_array_equal(predicted(WITHOUT[name]), wanted(0))


@pytest.mark.parametrize("name", WITH)
def test_parameters_for_constants_get_them(name):
    np.testing.assert_array_equal(predicted(WITH[name]), wanted(SHIFT))


@pytest.mark.parametrize("name", OF_ITS_OWN)
def test_a_function_keeps_constants_of_its_own(name):
    np.testing.assert_array_equal(predicted(OF_ITS_OWN[name]), wanted(OWN))


@pytest.mark.parametrize("name", WITHOUT)
def test_batches_without_constants_are_predicted_alike(name):
    np.testing.assert_array_equal(predicted(WITHOUT[name], [BATCHES[0][:2]]), wanted(0))


def never(*_):
    raise AssertionError("a network ran before the other one was checked")


@pytest.mark.parametrize(
    "network, batches, message",
    [
        (lambda: 0, BATCHES, r"pruned must be a function \(inputs\) or \(inputs, constants\)"),
        (lambda x, y, z: x, BATCHES, r"got one of \(x, y, z\), and batches\[0\] has constants"),
        (lambda x, *, stats: x, BATCHES, "missing a required .*'stats'"),
        (lambda x, constants: x, [BATCHES[0][:2]], "has no constants: missing .*'constants'"),
        ((lambda w: w, W), BATCHES, r"pruned must be a function \(params, inputs\) or"),
        ((W, W), BATCHES, "pruned must be a function .inputs. -> logits or a pair"),
    ],
)
def test_functions_with_other_arguments_are_refused(network, batches, message):
    with pytest.raises(ValueError, match=message):
        flj.disagreement(lambda x: never(x), network, batches)
