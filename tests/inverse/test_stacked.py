"""Stacked layers, as scanned networks have them, against the same layers as leaves of their own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fishleg_jax as flj
from fishleg_jax.inverse import factors
from fishleg_jax.inverse._kronecker.units import make_units
from tests import dense

pytestmark = pytest.mark.slow

LAYERS = 2
STACKED = ("bias", "k1", "k2")
KEY = jax.random.key(0)


def predict(params, x):
    """Of stacked layers, or of lists of them."""
    for i in range(LAYERS):
        x = x + jnp.tanh(x @ params["k1"][i] + params["bias"][i]) @ params["k2"][i]
    return x @ params["head"]


MODEL = flj.Model(predict, flj.likelihoods.categorical())


def unrolled(tree):
    """The same leaves in the same order, each layer one of its own."""
    return {k: list(x) if k in STACKED else x for k, x in tree.items()}


@functools.cache
def problem():
    shapes = {"bias": (2, 4), "head": (3, 3), "k1": (2, 3, 4), "k2": (2, 4, 3)}
    leaf = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float64)
    params = dense.random_like(KEY, {k: leaf(s) for k, s in shapes.items()}, 0.5)
    mask = jax.tree.map(
        lambda x: jax.random.bernoulli(jax.random.key(x.size), 0.7, x.shape), params
    )
    return params, mask, dense.classification_batch(KEY, 16, dtype=jnp.float64)


def same(found, expected):
    np.testing.assert_allclose(dense.ravel(found), dense.ravel(expected), rtol=1e-7, atol=1e-9)


# Adam would make steps of rounding where a gradient vanishes
fishleg = functools.partial(
    flj.inverse.fishleg,
    learn=True,
    start=4,
    updates=8,
    examples_per_sample=4,
    optimizer=optax.sgd(1e-2),
)
ROWS = {
    "kfac": lambda **how: flj.inverse.kfac(MODEL, 0.1, cap=3, **how),
    "closed form": lambda **how: fishleg(MODEL, learn=False, **how),
    "kronecker, full": lambda **how: fishleg(
        MODEL, 0.1, factors={"k1": factors.kronecker, "k2": factors.full}, cap=3, **how
    ),
    "full, spectral": lambda **how: fishleg(
        MODEL, factors={"k1": factors.full, "k2": factors.spectral}, probe="sign", **how
    ),
}
MASKED = "kfac", "full, spectral"


@pytest.mark.parametrize("row", ROWS)
def test_a_stack_is_its_layers(x64, row):
    """After the start and after learning with the same probes, `multiply` and `diagonal`."""
    params, mask, batch = problem()
    mask = mask if row in MASKED else None
    alone = mask if mask is None else unrolled(mask)
    stacked = ROWS[row](stacked=STACKED if row == "kfac" else "^(bias|k1|k2)$")
    apart = ROWS[row]()
    states = stacked.init(params), apart.init(unrolled(params))
    updates = [jax.jit(e.update) for e in (stacked, apart)]
    for i in range(2 if "kfac" in row else 8):
        key = jax.random.fold_in(KEY, i)
        states = (
            updates[0](states[0], params, batch, key, mask),
            updates[1](states[1], unrolled(params), batch, key, alone),
        )
        if i not in (3, 7) and "kfac" not in row:
            continue
        vector = dense.random_like(jax.random.key(5), params)
        for name in ("multiply", "diagonal"):
            found = dense.jitted(getattr(stacked, name))(states[0], vector, mask)
            expected = dense.jitted(getattr(apart, name))(states[1], unrolled(vector), alone)
            assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, params)
            same(found, expected)
    assert float(states[0].damping) == pytest.approx(float(states[1].damping), rel=1e-9)
    if "kfac" in row:
        prepared = [
            e.prepare(s, p)
            for e, s, p in zip((stacked, apart), states, (params, unrolled(params)), strict=True)
        ]
        same(stacked.multiply(prepared[0], vector), apart.multiply(prepared[1], unrolled(vector)))
        same(stacked.diagonal(prepared[0], params), apart.diagonal(prepared[1], unrolled(params)))
    elif row != "closed form":
        assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(states[0].average)) > 1e-3


def test_without_the_argument_a_stack_is_one_tensor(x64):
    """Or the comparison above would compare nothing."""
    params, _, batch = problem()
    states = [
        dense.run(e, params, batch, 1, KEY)
        for e in (flj.inverse.kfac(MODEL, 0.1), flj.inverse.kfac(MODEL, 0.1, stacked=STACKED))
    ]
    assert states[0].moments["k1"][0].shape != states[1].moments["k1"][0].shape


def test_a_layer_that_diverges_is_put_back_alone(x64):
    """The guard looks at the layers of a stack as at leaves: each has its own scale."""
    params, _, batch = problem()
    scale = jnp.array([1.0, 100.0])
    estimator = fishleg(MODEL, 0.1, factors=factors.diagonal, stacked=STACKED)
    start = dense.run(estimator, params, batch, 4, KEY)

    def shifted(coordinates):
        k1 = coordinates["k1"]
        shift = jnp.log(scale).reshape(-1, *[1] * (k1.log_spectrum.ndim - 1))
        return coordinates | {"k1": k1._replace(log_spectrum=k1.log_spectrum + shift)}

    broken = start._replace(coordinates=shifted(start.coordinates), average=shifted(start.average))
    after = dense.run(estimator, params, batch, 1, KEY, state=broken)
    moved = after.average["k1"].log_spectrum - broken.average["k1"].log_spectrum
    assert moved[1].max() < -1
    assert moved[1].max() < 3 * moved[0].min()


def test_joined_biases(x64):
    """Each layer's bias is a row of that layer's kernel."""

    def apply(layers, x):
        for layer in layers:
            x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
        return x

    def make(layers_of):
        return flj.Model(lambda p, x: apply(layers_of(p), x), flj.likelihoods.categorical())

    shapes = {"bias": (3, 3), "kernel": (3, 3, 3)}
    leaf = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float64)
    params = dense.random_like(KEY, {k: leaf(s) for k, s in shapes.items()}, 0.7)
    layer = lambda tree, i: jax.tree.map(lambda x: x[i], tree)  # noqa: E731
    layers = lambda tree: [layer(tree, i) for i in range(3)]  # noqa: E731
    batch = dense.classification_batch(KEY, 16, dtype=jnp.float64)
    how = {"learn": False, "join_bias": True, "factors": factors.full}
    together = fishleg(make(layers), stacked=".", **how)
    apart = fishleg(make(lambda p: p), **how)
    states = (
        dense.run(together, params, batch, 4, KEY),
        dense.run(apart, layers(params), batch, 4, KEY),
    )
    assert [x.shape for x in states[0].moments["kernel"]] == [(3, 1, 12, 12)]
    found = together.multiply(states[0], params)
    same(layers(found), apart.multiply(states[1], layers(params)))
    assert float(states[0].damping) == pytest.approx(float(states[1].damping), rel=1e-9)


def test_a_bias_that_is_not_stacked_is_not_joined():
    params = {"kernel": jnp.zeros((3, 2, 4)), "bias": jnp.zeros((3, 4))}
    with pytest.raises(ValueError, match="one bias of shape \\(3, 4\\) beside it, stacked like it"):
        make_units(params, None, "kernel", None, "kernel")
    assert len(make_units(params, None, True, None, "kernel")) == 2
    (unit,) = make_units(params, None, True, None, "kernel|bias")
    assert unit.stack == 3 and unit.factor == factors.by_shape((3, 4))


@pytest.mark.parametrize(
    "stacked, message",
    [
        ("layers", "stacked: 'layers' matches no leaf; the leaves are: b, k"),
        ("b", "stacked: 'b' must have at least two dimensions, the first over layers"),
        (["k", "("], "stacked: '\\(' is not a regular expression"),
        (lambda name, leaf: leaf.ndim == 1, "stacked: 'b' must have at least two dimensions"),
        (3, "stacked must be one or several regular expressions, a predicate"),
    ],
)
@pytest.mark.parametrize("make", [flj.inverse.kfac, flj.inverse.fishleg])
def test_what_is_no_stack(make, stacked, message):
    params = {"k": jnp.zeros((2, 3, 3)), "b": jnp.zeros(3)}
    with pytest.raises(ValueError, match=message):
        make(MODEL, stacked=stacked).init(params)


@pytest.mark.parametrize("make", [flj.inverse.kfac, flj.inverse.fishleg])
def test_a_program_as_long_for_any_number_of_layers(make):
    def scanned(params, x):
        return jax.lax.scan(lambda h, k: (jnp.tanh(h @ k), None), x, params)[0]

    estimator = make(flj.Model(scanned, flj.likelihoods.categorical()), stacked="")
    lengths = set()
    for layers in (2, 7):
        arguments = jnp.zeros((layers, 3, 3)), dense.classification_batch(KEY), KEY
        state = estimator.init(arguments[0])
        text = str(jax.make_jaxpr(estimator.update)(state, *arguments))
        text += str(jax.make_jaxpr(estimator.diagonal)(state, arguments[0]))
        lengths.add(text.count("\n"))
    assert len(lengths) == 1
