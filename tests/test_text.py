"""Reprs: one line whatever is inside, and tuples as they were."""

import pathlib
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fishleg_jax as flj
from fishleg_jax import _text

MODEL = flj.Model(lambda params, x: x @ params["kernel"], flj.likelihoods.gaussian())
PARAMS = {"kernel": jnp.arange(1.0, 601).reshape(60, 10)}
NAMES = {f"{{{name}!r}}" for name in ("name", "key", "hit", "pattern", "members[0].name")}
ESTIMATES = ("diagonal", "fishleg", "kfac", "mfac", "woodfisher")


def assert_short(value):
    text = repr(value)
    assert len(text) < 400 and "\n" not in text
    assert text.startswith(type(value).__name__ + "(") and "<function" not in text
    assert " at 0x" not in text


@pytest.mark.parametrize("name", ESTIMATES)
def test_estimates_and_their_states(name):
    estimator = getattr(flj.inverse, name)(MODEL)
    assert repr(estimator).startswith(f"InverseFisher({name}")
    state = jax.eval_shape(estimator.init, PARAMS)
    assert_short(estimator)
    assert_short(state)
    assert all(field in repr(state) for field in state._fields)


@pytest.mark.parametrize("around", [True, False])
def test_states_of_a_gradual_pruning(around):
    options = {"estimator": flj.inverse.identity(), "prunable": "kernel"}
    if around:
        tx = flj.prune(optax.adam(0.1), MODEL, 0.5, **options)
    else:
        tx = flj.fishleg_prune(MODEL, 0.5, **options)
    state = tx.init(PARAMS)
    assert_short(state)
    if not around:
        assert "count=0" in repr(state) and "masks={1 array, 600 numbers}" in repr(state)
    leaves, tree = jax.tree.flatten(state)
    again = tree.unflatten(leaves)
    assert type(again) is type(state) and type(pickle.loads(pickle.dumps(state))) is type(state)
    assert type(state._replace()) is type(state) and tuple(state) == tuple(state._replace())


def test_models_likelihoods_and_targets():
    assert repr(MODEL).startswith("Model(predict=<lambda>, likelihood=Likelihood(gaussian")
    for name in ("bernoulli", "categorical", "gaussian"):
        assert repr(getattr(flj.likelihoods, name)()).startswith(f"Likelihood({name}")
    assert repr(flj.Memory(1, 2)) == "Memory(state=1, update=2)"
    assert repr(flj.Trust(0.5, 2.0)) == "Trust(agreement=0.5, inflation=2.0)"
    assert_short(flj.targets.cost(3, PARAMS))
    assert_short(flj.targets.metric(lambda params: 0.0, 0.1))
    assert_short(flj.curvature(MODEL, [(jnp.ones((2, 60)), None)]))


def test_an_estimate_of_a_users_own_shows_its_functions():
    def init(params):
        return ()

    own = flj.inverse.identity()._replace(init=init, update=init, multiply=init, diagonal=init)
    assert "init=test_an_estimate_of_a_users_own_shows_its_functions.init" in repr(own)


def test_arrays_that_cannot_be_read():
    """Traced, donated and of random keys: by dtype and shape."""
    state = flj.inverse.DiagonalState(*(jnp.zeros(()) for _ in range(4)))
    seen = []
    jax.jit(lambda state: seen.append(repr(state)))(state)
    assert seen[0].startswith("DiagonalState(count=float32[], ")
    state.count.delete()
    assert repr(state).startswith("DiagonalState(count=float32[], skipped=0, ")
    assert _text.summary(jax.random.key(0)) == "key<fry>[]"
    assert _text.summary({"a": None, "b": (None, ())}) == "{0 arrays}"
    assert _text.summary("x" * 1000) == repr("x" * (_text.LONGEST - 3) + "...")


def test_errors_stay_readable_whatever_was_given():
    # the arguments of prune_one_shot in a wrong order, with batches of images
    batches = [(jnp.ones((50, 60)), jnp.ones((50, 10)))] * 30
    with pytest.raises(ValueError, match="estimator must be .* got .60 arrays") as error:
        flj.prune_one_shot(MODEL, PARAMS, batches, batches, sparsity=0.5)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "value",
    [
        {str(i): {"kernel": [jnp.ones((9, 9))] * 40} for i in range(50)},
        "long " * 300,
        {10**3000: range(10**9)},
        [[[[[[[list(range(1000))]]]]]]],
        optax.adam(1e-3),
        np.zeros((30, 40)),
        optax.ScaleByAdamState(jnp.zeros(()), PARAMS, PARAMS),
    ],
)
def test_what_an_error_shows_is_short(value):
    shown = _text.shown(value)
    assert len(shown) < 400 and "\n" not in shown and " at 0x" not in shown


@pytest.mark.parametrize(
    "value, expected",
    [
        (np.float32(3.0), "float32(3.0)"),
        (np.array([3]), "int64[1]"),
        (jnp.array(True), "bool(True)"),
        (jnp.array([0.5]), "float32[1]"),
        ([0.25, "a", None], "[0.25, 'a', None]"),
        (optax.sgd, "the function sgd"),
    ],
)
def test_an_error_shows_types_where_they_may_be_what_is_wrong(value, expected):
    assert _text.shown(value) == expected


def test_arrays_of_other_libraries_are_shown():
    """Whose dtypes may have no name."""

    class Tensor:
        shape, dtype = (3, 4), "torch.float32"

    assert _text.shown(Tensor()) == "torch.float32[3,4]"


def test_every_error_shows_a_users_values_shortly():
    # `!r` is for names of leaves, files and expressions, which are strings
    errors = re.compile(r"raise ValueError\(.*?\)(?: from .*)?\n", re.S)
    raw = re.compile(r"\{[\w.\[\]]+!r\}")
    found = []
    for path in pathlib.Path(flj.__file__).parent.rglob("*.py"):
        for error in errors.findall(path.read_text()):
            given = error.partition("got ")[2]
            found += [f"{path.name}: {x}" for x in raw.findall(given) if x not in NAMES]
    assert not found
