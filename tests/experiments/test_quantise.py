"""Solvers of blocks on levels: penalties that arrive, blocks that are hard, a run that goes on."""

import json

import numpy as np
import pytest

import fishleg_jax as flj
from experiments.models.specs import MODELS
from experiments.quantise import __main__ as quantise
from experiments.quantise import networks, solving
from fishleg_jax.pruning.selection import _annealing, _quantise

HARD = [name for name in solving.SAMPLERS if "hard" in name]


def block(seed, n):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(2 * n, n)) @ rng.normal(size=(n, n))
    fisher = inputs.T @ inputs / (2 * n)
    return solving.Block(
        rng.normal(size=n).astype(np.float32), fisher.astype(np.float32), keep=n // 2
    )


@pytest.mark.parametrize("solver", solving.SAMPLERS)
def test_the_penalty_of_a_row_reaches_the_sampler(solver, monkeypatch):
    pytest.importorskip("dwave.samplers")
    sample, shares = _quantise.sample, []
    monkeypatch.setattr(_quantise, "sample", lambda *rest: shares.append(rest[5]) or sample(*rest))
    solving.solve(solver, block(0, 6), 1, 0)
    assert shares == ([10.0] if solver in HARD else list(_annealing.PENALTIES))


def test_annealing_is_that_of_the_library():
    pytest.importorskip("dwave.samplers")
    own = block(1, 16)
    found = flj.selection.quantise(
        own.weights, own.fisher, keep=own.keep, bits=1, solver="annealing", seed=3
    )
    assert found.after < found.before
    assert solving.solve("annealing", own, 1, 3) == pytest.approx(float(found.after), rel=1e-5)


def test_a_hard_penalty_freezes_the_search():
    pytest.importorskip("dwave.samplers")
    energies = {
        solver: [solving.solve(solver, block(seed, 48), 1, seed) for seed in range(3)]
        for solver in ("rounding", *solving.SAMPLERS)
    }
    assert energies["hard penalty without moves"] == energies["rounding"]
    soft = np.array(energies["annealing without moves"]) / energies["rounding"]
    assert soft.max() < 0.9
    # the moves after the sampler hide it
    assert np.max(np.array(energies["hard penalty"]) / energies["rounding"]) < 0.9


def test_small_blocks_have_the_largest_scores_of_their_row():
    rng = np.random.default_rng(0)
    weights, inputs = rng.normal(size=(3, 20)), rng.normal(size=(50, 20))
    layers = {"layer": (weights, inputs.T @ inputs / 50)}
    found = networks.blocks_of(layers, 4, 0.75, seed=0)
    for small, whole in zip(*found.values(), strict=True):
        scores = whole.weights**2 * np.diagonal(whole.fisher)
        largest = np.sort(scores)[-networks.SMALL :]
        own = small.weights**2 * np.diagonal(small.fisher)
        np.testing.assert_allclose(np.sort(own), largest)
        assert (small.keep, whole.keep) == (networks.SMALL // 2, 5)


def run(out, *options):
    arguments = ["--blocks", "2", "--examples", "128", "--seed", "0,1", "--out", str(out)]
    return quantise.main([*arguments, *options])


@pytest.fixture
def quick(monkeypatch):
    """Energies without solving, and networks without quantising."""
    monkeypatch.setitem(MODELS, "mlp", MODELS["mlp"]._replace(epochs=1))
    calls = []

    def solve(solver, own, bits, seed):
        calls.append((solver, len(own.weights), seed))
        return 2.0 * len(own.weights) if solver == "rounding" else 1.0 * len(own.weights)

    monkeypatch.setattr(solving, "solve", solve)
    monkeypatch.setattr(networks, "measured", lambda *_, **__: {"accuracy": 90.0, "loss": 0.5})
    return calls


def test_a_run_goes_on_where_it_was_stopped(tmp_path, quick, monkeypatch, capsys):
    measured = solving.measured

    def stopped(solver, blocks, *rest):
        if solver == "genetic" and len(blocks[0].weights) > networks.SMALL:
            raise KeyboardInterrupt
        return measured(solver, blocks, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(solving, "measured", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    before = json.loads((tmp_path / "results.json").read_text())
    assert len(before) == 2 * len(solving.SOLVERS)  # of seed 0, all but one; brute force added
    quick.clear()
    assert run(tmp_path) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    assert rows[: len(before)] == before
    assert len(rows) == 2 * (2 * len(solving.SOLVERS) + 1 + len(quantise.HOW))
    # seed 0 lacks a single solver, seed 1 has them all
    assert {call[0] for call in quick if call[2] == 0} == {"genetic"}
    assert (tmp_path / "energies.png").stat().st_size > 1000
    said = capsys.readouterr().out
    for patched in ("solving", "networks"):
        monkeypatch.setattr(getattr(quantise, patched), "measured", None)
    assert run(tmp_path) == 0
    assert json.loads((tmp_path / "results.json").read_text()) == rows
    assert capsys.readouterr().out == said


def test_energies_are_over_those_of_rounding_and_of_brute_force(tmp_path, quick):
    assert run(tmp_path) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    small, whole = quantise.SIZES
    by = lambda size, to: {
        row["solver"]: row["energies"] for row in quantise.compared(rows, size, to)
    }
    assert by(small, solving.BEST)["rounding"] == [2.0] * 4  # two blocks of two seeds
    assert by(small, "rounding")["moves"] == [0.5] * 4
    assert by(whole, "rounding")["moves"] == [0.5] * 4
    assert by(whole, solving.BEST) == {}


@pytest.mark.slow
def test_rounding_does_not_solve_the_small_blocks(tmp_path, monkeypatch):
    pytest.importorskip("dwave.samplers")
    monkeypatch.setitem(MODELS, "mlp", MODELS["mlp"]._replace(epochs=8))
    monkeypatch.setattr(solving, "GENERATIONS", 20)
    arguments = ["--blocks", "6", "--examples", "256", "--out", str(tmp_path)]
    assert quantise.main(arguments) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    found = quantise.compared(rows, quantise.SIZES[0], solving.BEST)
    median = {row["solver"]: np.median(row["energies"]) for row in found}
    assert min(min(row["energies"]) for row in found) > 1 - 1e-4
    assert median["rounding"] > 1.1 and median["annealed moves"] < 1.01
    accuracy = {row["how"]: row["accuracy"] for row in rows if "how" in row}
    assert accuracy["rounding"] < accuracy["moves"] <= accuracy["dense"] + 1


def test_bad_arguments_are_refused(refuses, tmp_path):
    refuses(quantise.main, ["--bits", "-1"], "not a whole number of at least 0")
    refuses(quantise.main, ["--sparsity", "1"], "not a sparsity in [0, 1)")
    (tmp_path / "results.json").write_text('[{"solvers": {}, "networks": []}]')
    refuses(quantise.main, ["--out", str(tmp_path)], "move it away, or choose another --out")
