"""Cells of memory: what is needed for an accuracy, a short run, and that it goes on."""

import json

import jax
import numpy as np
import pytest

from experiments.data import datasets
from experiments.models.specs import MODELS
from experiments.report import record
from experiments.storage import __main__ as storing
from experiments.storage import measuring, tables

EACH = [1.0, 2.0, 4.0, 8.0]
PLAIN = (next(iter(measuring.CODINGS)), None)


def test_cells_needed_lie_between_those_that_were_tried():
    accuracy = np.array([50.0, 80.0, 90.0, 95.0])
    assert measuring.needed(EACH, accuracy, 90.0) == pytest.approx(4)
    assert measuring.needed(EACH, accuracy, 85.0) == pytest.approx(8**0.5)
    assert measuring.needed(EACH, accuracy, 40.0) == 1.0
    assert measuring.needed(EACH, accuracy, 96.0) is None
    # reached by chance with two cells, and for good with eight
    assert measuring.needed(EACH, np.array([50, 90, 80, 95]), 85.0) > 4


def test_the_ratio_is_that_of_the_cells_with_its_interval():
    noise = np.random.default_rng(0).normal(0, 0.5, (4, 50))
    equal = measuring.Curve(EACH, np.array([50.0, 70.0, 80.0, 90.0])[:, None] + noise)
    better = measuring.Curve(EACH, np.array([70.0, 80.0, 90.0, 95.0])[:, None] + noise)
    found = measuring.ratio(better, equal, 80.0)
    assert found["low"] < 0.5 < found["high"] and found["high"] - found["low"] < 0.1
    np.testing.assert_allclose(found["ratio"], 0.5, atol=0.05)
    np.testing.assert_allclose(found["ratio"], found["ours"] / found["theirs"])
    dearer = better._replace(cells=[1.5 * n for n in EACH])  # what else has to be kept
    np.testing.assert_allclose(
        measuring.ratio(dearer, equal, 80.0)["ratio"], 1.5 * found["ratio"], rtol=1e-6
    )
    unreached = measuring.ratio(better, equal, 92.0)
    assert unreached["ratio"] is unreached["low"] is None and unreached["ours"] > 4


def test_a_ratio_that_is_not_reached_is_a_blank_in_the_table(tmp_path):
    accuracies = {"equal": [50.0, 80.0, 88.0], "by weight": [70.0, 95.0, 99.9]}
    accuracies["by row"] = accuracies["by weight"]
    settings = {"cell": "0.2", "sparsity": 0.9, "examples": 64, "draws": 2, "test": 100}
    settings |= {"curvature": "noisy", "most_stages": 16}
    rows = [
        {"model": "mlp", "network": "dense", "seed": 0, "settings": settings}
        | {"allotment": name, "each": each, "exact": 100.0, "accuracies": [accuracy, accuracy]}
        | {"total_cells": 1000 * each}
        for name, own in accuracies.items()
        for each, accuracy in zip((1.0, 4.0, 16.0), own, strict=True)
    ]
    made = tables.needed(rows, weights=500)
    record.keep("some", made, "experiments.storage", [], tmp_path)
    kept = json.loads((tmp_path / "docs/results/some.json").read_text())["rows"]
    for name, equal, by_weight, by_row, *ratios in kept:
        assert name.startswith("dense") and equal is None and ratios == [None, None]
        assert 8 < by_weight == by_row < 32  # twice as many cells as weights


@pytest.mark.slow
def test_a_run_stores_digits_and_goes_on(tmp_path, capsys, monkeypatch):
    train, test = datasets.digits()
    few = datasets.Data(tuple(x[:256] for x in train), tuple(x[:100] for x in test))
    monkeypatch.setattr(datasets, "load", lambda *_: few)
    monkeypatch.setitem(storing.MODELS, "mlp", MODELS["mlp"]._replace(epochs=8))
    monkeypatch.setattr(measuring, "made", _quick(measuring.made))
    codings = {name: measuring.CODINGS[name] for name in (PLAIN[0], "signs not protected")}
    monkeypatch.setattr(measuring, "CODINGS", codings)
    out = tmp_path / "out"
    arguments = ["--each", "1,4", "--draws", "3", "--examples", "64", "--cell", "pcm"]
    arguments += ["--out", str(out)]
    assert storing.main(arguments) == 0
    said = capsys.readouterr().out
    rows = json.loads((out / "results.json").read_text())
    assert {row["network"] for row in rows} == {"dense", "pruned"}
    for row in rows:
        if row["allotment"] == "digital":
            assert row["total_cells"] > row["cells"] > 0 and row["levels"] == 4
            continue
        assert len(row["accuracies"]) == 3 and row["expected_rise"] > 0
    by = {(r["network"], r["allotment"], r["each"]): r for r in rows if r["coding"] in PLAIN}
    for name in ("dense", "pruned"):
        equal, weight, row = (by[name, allotment, 4.0] for allotment in measuring.ALLOTMENTS)
        assert equal["cells"] == weight["cells"] >= row["cells"] > 0.98 * equal["cells"]
        assert weight["expected_rise"] < row["expected_rise"] < equal["expected_rise"]
        # numbers of cells have to be kept, too
        beside = [one["total_cells"] - one["cells"] for one in (equal, row, weight)]
        assert beside[0] < beside[1] < beside[2]
        assert by[name, "equal", 1.0]["expected_rise"] > equal["expected_rise"]
    assert "dense, by row" in said and "signs not protected" in said
    assert (out / "cells_pcm.png").stat().st_size > 0
    assert storing.main(arguments) == 0
    assert json.loads((out / "results.json").read_text()) == rows


def _quick(made):
    """Prunes by magnitude in place of FishLeg, which compiles for long."""

    def quick(spec, params, constants, split, *, sparsity, **options):
        if sparsity is not None:
            params = jax.tree.map(
                lambda w: w * (abs(w) > np.quantile(abs(w), sparsity)) if w.ndim > 1 else w, params
            )
        dense = made(spec, params, constants, split, sparsity=None, **options)
        return dense if sparsity is None else dense._replace(name="pruned")

    return quick


def test_bad_arguments_are_refused(refuses):
    refuses(storing.main, ["--each", "0.5,2"], "a weight takes at least one cell")
    refuses(storing.main, ["--cell", "0"], "not a positive number")
