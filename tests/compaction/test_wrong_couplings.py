"""Couplings that are off by some members are refused, with convolutions, norms and attention."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fishleg_jax as flj
from fishleg_jax.compaction import verification
from fishleg_jax.compaction.couplings import Member, leaves_of
from tests.compaction import networks

UNITS = 4  # everywhere, so that wrong members fit as well


def normalised(x, scale, bias):
    x = x - x.mean(-1, keepdims=True)
    return scale * x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-3) + bias


def images(p, x):
    """Two convolutions, the first with batch norm, a depthwise one, and flattened images."""
    layout = ("NHWC", "HWIO", "NHWC")
    conv = lambda x, w, groups=1: jax.lax.conv_general_dilated(
        x, w, (1, 1), "VALID", dimension_numbers=layout, feature_group_count=groups
    )
    h = jnp.tanh((conv(x, p["first"]) - p["mean"]) * p["scale"] + p["bias"])
    h = jnp.tanh(conv(h, p["second"]))
    h = conv(h, p["depthwise"], UNITS)
    return jnp.tanh(h.reshape(len(x), -1)) @ p["out"]


def attention(p, x):
    """Four heads of two, in blocks of the kernels, and a layer norm of width four."""
    heads = lambda name: (x @ p[name]).reshape(*x.shape[:2], UNITS, 2)
    weights = jnp.einsum("blhe,bmhe->bhlm", heads("q"), heads("k"))
    h = jnp.einsum("bhlm,bmhe->blhe", jax.nn.softmax(weights), heads("v"))
    h = normalised(h.reshape(*x.shape[:2], -1) @ p["o"], p["scale"], p["bias"])
    return jnp.tanh(h @ p["up"]) @ p["out"]


def whole(name, axis):
    return Member(name, axis, 1, UNITS, 1)


SHAPES = {
    images: {
        "first": (2, 2, 4, 4),
        "mean": (4,),
        "scale": (4,),
        "bias": (4,),
        "second": (1, 1, 4, 4),
        "depthwise": (2, 2, 1, 4),
        "out": (16, 4),
    },
    attention: {
        **dict.fromkeys("qkv", (4, 8)),
        "o": (8, 4),
        "scale": (4,),
        "bias": (4,),
        "up": (4, 4),
        "out": (4, 4),
    },
}
INPUTS = {images: (3, 4, 4, 4), attention: (3, 5, 4)}
RIGHT = {
    images: (
        {*(whole(x, 0) for x in ("mean", "scale", "bias")), whole("first", 3), whole("second", 2)},
        {whole("second", 3), whole("depthwise", 3), Member("out", 0, 4, UNITS, 1)},
    ),
    attention: (
        {*(Member(x, 1, 1, UNITS, 2) for x in "qkv"), Member("o", 0, 1, UNITS, 2)},
        {whole("o", 1), whole("scale", 0), whole("bias", 0), whole("up", 0)},
        {whole("up", 1), whole("out", 0)},
    ),
}
LEAVES = {
    f: leaves_of(networks.random({k: np.zeros(x) for k, x in shapes.items()}), None)
    for f, shapes in SHAPES.items()
}


def check(f, members):
    x = 2 * jax.random.normal(jax.random.key(0), INPUTS[f])
    verification.check(lambda p: f(p, x), LEAVES[f], [tuple(sorted(members))])


def candidates(f):
    """All axes that fit four units, from the front, in strides and in blocks."""
    found = set()
    for name, leaf in LEAVES[f].items():
        for axis, size in enumerate(leaf.shape):
            if size % UNITS == 0:
                found |= {Member(name, axis, size // UNITS, UNITS, 1)}
                found |= {Member(name, axis, 1, UNITS, size // UNITS)}
    return sorted(found)


@st.composite
def couplings(draw):
    """A network, and none to all of its couplings with up to three members more or less."""
    f = draw(st.sampled_from(list(SHAPES)))
    parts = draw(st.sets(st.sampled_from(range(len(RIGHT[f])))))
    members = set().union(*(RIGHT[f][i] for i in parts))
    return f, members ^ draw(st.sets(st.sampled_from(candidates(f)), max_size=3))


@settings(max_examples=60, deadline=None)
@given(couplings())
def test_couplings_that_are_off_by_some_members_are_refused(drawn):
    f, members = drawn
    some = range(len(RIGHT[f]) + 1)
    unions = [set().union(*x) for n in some for x in itertools.combinations(RIGHT[f], n)]
    if not members:
        return
    if members in unions:
        check(f, members)
        return
    with pytest.raises(ValueError, match="permuting its 4 units"):
        check(f, members)


@pytest.mark.parametrize("f", SHAPES, ids=["images", "attention"])
def test_right_couplings_are_accepted(f):
    for members in RIGHT[f]:
        check(f, members)


LAYERS = {
    "w1": jax.random.normal(jax.random.key(0), (5, 8)),
    "b1": 1e-6 * jax.random.normal(jax.random.key(1), (8,)),
    "w2": jax.random.normal(jax.random.key(2), (8, 3)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("function", ["plain", "sliced"])
def test_a_leaf_with_little_effect_is_missed_as_well(dtype, function):
    """A bias of 1e-6, in float32 and in bfloat16, also where `f` would run without it."""

    def f(p, x):
        hidden = x @ p["w1"]
        bias = p["b1"] if function == "plain" else p["b1"][: hidden.shape[-1]]
        return jnp.tanh(hidden + bias) @ p["w2"]

    params = jax.tree.map(lambda x: x.astype(dtype), LAYERS)
    params["w1"] = params["w1"].at[:, :4].set(0)
    x = jax.random.normal(jax.random.key(3), (6, 5)).astype(dtype)
    with pytest.raises(ValueError, match=r"together with \('b1', 0\) it does not: add it"):
        flj.compact(f, params, None, x, couplings=[[("w1", 1), ("w2", 0)]])


def test_what_does_not_run_names_the_leaf_that_is_found():
    """A leaf whose effect no check can see, since it is multiplied by almost nothing."""
    f = lambda p, x: jnp.tanh(x @ p["w1"] + 1e-12 * p["b1"]) @ p["w2"]
    params = LAYERS | {"w2": LAYERS["w2"].at[:4].set(0)}
    x = jax.random.normal(jax.random.key(3), (6, 5))
    with pytest.raises(ValueError, match=r"puts \('b1', 0\) into couplings\[0\] as well"):
        flj.compact(f, params, None, x, couplings=[[("w1", 1), ("w2", 0)]])


def test_a_coupling_of_one_unit_stays():
    params = {"w1": jnp.zeros((3, 1)), "w2": jnp.ones((1, 2))}
    f = lambda p, x: jnp.tanh(x @ p["w1"]) @ p["w2"]
    small = flj.compact(f, params, None, jnp.ones((4, 3)), couplings=[[("w1", 1), ("w2", 0)]])
    assert small.params["w1"].shape == (3, 1)
