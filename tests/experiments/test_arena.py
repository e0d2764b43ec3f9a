"""The arena: layer-wise methods against dense algebra, paired intervals, and a small run."""

import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj
from experiments.arena import __main__ as arena
from experiments.arena import (
    contestants,
    duels,
    gradual,
    layer_inputs,
    layerwise,
    networks,
    one_shot,
    record_table,
)
from experiments.models import networks as modules
from experiments.models.specs import make_spec
from experiments.report import paired

SETTINGS = {"epochs": 1, "train_batch": 64, "examples": 64, "batch": 64}


def tiny(module, shape, dataset="digits", **more):
    return make_spec("tiny", module, dataset, shape, **SETTINGS, **more)


def started(spec, key, examples=6):
    params, constants = jax.jit(spec.init)(key)
    if spec.input_dtype == jnp.int32:
        inputs = jax.random.randint(key, (examples, *spec.input_shape), 0, 5)
    else:
        inputs = jax.random.normal(key, (examples, *spec.input_shape))
    targets = jnp.zeros(examples, jnp.int32)
    return params, (inputs, targets, *([constants] if constants else []))


class Convolutions(nn.Module):
    """A plain, a strided and a grouped convolution, and a layer that is called twice."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), padding=[(1, 1), (1, 1)], strides=2, name="plain")(x)
        x = nn.Conv(8, (2, 3), feature_group_count=2, padding="SAME", name="grouped")(x)
        twice = nn.Dense(8, name="twice")
        return twice(jnp.tanh(twice(x.mean(axis=(1, 2)))))


def moment_of(x):
    x = x.reshape(-1, x.shape[-1])
    return x.T @ x


def test_second_moments_are_those_of_what_the_layers_multiply(key):
    spec = tiny(Convolutions(), (6, 6, 2))
    params, batch = started(spec, key)
    assert layer_inputs.order(spec, params, batch) == ["plain", "grouped", "twice"]
    _, seen = Convolutions().apply({"params": params}, batch[0], capture_intermediates=True)
    outputs = seen["intermediates"]

    # of a convolution: what its kernel as matrices makes of the moment is the moment of its output
    for path, groups in (("plain", 1), ("grouped", 2)):
        (moments,) = layer_inputs.second_moments(spec, params, [batch, batch], path)
        layer = params[path]
        matrices = layer_inputs.as_matrices(layer["kernel"], groups)
        found = jnp.einsum("goi,gij,gpj->gop", matrices, moments, matrices)
        parts = jnp.split(outputs[path]["__call__"][0] - layer["bias"], groups, axis=-1)
        expected = 2 * jnp.stack([moment_of(part) for part in parts])
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        back = layer_inputs.as_kernel(matrices, layer["kernel"].shape)
        np.testing.assert_array_equal(back, layer["kernel"])

    # both calls of a layer count
    (moments,) = layer_inputs.second_moments(spec, params, [batch], "twice")
    first = outputs["grouped"]["__call__"][0].mean(axis=(1, 2))
    second = jnp.tanh(outputs["twice"]["__call__"][0])
    expected = moment_of(first) + moment_of(second)
    np.testing.assert_allclose(moments[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_scanned_layers_have_moments_each_and_time_is_summed(key):
    module = networks.ScannedTransformer(vocabulary=5, width=8)
    spec = tiny(module, (4,), input_dtype=jnp.int32)
    params, batch = started(spec, key)
    paths = layerwise.prunable_layers(spec, params, batch)
    assert paths == [*(f"layers/block/{n}" for n in ("qkv", "out", "up", "down")), "head"]
    moments = layer_inputs.second_moments(spec, params, [batch], "layers/block/qkv")
    assert moments.shape == (2, 1, 8, 8)
    # the same network without a scan
    block = modules.TransformerBlock(4)
    x = params["embed_token"]["embedding"][batch[0]] + params["embed_position"]["embedding"]
    for number in range(2):
        own = jax.tree.map(lambda w, n=number: w[n], params["layers"]["block"])
        normed = nn.LayerNorm().apply({"params": own["norm1"]}, x)
        np.testing.assert_allclose(moments[number, 0], moment_of(normed), rtol=1e-3, atol=1e-4)
        x = block.apply({"params": own}, x)

    spec = tiny(networks.Lstm(width=3), (4, 5, 1))
    params, (images, _) = started(spec, key)
    moments = layer_inputs.second_moments(spec, params, [(images, None)], "lstm/input")
    np.testing.assert_allclose(moments[0, 0], moment_of(images[..., 0]), rtol=1e-4, atol=1e-5)


def test_wanda_prunes_the_lowest_products_of_each_row():
    rng = np.random.default_rng(0)
    weights, inputs = rng.normal(size=(1, 6, 10)), rng.normal(size=(50, 10))
    inputs[:, 3] *= 9
    pruned = layerwise.wanda(weights, (inputs.T @ inputs)[None], 24)
    for row, found in zip(weights[0], pruned[0], strict=True):
        scores = [abs(w) * np.linalg.norm(x) for w, x in zip(row, inputs.T, strict=True)]
        lowest = set(np.argsort(scores)[:4])
        assert [found[j] for j in range(10)] == [0 if j in lowest else row[j] for j in range(10)]
    # four more than a multiple of the rows: in those rows that lose least by it
    more = layerwise.wanda(weights, (inputs.T @ inputs)[None], 28)
    assert (more == 0).sum() == 28 and set((more[0] == 0).sum(axis=1)) == {4, 5}
    fifths = [sorted(abs(row) * np.linalg.norm(inputs, axis=0))[4] for row in weights[0]]
    assert set(np.flatnonzero((more[0] == 0).sum(axis=1) == 5)) == set(np.argsort(fifths)[:4])


@pytest.mark.parametrize("block", [4, 128])
def test_sparse_gpt_is_obs_column_by_column(monkeypatch, block):
    monkeypatch.setattr(layerwise, "BLOCK", block)
    rng = np.random.default_rng(1)
    rows, columns = 5, 12
    weights = rng.normal(size=(1, rows, columns))
    inputs = rng.normal(size=(40, columns)) @ rng.normal(size=(columns, columns))
    moment = inputs.T @ inputs
    pruned = layerwise.sparse_gpt(weights, moment[None], 30)
    assert (pruned == 0).sum() == 30
    # the OBS update of a weight, with the dense inverse for the columns from it on
    damped = moment + 0.01 * np.diag(moment).mean() * np.eye(columns)
    expected, masks = weights[0].copy(), np.zeros((rows, columns), bool)
    inverses = [np.linalg.inv(damped[j:, j:]) for j in range(columns)]
    for j in range(columns):
        if j % block == 0:
            part = range(j, min(j + block, columns))
            scores = np.stack([expected[:, i] ** 2 / inverses[i][0, 0] for i in part], axis=1)
            count = 30 * part.stop // columns - 30 * part.start // columns
            lowest = np.unravel_index(np.argsort(scores.ravel())[:count], scores.shape)
            masks[:, part.start : part.stop][lowest] = True
        for row in np.flatnonzero(masks[:, j]):
            step = expected[row, j] / inverses[j][0, 0]
            expected[row, j:] -= step * inverses[j][0]
            expected[row, j] = 0
    np.testing.assert_allclose(pruned[0], expected, rtol=1e-8, atol=1e-10)
    # the same masks without an update are worse for what the layer makes of its inputs
    lost = lambda new: np.linalg.norm(inputs @ (new - weights[0]).T)
    assert lost(pruned[0]) < 0.9 * lost(np.where(masks, 0, weights[0]))


def test_sparse_gpt_prunes_columns_that_see_nothing_first():
    rng = np.random.default_rng(2)
    weights, inputs = rng.normal(size=(1, 4, 6)), rng.normal(size=(30, 6))
    inputs[:, 2] = 0
    pruned = layerwise.sparse_gpt(weights, (inputs.T @ inputs)[None], 4)
    np.testing.assert_array_equal(pruned[0] == 0, np.arange(6)[None].repeat(4, 0) == 2)


@pytest.mark.parametrize("name", layerwise.METHODS)
def test_layers_see_what_pruned_layers_before_them_make(key, name):
    spec = tiny(modules.Mlp((6, 4)), (5,))
    params, batch = started(spec, key, examples=40)
    pruned = layerwise.prune(layerwise.METHODS[name], spec, params, [batch], 0.5)
    assert flj.sparsity(pruned) == 0.5
    first = params["fc1"]["kernel"]
    np.testing.assert_array_equal(params["fc1"]["bias"], pruned["fc1"]["bias"])
    hidden = nn.relu(batch[0] @ pruned["fc1"]["kernel"] + params["fc1"]["bias"])
    for layer, inputs in (("fc1", batch[0]), ("fc2", hidden)):
        kernel = np.asarray(params[layer]["kernel"])
        expected = layerwise.METHODS[name](
            kernel.T[None], np.asarray(moment_of(inputs))[None], kernel.size // 2
        )[0].T
        np.testing.assert_allclose(pruned[layer]["kernel"], expected, rtol=1e-3, atol=1e-4)
    assert (first != pruned["fc1"]["kernel"]).any()  # and the argument stays as it was


def test_a_loss_difference_is_paired_and_counts_seeds(tmp_path):
    rng = np.random.default_rng(0)
    theirs = rng.exponential(size=(3, 400))
    hard = theirs - 0.1 + 0.01 * rng.normal(size=theirs.shape)
    found = paired.loss_difference(hard, theirs)
    assert found.high < 0 and found.mean == pytest.approx(-0.1, abs=0.002)
    one = paired.loss_difference(hard[:1], theirs[:1])
    d = hard[0] - theirs[0]
    np.testing.assert_allclose(one.high - one.mean, 1.96 * d.std(ddof=1) / 20)
    # seeds that disagree make it wide, though each is sure
    varied = theirs + np.array([[-1.0], [0.0], [1.0]])
    assert (
        paired.loss_difference(varied, theirs).low
        < -1
        < 1
        < (paired.loss_difference(varied, theirs).high)
    )
    with pytest.raises(ValueError, match="two arrays"):
        paired.loss_difference(theirs[:1], theirs)


def row_of(folder, method, losses, seed=0, sparsity=0.5):
    name = f"{method}{seed}{sparsity}.npy"
    np.save(folder / name, np.asarray(losses, np.float32))
    cell = {"model": "m", "mode": "one_shot", "sparsity_target": sparsity}
    loss = float(np.mean(losses))
    own = {"loss": loss if math.isfinite(loss) else None, "zero_loss": 2.0, "losses": name}
    return {**cell, "method": method, "seed": seed, **own}


def test_wins_losses_and_the_best_of_the_others(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.exponential(size=300)
    noise = rng.normal(size=300)
    rows = [
        row_of(tmp_path, "fishleg", base),
        row_of(tmp_path, "magnitude", base + 0.5),
        row_of(tmp_path, "kfac", base - 0.3),
        row_of(tmp_path, "diagonal", base + noise - noise.mean()),
        row_of(tmp_path, "wanda", np.full(300, np.nan)),
        row_of(tmp_path, "fishleg", base + 5, sparsity=0.9),
        row_of(tmp_path, "kfac", base + 4, sparsity=0.9),
        row_of(tmp_path, "mfac", base, seed=1),  # no seed in common
    ]
    found = duels.fight(tmp_path, rows)
    outcomes = {(duel.other, duel.sparsity): duel.outcome for duel in found}
    assert outcomes == {
        ("magnitude", 0.5): "win",
        ("kfac", 0.5): "loss",
        ("diagonal", 0.5): "tie",
        ("wanda", 0.5): "win",
        ("kfac", 0.9): "loss",
    }
    best = duels.best_peers(rows, found, contestants.PEERS)
    assert [(duel.other, duel.collapsed) for duel in best] == [("kfac", False), ("kfac", True)]
    assert "in 1 cells of 2" in duels.summary(best)
    assert "worse outside its paired interval in 1 cells" in duels.summary(best)
    assert "nowhere worse" in duels.summary([d for d in found if d.outcome != "loss"])
    assert "both collapsed" in duels.show(found, best)


def test_a_table_has_medians_over_seeds_and_the_lead_on_the_best(tmp_path):
    base = np.arange(40.0)
    settings = {"examples": 64, "test_examples": 40}
    rows = [
        row_of(tmp_path, method, base + shift + seed, seed)
        | {"above_dense": shift + seed, "dataset": "digits", "settings": settings}
        for method, shift in (("magnitude", 9.0), ("kfac", 2.0), ("fishleg", 1.0))
        for seed in (0, 1, 2)
    ]
    best = duels.best_peers(rows, duels.fight(tmp_path, rows), contestants.PEERS)
    made = record_table.of_mode(rows, best, "one_shot")
    further = [row | {"model": "n", "settings": settings | {"test_examples": 500}} for row in rows]
    of_both = record_table.of_mode(rows + further, [], "one_shot")
    assert "the first 40 or 500 test" in of_both.examples
    spreads = [[10.0, 9.0, 11.0], [3.0, 2.0, 4.0], [2.0, 1.0, 3.0]]
    assert made.rows == [["m, 50 %", *spreads, "kfac", list(best[0].difference)]]
    assert best[0].difference[0] == pytest.approx(-1.0)
    assert "2.0000 (1.0000–3.0000)" in str(made) and made.seed == "0, 1, 2"


@pytest.fixture
def arena_of_one(monkeypatch):
    """An arena with one tiny network on the digits."""
    spec = make_spec("tiny", modules.Mlp((6, 10)), "digits", (8, 8, 1), **SETTINGS)
    monkeypatch.setitem(networks.NETWORKS, "tiny", spec)
    monkeypatch.setattr(gradual, "RATE", 1e-3)
    return spec


def rows_of(out):
    return json.loads((out / "results.json").read_text())


def command(out, *more):
    numbers = ["--examples", "64", "--steps", "50", "--test-examples", "100"]
    return ["--quick", "--networks", "tiny", *numbers, "--out", str(out), *more]


@pytest.mark.slow
def test_an_arena_is_fought_shown_and_not_fought_again(arena_of_one, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = command("out", "--methods", "magnitude,fishleg,wanda")
    # FishLeg at its start: what is looked at here is the arena
    quick = contestants.ARGUMENTS["fishleg"]._replace(estimator={"learn": False, "start": 32})
    monkeypatch.setitem(contestants.ARGUMENTS, "fishleg", quick)
    assert arena.main(run) == 0
    rows = rows_of(tmp_path / "out")
    cells = [(row["mode"], row["method"], row["sparsity_target"], row["seed"]) for row in rows]
    both = ("magnitude", "fishleg")
    expected = [("one_shot", m, s, 0) for m in (*both, "wanda") for s in (0.7, 0.9)]
    expected += [("gradual", m, 0.9, 0) for m in both]
    assert sorted(cells) == sorted(expected)
    assert len({row["losses"] for row in rows}) == len(rows)
    for row in rows:
        losses = np.load(tmp_path / "out" / row["losses"])
        assert losses.shape == (100,) and losses.mean() == pytest.approx(row["loss"], rel=1e-5)
        assert row["above_dense"] == pytest.approx(row["loss"] - row["dense_loss"])
        assert row["sparsity"] == pytest.approx(row["sparsity_target"], abs=2e-3)
        assert row["seconds"] > 0 and row["zero_loss"] > row["dense_loss"]
    printed = capsys.readouterr().out
    assert "tiny, one_shot: loss above dense" in printed and "gradual: FishLeg against" in printed
    assert "FishLeg against the best of" in printed
    for name in ("one_shot.png", "gradual.png", "duels.json"):
        assert (tmp_path / "out" / name).stat().st_size > 500

    def nothing(*_, **__):
        pytest.fail("pruned again")

    monkeypatch.setattr(one_shot, "prune", nothing)
    monkeypatch.setattr(gradual, "prune", nothing)
    assert arena.main(run) == 0
    assert rows_of(tmp_path / "out") == rows


def test_a_method_that_fails_does_not_end_the_others(arena_of_one, tmp_path, monkeypatch, capsys):
    broken = contestants.ARGUMENTS["kfac"]._replace(estimator={"damping": -1.0})
    monkeypatch.setitem(contestants.ARGUMENTS, "kfac", broken)
    run = command(tmp_path / "out", "--methods", "kfac,magnitude", "--mode", "one_shot")
    assert arena.main(run) == 1
    assert {row["method"] for row in rows_of(tmp_path / "out")} == {"magnitude"}
    assert "failed: tiny, one_shot, kfac, seed 0: damping" in capsys.readouterr().err


@pytest.mark.slow
def test_a_shared_fit_gives_what_a_call_of_its_own_gives(arena_of_one, tmp_path):
    network = networks.load("tiny", train_in=tmp_path)
    both = list(one_shot.prune("kfac", network, [0.5, 0.8], examples=64, seed=0))
    (alone,) = one_shot.prune("kfac", network, [0.8], examples=64, seed=0)
    for shared, own in zip(*map(jax.tree.leaves, (both[1][1], alone[1])), strict=True):
        np.testing.assert_array_equal(shared, own)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--networks", "vgg"], "'vgg' is not one of"),
        (["--methods", "magic"], "'magic' is not one of"),
        (["--steps", "55"], "55 steps are not a multiple of 10"),
        (["--networks", "mlpnet", "--data-dir", "nowhere"], "--data-dir nowhere has no mnist"),
        (["--sparsities", "1"], "'1' is not a sparsity"),
    ],
)
def test_bad_arguments_get_one_line_and_nothing_is_written(refuses, arguments, message):
    refuses(arena.main, arguments, message)


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_networks_are_small_and_have_layers_to_prune(name, key):
    spec = networks.NETWORKS[name]
    params, _ = jax.eval_shape(spec.init, key)
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert 5_000 < weights < 300_000
    assert (networks.stacked(spec) is not None) == (name == "transformer")
