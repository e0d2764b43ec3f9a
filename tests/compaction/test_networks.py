"""Compact networks equal the masked ones, on every kind of layer and in every library."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fishleg_jax as flj
from tests.compaction import networks

pytestmark = pytest.mark.slow

S = np.s_
IMAGES = jax.random.normal(jax.random.key(1), (6, 6, 6, 2))
TOKENS = jax.random.randint(jax.random.key(2), (6, 4), 0, 7)


def outputs_agree(f, params, masks, small, x, constants=None):
    """To 1e-5, measured anew and not by the library."""
    rest = () if constants is None else (constants,)
    before = f(flj.apply_masks(params, masks), x, *rest)
    after = f(small.params, x, *(() if constants is None else (small.constants,)))
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5 * np.abs(before).max())


def sizes(small):
    """Units that stay, by the name of the coupling."""
    return {x.name: (x.before, x.after) for x in small.report.units}


@pytest.mark.parametrize("padding, stays", [("VALID", 2), ("SAME", 3)])
def test_flattened_convolutions(padding, stays):
    """A constant goes through a padded convolution only if it is zero."""
    f, params = networks.cnn(padding)
    params["conv0"]["bias"] = params["conv0"]["bias"].at[:2].set(jnp.array([-1.0, 1.0]))
    masks = networks.masks_without(
        params, conv0__kernel=S[..., :2], conv1__kernel=S[..., 1:4], out__kernel=S[2]
    )
    small = flj.compact(f, params, masks, IMAGES)
    outputs_agree(f, params, masks, small, IMAGES)
    assert sizes(small) == {
        "conv0/bias axis 0": (4, stays),
        "conv1/bias axis 0": (6, 3),
        "hidden/bias axis 0": (5, 4),
    }
    (reasons,) = (x.stay for x in small.report.units if x.name.startswith("conv0"))
    assert list(reasons.values()) == [(1,)] * (stays - 2)
    assert all("borders of a padded convolution" in reason for reason in reasons)


def test_residual_block_with_batch_norm():
    """Statistics shrink with their channels, and means take up constants."""
    params, stats = networks.block_variables()
    params["bn0"]["bias"] = params["bn0"]["bias"].at[3].set(-2.0)  # not what conv2 adds to
    params["bn1"]["bias"] = -jnp.abs(params["bn1"]["bias"]) - 3 * jnp.abs(params["bn1"]["scale"])
    masks = networks.masks_without(
        params,
        conv0__kernel=S[..., 3],
        conv2__kernel=S[..., 3],
        conv1__kernel=S[..., :2],
    )
    masks["conv2"]["kernel"][:, :, 5] = False
    small = flj.compact(networks.block, params, masks, IMAGES, constants=stats)
    outputs_agree(networks.block, params, masks, small, IMAGES, stats)
    assert sizes(small)["bn1/bias axis 0"] == (6, 3)
    assert small.constants["bn1"]["var"].shape == small.params["bn1"]["scale"].shape == (3,)
    shape = small.params["conv1"]["kernel"].shape
    assert shape[2] == small.params["out"]["kernel"].shape[0] == small.params["bn2"]["bias"].size


class Separable(nn.Module):
    """A depthwise convolution between two of 1×1, behind a group norm."""

    stem: int
    hidden: int

    @nn.compact
    def __call__(self, x):
        x = nn.GroupNorm(num_groups=2, name="norm")(nn.Conv(self.stem, (1, 1), name="stem")(x))
        y = nn.relu(nn.Conv(self.hidden, (1, 1), name="wide")(x))
        y = nn.Conv(self.hidden, (3, 3), feature_group_count=self.hidden, name="depthwise")(y)
        x = x + nn.Conv(self.stem, (1, 1), name="narrow")(nn.relu(y))
        return nn.Dense(3, name="out")(x.reshape(x.shape[0], -1))


def test_depthwise_convolutions_and_group_norm():
    """A channel goes if any layer on its way cuts it; of a group norm whole groups are units."""
    shapes = jax.eval_shape(Separable(4, 6).init, jax.random.key(0), IMAGES)["params"]
    params = networks.random(shapes)
    names = ("stem", "wide")
    f = lambda params, x: Separable(*(params[n]["bias"].size for n in names)).apply(
        {"params": params}, x
    )
    masks = networks.masks_without(
        params, depthwise__kernel=S[..., 2], wide__kernel=S[..., 5], narrow__kernel=S[:, :, 0]
    )
    params["wide"]["bias"] = params["wide"]["bias"].at[5].set(-1.0)
    small = flj.compact(f, params, masks, IMAGES)
    outputs_agree(f, params, masks, small, IMAGES)
    assert small.params["depthwise"]["kernel"].shape == (3, 3, 1, 3)
    (groups,) = (x.coupling for x in small.kept if x.units == 2)
    assert ("norm/scale", 0, 2) in groups and ("out/kernel", 0, 2) in groups


def test_scanned_attention():
    """Heads and neurons go if every layer of the scan has pruned them; the stream stays."""
    params = networks.transformer_params()
    masks = networks.masks_without(
        params,
        layers__qkv=S[:, :, [2, 3, 8, 9, 14, 15]],  # head 1 of three: its q, k and v
        layers__up=S[:, :, 4:],
        layers__down=S[0, :2],  # in one layer only
        layers__out=S[0, 4:],
    )
    small = flj.compact(networks.transformer, params, masks, TOKENS)
    outputs_agree(networks.transformer, params, masks, small, TOKENS)
    shapes = jax.tree.map(jnp.shape, small.params["layers"])
    assert shapes["qkv"] == (2, 6, 12) and shapes["out"] == (2, 4, 6)
    assert shapes["up"] == (2, 6, 4) and shapes["b_up"] == (2, 4)


def test_the_stream_behind_a_norm_stays_whole():
    """A mean over channels changes with their number, whatever the weights are."""
    params = networks.transformer_params()
    dead = 2
    masks = networks.masks_without(
        params,
        **dict.fromkeys(("embedding", "positions", "layers__out"), S[..., dead]),
        layers__down=S[..., dead],
        layers__b_down=S[..., dead],
        layers__qkv=S[:, dead],
        layers__up=S[:, dead],
    )
    small = flj.compact(networks.transformer, params, masks, TOKENS)
    (stream,) = (x for x in small.report.units if x.name == "embedding axis 1")
    assert (stream.before, stream.after) == (6, 6)
    ((reason, units),) = stream.stay.items()
    assert units == (dead,) and "one number of all its units" in reason


def test_tied_embeddings():
    params = networks.tied_params()
    masks = networks.masks_without(params, embedding=S[:, 1:3], down=S[:, 1:3], up=S[1:3, :])
    masks["up"][:, 5] = masks["down"][6] = False
    small = flj.compact(networks.tied, params, masks, TOKENS)
    outputs_agree(networks.tied, params, masks, small, TOKENS)
    assert small.params["embedding"].shape == (7, 4)
    assert small.params["up"].shape == (4, 6)


def test_lstm_of_flax():
    """Gates are put together from four kernels and taken apart again."""

    class Net(nn.Module):
        features: int

        @nn.compact
        def __call__(self, x):
            x = nn.RNN(nn.OptimizedLSTMCell(self.features), name="rnn")(x)
            return nn.Dense(2, name="out")(x[:, -1])

    def f(params, x):
        return Net(params["out"]["kernel"].shape[0]).apply({"params": params}, x)

    x = jax.random.normal(jax.random.key(0), (5, 3, 4))
    params = networks.random(jax.eval_shape(Net(6).init, jax.random.key(0), x)["params"])
    cell = params["OptimizedLSTMCell_0"]
    masks = networks.masks_without(params, out__kernel=S[[0, 3]])
    for gate in "ifgo":
        masks["OptimizedLSTMCell_0"][f"h{gate}"]["kernel"][[0, 3]] = (
            False  # unit 0 and 3 give to nobody
        )
        masks["OptimizedLSTMCell_0"][f"h{gate}"]["kernel"][:, 5] = False
        masks["OptimizedLSTMCell_0"][f"i{gate}"]["kernel"][:, 5] = False  # unit 5 takes from nobody
    cell["hg"]["bias"] = cell["hg"]["bias"].at[5].set(0)  # and its state stays at zero
    small = flj.compact(f, params, masks, x)
    outputs_agree(f, params, masks, small, x)
    assert small.params["out"]["kernel"].shape == (3, 2)
    cell["hg"]["bias"] = cell["hg"]["bias"].at[5].set(1)  # now it grows from step to step
    small = flj.compact(f, params, masks, x)
    assert small.params["out"]["kernel"].shape == (4, 2)


def test_lstm_and_convolution_of_equinox():
    """Kernels (out, in), channels before pixels, gates in one kernel."""

    class Net(eqx.Module):
        conv: eqx.nn.Conv1d
        cell: eqx.nn.LSTMCell
        out: eqx.nn.Linear

        def __call__(self, x):
            features = jax.nn.relu(self.conv(x)).ravel()
            zero = jnp.zeros(self.cell.weight_hh.shape[1])
            step = lambda state, _: (self.cell(features, state), None)
            (h, _), _ = jax.lax.scan(step, (zero, zero), None, length=2)
            return self.out(h)

    keys = jax.random.split(jax.random.key(0), 3)
    net = Net(
        eqx.nn.Conv1d(2, 4, 3, key=keys[0]),
        eqx.nn.LSTMCell(4 * 6, 5, key=keys[1]),
        eqx.nn.Linear(5, 2, key=keys[2]),
    )
    params, static = eqx.partition(net, eqx.is_inexact_array)
    params = networks.random(params)
    f = lambda params, x: jax.vmap(eqx.combine(params, static))(x)
    x = jax.random.normal(jax.random.key(1), (4, 2, 8))
    masks = networks.masks_without(params, conv__weight=S[1:3], out__weight=S[:, 4])
    masks.cell.weight_hh[:, 4] = False
    small = flj.compact(f, params, masks, x)
    outputs_agree(f, params, masks, small, x)
    assert small.params.conv.weight.shape[0] == 2
    assert small.params.cell.weight_ih.shape == (4 * 4, 2 * 6)


def test_nnx():
    """The graph knows no sizes of linear layers and norms, so the pruned module itself shrinks."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(4, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.out = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.norm(self.hidden(x))))

    net = Net(nnx.Rngs(0))
    net.eval()
    graph, params, stats = nnx.split(net, nnx.Param, nnx.BatchStat)
    params, stats = networks.random(params, 1), networks.random(stats)
    f = lambda params, x, stats: nnx.merge(graph, params, stats)(x)
    x = jax.random.normal(jax.random.key(0), (6, 4))
    masks = networks.masks_without(params, hidden__kernel=S[:, [0, 2, 7]])
    small = flj.compact(f, params, masks, x, constants=stats)
    outputs_agree(f, params, masks, small, x, stats)
    nnx.update(net, small.params, small.constants)
    assert net.hidden.kernel.shape == (4, 5)
    np.testing.assert_allclose(net(x), f(small.params, x, small.constants), rtol=1e-6)
