"""Axes that a network sums over, and warnings of patterns that lie along others."""

import ast
import functools
import re
import warnings

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import fishleg_jax as flj
from fishleg_jax import _tree
from fishleg_jax.pruning.masks.summed_axes import summed_axes

X = jnp.ones((3, 8))
N_M = flj.patterns.n_m(2, 4)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3,), name="conv")(x[:, :, None]).mean(axis=2)
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="heads")(x[:, None], x[:, None])
        return jnp.where(x > 0, x, 0) @ self.param("head", nn.initializers.ones, (3, 8)).T


def linen(params, x):
    return Attention().apply({"params": params}, x)


def summed(function, params, x=X):
    found = summed_axes(jax.jit(function), params, x)
    return {name: axes for (name, _), axes in zip(_tree.named_leaves(params), found, strict=True)}


def test_axes_of_convolutions_heads_and_transposed_kernels():
    params = Attention().init(jax.random.key(0), X)["params"]
    found = summed(linen, params)
    assert found["conv/kernel"] == [{0, 1}]
    assert found["heads/query/kernel"] == found["heads/value/kernel"] == [{0}]
    assert found["heads/out/kernel"] == [{0, 1}]
    assert found["head"] == [{1}] and found["heads/out/bias"] == []


def test_axes_of_tied_masked_and_stacked_leaves():
    params = {"e": jnp.ones((5, 8)), "w": jnp.ones((2, 8, 8)), "lost": jnp.ones((4, 2))}

    def f(p, x):
        masked = p["e"] * (p["e"] > 0)
        x = jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]
        x = jax.lax.cond(x[0, 0] > 0, lambda e: x @ e.T, lambda e: x @ e.T + 1, masked) @ p["e"]
        return x @ p["lost"].reshape(8, 1)

    found = summed(f, params)
    assert found["e"] == [{1}, {1}, {0}]  # both branches, and the second use
    assert found["w"] == [{1}] and found["lost"] == []


NET, STATIC = eqx.partition(eqx.nn.MLP(8, 4, 16, 1, key=jax.random.key(0)), eqx.is_inexact_array)
EQUINOX = flj.Model(lambda p, x: jax.vmap(eqx.combine(p, STATIC))(x), flj.likelihoods.gaussian())
LINEN = flj.Model(linen, flj.likelihoods.gaussian())


def one_shot(model, params, pattern, **options):
    return flj.prune_one_shot(
        model, params, flj.inverse.identity(), [(X, None)], pattern=pattern, **options
    )


def messages(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(w.message) for w in caught if "pattern" in str(w.message)]


@pytest.mark.parametrize(
    "make, sparsity, words, better",
    [
        (functools.partial(flj.patterns.n_m, 2, 4), None, "that is not summed over", 1),
        (lambda axis=-1: flj.patterns.units(axis=axis), 0.5, "units along an axis of inputs", 0),
    ],
    ids=["n_m", "units"],
)
def test_kernels_with_outputs_first(make, sparsity, words, better):
    run = lambda pattern: one_shot(EQUINOX, NET, pattern, sparsity=sparsity)
    [message] = messages(lambda: run(make()))
    assert words in message and "of 'layers/0/weight', axis" in message
    axes = ast.literal_eval(re.search(r"axis=({.*})", message)[1])
    assert list(axes.values()) == [better, better]
    assert not messages(lambda: run(make(axis=axes)))


def test_heads_of_attention():
    params = Attention().init(jax.random.key(0), X)["params"]
    prunable = "kernel"
    [message] = messages(lambda: one_shot(LINEN, params, N_M, prunable=prunable))
    named = re.findall("of '(.*?)'", message)
    assert named == ["heads/key/kernel", "heads/query/kernel", "heads/value/kernel"]
    axis = {"(key|query|value)/kernel": 0}
    pattern = flj.patterns.n_m(2, 4, axis=axis)
    assert not messages(lambda: one_shot(LINEN, params, pattern, prunable=prunable))


def test_gradual_pruning_warns_while_it_is_traced():
    def trained(pattern):
        tx = optax.chain(optax.sgd(0.1), flj.fishleg_prune(EQUINOX, None, pattern=pattern))
        step = jax.jit(lambda s: tx.update(NET, s, NET, batch=(X, jnp.ones((3, 4)))))
        step.lower(tx.init(NET))

    [message] = messages(lambda: trained(N_M))
    assert "axis 0 of 'layers/0/weight'" in message
    assert not messages(lambda: trained(flj.patterns.n_m(2, 4, axis=-1)))


def test_no_warning_without_a_sum_to_look_at():
    """Of blocks, couplings, and functions that can't be followed."""
    params = {"w": jnp.ones((8, 8))}
    model = flj.Model(lambda p, x: x @ p["w"].reshape(4, 16)[:, :4].T, flj.likelihoods.gaussian())
    with pytest.raises(TypeError):
        jax.eval_shape(model.predict, params, X)
    for pattern in (N_M, flj.patterns.blocks((2, 2)), flj.patterns.units([[("w", 0)]])):
        assert not messages(lambda p=pattern: one_shot(model, params, p, sparsity=0.5))
