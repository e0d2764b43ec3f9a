"""Couplings are found in full, and wrong ones are refused by the leaf that breaks them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fishleg_jax as flj
from fishleg_jax.compaction import axes, rules, verification
from fishleg_jax.compaction.couplings import leaves_of, read
from tests.compaction import networks

X = jax.random.normal(jax.random.key(0), (4, 4))
PARAMS = networks.mlp_params((4, 4, 4, 4))  # every axis fits every other
LEAVES = leaves_of(PARAMS, None)
RIGHT = ({("w1", 1), ("b1", 0), ("w2", 0)}, {("w2", 1), ("b2", 0), ("w3", 0)})
PLACES = [(name, axis) for name, x in LEAVES.items() for axis in range(x.ndim)]
RUN = jax.jit(lambda leaves: networks.mlp(leaves, X))


def check(coupling):
    verification.check(RUN, LEAVES, [read(coupling, LEAVES, "couplings[0]")])


def test_found_couplings_are_all_of_them():
    found = flj.find_couplings(networks.mlp, PARAMS, X)
    assert [set(x) for x in found] == list(RIGHT)
    for coupling in found:
        check(coupling)


@settings(max_examples=40, deadline=None)
@given(st.sets(st.sampled_from(PLACES), min_size=1, max_size=8))
def test_wrong_couplings_are_refused(places):
    """Right are the two couplings of the network, and their union."""
    coupling = sorted(places)
    if places in (*RIGHT, RIGHT[0] | RIGHT[1]):
        check(coupling)
        return
    with pytest.raises(ValueError, match="permuting its 4 units"):
        check(coupling)


@pytest.mark.parametrize("right", RIGHT, ids=["first", "second"])
def test_the_leaf_that_breaks_a_coupling_is_named(right):
    for place in sorted(right):
        message = f"together with \\('{place[0]}', {place[1]}\\) it does not: add it"
        with pytest.raises(ValueError, match=message):
            check(sorted(right - {place}))
    for place in set(PLACES) - right - {("b1", 0), ("b2", 0)}:
        with pytest.raises(ValueError, match="without \\(.*leave it out|no single leaf mends it"):
            check(sorted(right | {place}))
    with pytest.raises(ValueError, match=r"without \('b3', 0\) it does not: leave it out"):
        check(sorted(right | {("b3", 0)}))


@pytest.mark.parametrize(
    "name, expected",
    [
        ("heads", [("layers/out", 1, 2), ("layers/qkv", 2, 2)]),
        ("neurons", [("layers/b_up", 1), ("layers/down", 1), ("layers/up", 2)]),
    ],
)
def test_couplings_of_scanned_attention(name, expected):
    tokens = jax.random.randint(jax.random.key(0), (3, 4), 0, 7)
    found = flj.find_couplings(networks.transformer, networks.transformer_params(), tokens)
    assert expected in found and len(found) == 3, name


def test_couplings_of_a_residual_block():
    """Both sides of the sum, the norms and their statistics."""
    params, stats = networks.block_variables()
    x = jnp.ones((2, 5, 5, 2))
    stream, hidden = flj.find_couplings(networks.block, params, x, constants=stats)
    assert {("conv0/kernel", 3), ("conv2/kernel", 3), ("conv1/kernel", 2)} < set(stream)
    assert {("constants/bn2/mean", 0), ("bn0/scale", 0), ("out/kernel", 0)} < set(stream)
    assert {("conv1/kernel", 3), ("conv2/kernel", 2), ("constants/bn1/var", 0)} < set(hidden)


def test_channels_come_as_strides_or_blocks_behind_flattened_images():
    f, params = networks.cnn("SAME")
    found = flj.find_couplings(f, params, jnp.ones((2, 6, 6, 2)))
    assert [("conv1/bias", 0), ("conv1/kernel", 3), ("hidden/kernel", 0)] in found

    def first(params, x):  # channels before pixels
        images = jax.lax.conv(x, params["kernel"], (1, 1), "VALID")
        return images.reshape(x.shape[0], -1) @ params["out"]

    params = networks.random({"kernel": np.zeros((3, 2, 2, 2)), "out": np.zeros((3 * 16, 4))})
    found = flj.find_couplings(first, params, jnp.ones((2, 2, 5, 5)))
    assert found == [[("kernel", 0), ("out", 0, 16)]]


def branches(p, x):
    """Two branches side by side, with a bias of their own and one over both, read by one kernel."""
    a = jax.nn.relu(x @ p["a"] + p["b"])
    both = jnp.concatenate([a, jax.nn.relu(x @ p["c"])], axis=1) + p["both"]
    return jnp.tanh(both @ p["w"]) @ p["out"]


@pytest.mark.parametrize("size", [8, 4], ids=["equal", "unequal"])
def test_branches_that_are_put_together_have_no_coupling(size):
    shapes = {"a": (4, 8), "b": (8,), "c": (4, size), "both": (8 + size,), "w": (8 + size, 5)}
    params = networks.random({k: np.zeros(x) for k, x in {**shapes, "out": (5, 3)}.items()})
    found = flj.find_couplings(branches, params, X)
    assert found == [[("out", 0), ("w", 1)]]
    # Whatever loses its weights, units of a branch stay, alone or beside those of the other.
    for pruned in ({"a": np.s_[:, :3]}, {"a": np.s_[:, :3], "c": np.s_[:, :3]}):
        masks = networks.masks_without(params, **pruned, b=np.s_[:3], w=np.s_[:, 1])
        small = flj.compact(branches, params, masks, X)
        assert [(x.before, x.after) for x in small.report.units] == [(5, 4)]
        assert small.params["a"].shape == (4, 8)


def test_pieces_that_are_taken_apart_again_are_coupled():
    """Queries, keys and values by one product, as three kernels side by side or in one array."""

    def separate(p, x):
        z = x @ jnp.concatenate([p["q"], p["k"], p["v"]], axis=1)
        return read(jnp.split(z + jnp.concatenate([p["bq"], p["bk"], p["bv"]]), 3, axis=1), p)

    def together(p, x):
        return read(jnp.moveaxis((x @ p["qkv"]).reshape(len(x), 3, -1), 1, 0), p)

    def read(parts, p):
        q, k, v = parts
        return (jnp.tanh(q) * k + v) @ p["out"]

    shapes = {**dict.fromkeys("qkv", (4, 6)), **dict.fromkeys(("bq", "bk", "bv"), (6,))}
    params = networks.random({k: np.zeros(x) for k, x in {**shapes, "out": (6, 3)}.items()})
    (found,) = flj.find_couplings(separate, params, X)
    assert set(found) == {(n, 1) for n in "qkv"} | {(f"b{n}", 0) for n in "qkv"} | {("out", 0)}
    params = networks.random({"qkv": np.zeros((4, 18)), "out": np.zeros((6, 3))})
    assert flj.find_couplings(together, params, X) == [[("out", 0), ("qkv", 1)]]


def test_pieces_of_the_same_units_are_coupled():
    """Both signs of every unit side by side: unit j of both goes at once."""

    def f(p, x):
        h = x @ p["a"]
        return jnp.concatenate([jax.nn.relu(h), jax.nn.relu(-h)], axis=1) @ p["w"]

    params = networks.random({"a": np.zeros((4, 6)), "w": np.zeros((12, 3))})
    assert flj.find_couplings(f, params, X) == [[("a", 1), ("w", 0)]]
    masks = networks.masks_without(params, w=np.s_[[1, 7, 2]])
    small = flj.compact(f, params, masks, X)
    assert small.kept[0].indices.tolist() == [0, 2, 3, 4, 5]
    assert small.params["w"].shape == (10, 3)


def test_axes_are_refined_by_reshapes():
    whole, heads, size = axes.new(12), axes.new(3), axes.new(4)
    assert axes.unify(whole, [*heads, *size])
    assert [f.size for f in axes.factors(whole)] == [3, 4]
    assert axes.places(whole, heads[0].find()) == [(1, 4)]
    assert not axes.unify([*axes.new(6), *axes.new(2)], [*axes.new(4), *axes.new(3)])
    crossed = axes.new(6)
    axes.unify([*crossed, *axes.new(2)], [*axes.new(4), *axes.new(3)])
    assert all(f.pinned for f in axes.factors(crossed))


@pytest.mark.parametrize(
    "mix",
    [
        lambda h: jax.lax.cond(h[0, 0] > -9, lambda h: h[:, ::-1], lambda h: h, h),
        lambda h: jax.lax.dynamic_update_slice(h, h[:, :1], (0, 2)),
        lambda h: jax.lax.while_loop(lambda h: h.sum() < 1, lambda h: h + h[:, :1], h),
        lambda h: jax.lax.pad(h, 0.0, ((0, 0, 0), (1, -1, 0))),
    ],
    ids=["cond", "update", "while", "pad"],
)
def test_operations_that_mix_units_cost_only_their_own_coupling(mix):
    def f(params, x):
        h = mix(jax.nn.sigmoid(x @ params["w1"] + params["b1"]))
        return jnp.tanh(h @ params["w2"] + params["b2"]) @ params["w3"]

    assert [set(x) for x in flj.find_couplings(f, PARAMS, X)] == [RIGHT[1]]


def test_found_couplings_that_fail_are_left_out(monkeypatch):
    """As if a rule misread an operation; what the user names is refused instead."""
    monkeypatch.setitem(rules.RULES, "rev", rules.RULES["copy"])

    def f(params, x):
        h = jnp.tanh(x @ params["w1"] + params["b1"])[:, ::-1]
        return jnp.tanh(h @ params["w2"] + params["b2"]) @ params["w3"]

    assert [set(x) for x in flj.find_couplings(f, PARAMS, X)] == [RIGHT[1]]
    masks = networks.masks_without(PARAMS, w1=np.s_[:, 0], w3=np.s_[0])
    small = flj.compact(f, PARAMS, masks, X)
    assert [x.name for x in small.report.units] == ["b2 axis 0"]
    with pytest.raises(ValueError, match=r"couplings\[1\]: permuting its 4 units"):
        flj.compact(f, PARAMS, masks, X, couplings=[sorted(x) for x in RIGHT[::-1]])


def test_outputs_that_are_not_finite():
    with pytest.raises(ValueError, match="NaN or infinity"):
        flj.find_couplings(lambda p, x: jnp.log(-jnp.abs(networks.mlp(p, x))), PARAMS, X)
