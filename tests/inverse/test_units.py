"""Which factor a leaf gets, and which bias joins which kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj
from fishleg_jax.inverse import factors
from fishleg_jax.inverse._kronecker.units import make_units
from tests import dense


def two_layers():
    shapes = {"a": (3, 4), "b": (4, 2)}
    return {n: {"kernel": jnp.zeros(s), "bias": jnp.zeros(s[1])} for n, s in shapes.items()}


def by_name(params, choice=None, join_bias=False, cap=None):
    return {u.name: u for u in make_units(params, choice, join_bias, cap)}


def names_of_members(params, units):
    names = [
        "/".join(str(k.key) for k in p) for p, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    return {u.name: [names[i] for i in u.leaves] for u in units.values()}


def test_rule_by_shape_for_every_leaf():
    units = by_name(two_layers(), cap=8)
    assert {n: u.factor for n, u in units.items()} == {
        "a/bias": factors.diagonal((4,)),
        "a/kernel": factors.spectral((3, 4), 4, cap_out=2, sandwich=False),
        "b/bias": factors.diagonal((2,)),
        "b/kernel": factors.spectral((4, 2), 4, cap_out=2, sandwich=False),
    }


def test_one_constructor_for_all():
    units = by_name(two_layers(), factors.full)
    assert all(u.factor.axes == (n,) for u, n in zip(units.values(), (4, 12, 2, 8), strict=True))


def test_first_expression_that_matches_counts():
    choice = {"^a/": factors.full, "kernel": factors.kronecker}
    units = by_name(two_layers(), choice)
    assert units["a/kernel"].factor == factors.full((3, 4))
    assert units["a/bias"].factor == factors.full((4,))
    assert units["b/kernel"].factor == factors.kronecker((4, 2))
    assert units["b/bias"].factor == factors.diagonal((2,))  # no expression: by shape


@pytest.mark.parametrize(
    "choice, join_bias, message",
    [
        ({"kernels": factors.full}, False, "factors: 'kernels' matches no leaf"),
        ({"(": factors.full}, False, "factors: '\\(' is not a regular expression"),
        (None, "c/kernel", "join_bias: 'c/kernel' matches no leaf"),
    ],
)
def test_expressions_must_match(choice, join_bias, message):
    with pytest.raises(ValueError, match=message):
        by_name(two_layers(), choice, join_bias)


def test_a_factor_that_does_not_fit_a_leaf_is_refused():
    with pytest.raises(ValueError, match="factors, for leaf 'a/bias': shape must have 2"):
        by_name(two_layers(), factors.kronecker)


def test_join_bias_joins_each_kernel_with_its_bias():
    params = two_layers()
    units = by_name(params, join_bias=True)
    assert names_of_members(params, units) == {
        "a/kernel": ["a/kernel", "a/bias"],
        "b/kernel": ["b/kernel", "b/bias"],
    }
    assert units["a/kernel"].factor == factors.by_shape((4, 4))


def test_join_bias_by_expression():
    params = two_layers()
    units = by_name(params, join_bias="b/kernel")
    assert names_of_members(params, units) == {
        "a/bias": ["a/bias"],
        "a/kernel": ["a/kernel"],
        "b/kernel": ["b/kernel", "b/bias"],
    }


def test_join_bias_needs_one_bias_beside():
    params = {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4), "scale": jnp.zeros(4)}
    with pytest.raises(ValueError, match="which needs one bias of shape \\(4,\\) beside it"):
        by_name(params, join_bias="kernel")
    assert len(by_name(params, join_bias=True)) == 3  # nothing is joined by guessing
    with pytest.raises(ValueError, match="found: none"):
        by_name({"kernel": jnp.zeros((3, 4))}, join_bias="kernel")


def test_a_bias_is_in_one_unit_only():
    """A recurrent layer's two kernels share a bias; every leaf is in exactly one unit."""
    params = {"input": jnp.zeros((3, 4)), "state": jnp.zeros((4, 4)), "bias": jnp.zeros(4)}
    members = [i for u in by_name(params, join_bias=True).values() for i in u.leaves]
    assert sorted(members) == [0, 1, 2]


def test_layers_that_share_a_name_do_not_share_a_factor():
    """Two leaves whose key paths read the same are still two."""
    params = {"a/b": jnp.zeros((3, 2)), "a": {"b": jnp.zeros((2, 5))}}
    estimator = flj.inverse.fishleg(dense.categorical_mlp(), damping=2.0)
    try:
        state = estimator.init(params)
    except ValueError as error:
        assert "a/b" in str(error)  # refusing is as good
    else:
        out = dense.jitted(estimator.multiply)(state, jax.tree.map(jnp.ones_like, params))
        jax.tree.map(lambda x: np.testing.assert_allclose(x, 0.5), out)


@pytest.mark.parametrize("join_bias", [False, True])
def test_pack_and_unpack_are_inverse(key, join_bias):
    params = dense.random_like(key, two_layers())
    leaves = jax.tree.leaves(params)
    out = [jnp.full_like(x, jnp.nan) for x in leaves]
    for unit in make_units(params, None, join_bias, None):
        packed = unit.pack(leaves)
        assert packed.size == np.prod(unit.factor.axes)
        unit.unpack(packed.reshape(unit.factor.axes), out)
    jax.tree.map(np.testing.assert_array_equal, out, leaves)


def test_join_bias_on_flax_linen(key):
    linen = pytest.importorskip("flax.linen")
    model = linen.Sequential([linen.Dense(4), linen.relu, linen.Dense(2)])
    params = model.init(key, jnp.ones((1, 3)))
    units = by_name(params, join_bias=True)
    assert names_of_members(params, units) == {
        f"params/layers_{i}/kernel": [f"params/layers_{i}/kernel", f"params/layers_{i}/bias"]
        for i in (0, 2)
    }
    assert len(by_name(params, join_bias="layers_0/kernel")) == 3


def test_join_bias_on_flax_nnx():
    nnx = pytest.importorskip("flax.nnx")

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(3, 4, rngs=rngs)
            self.norm = nnx.LayerNorm(4, rngs=rngs)
            self.second = nnx.Linear(4, 2, rngs=rngs)

    params = nnx.state(Network(nnx.Rngs(0)), nnx.Param)
    units = by_name(params, join_bias=True)
    assert {n: len(u.leaves) for n, u in units.items()} == {
        "first/kernel": 2,
        "norm/bias": 1,
        "norm/scale": 1,
        "second/kernel": 2,
    }
    assert len(by_name(params, join_bias="^first/kernel$")) == 5


def test_join_bias_on_equinox(key):
    """Equinox keeps kernels as (out, in): a bias is no row of them, so nothing is joined."""
    eqx = pytest.importorskip("equinox")
    params = eqx.filter(eqx.nn.MLP(3, 2, 4, 1, key=key), eqx.is_array)
    assert {n: len(u.leaves) for n, u in by_name(params, join_bias=True).items()} == {
        f"layers/{i}/{name}": 1 for i in (0, 1) for name in ("weight", "bias")
    }
    with pytest.raises(ValueError, match="which needs one bias of shape \\(3,\\)"):
        by_name(params, join_bias="weight")


def test_order_and_names_of_leaves_do_not_matter(key):
    """Q of a leaf depends on its own data, not on what else is in the tree or what it is called."""
    first, second = jnp.ones((3, 4)), jnp.ones((4, 3))
    inputs, _ = dense.classification_batch(key)
    probe = jax.random.normal(key, (3, 4))

    def products(names):
        model = flj.Model(
            lambda p, x: jnp.tanh(x @ p[names[0]]) @ p[names[1]], flj.likelihoods.categorical()
        )
        estimator = flj.inverse.fishleg(model, 0.1, start=16, learn=False)
        params = {names[0]: first, names[1]: second}
        state = dense.run(estimator, params, (inputs, None), 16, key)
        return estimator.multiply(state, {names[0]: probe, names[1]: second})[names[0]]

    np.testing.assert_allclose(products(("x", "y")), products(("y", "x")), rtol=1e-5)
