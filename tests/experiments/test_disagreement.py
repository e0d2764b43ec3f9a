"""Who loses by pruning: the ensemble, a short run, and that it goes on."""

import argparse
import json

import jax
import numpy as np
import pytest

import fishleg_jax as flj
from experiments.data import datasets
from experiments.disagreement import __main__ as disagreement
from experiments.disagreement import ensemble, influence
from experiments.disagreement.comparing import Case, compare, fields


@pytest.fixture(scope="module")
def few_digits():
    """A fifth of the digits."""
    train, test = datasets.digits()
    return datasets.Data(tuple(x[:256] for x in train), tuple(x[:100] for x in test))


@pytest.fixture
def run(few_digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "load", lambda *_: few_digits)
    digits = disagreement.DIGITS._replace(epochs=5)
    monkeypatch.setitem(disagreement.SPECS, "digits", digits)

    def main(method, streams=False):
        short = ["--subsets", "4", "--epochs", "2", "--examples", "64", "--sparsity", "0.8"]
        out = tmp_path / "out"
        assert disagreement.main([*short, "--method", method, "--out", str(out)]) == 0
        said = "".join(capsys.readouterr()[: 2 if streams else 1])
        return json.loads((out / "results.json").read_text()), said

    return main


def test_a_run_counts_mismatches_and_goes_on(run, tmp_path):
    rows, said = run("magnitude")
    (row,) = rows
    assert row["method"] == "magnitude" and 0 < row["mismatches"] <= 100
    assert len(row["where"]) == row["mismatches"] and len(row["predicted"]) == len(row["where"])
    assert row["lost"] - row["gained"] == round(row["dense_accuracy"] - row["accuracy"])
    assert len(row["where_lost"]) == row["lost"] and set(row["where_lost"]) <= set(row["where"])
    # images that all or none of four networks were trained on have no score
    trained_on = sum(ensemble.subset(256, number).astype(int) for number in range(4))
    unscored = int(((trained_on == 0) | (trained_on == 4)).sum())
    assert 0 < unscored == row["settings"]["unscored"]
    assert sum(group[2] for group in row["by_memorisation"]) == 256 - unscored
    for name in ("lost.png", "rates.png", "influence.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    assert "magnitude" in said and "calibration error" in said and "no influence" not in said
    before = sorted((tmp_path / "out" / "subsets").iterdir())
    assert len(before) == 4
    kept, _ = run("magnitude")
    assert kept == rows
    # results of a version that counted them with a score of 0 are measured again
    path = tmp_path / "out" / "results.json"
    settings = {name: x for name, x in row["settings"].items() if name != "unscored"}
    path.write_text(json.dumps([{**row, "settings": settings, "memorised_excess": 9.0}]))
    kept, _ = run("magnitude")
    assert kept[-1]["memorised_excess"] == row["memorised_excess"] != 9
    path.write_text(json.dumps(rows))
    # files of an earlier version hold training images alone: the scores stay, influence is missing
    with np.load(before[0]) as stored:
        assert stored["correct"].shape == (256,) and stored["test"].shape == (100,)
        np.savez(before[0], correct=stored["correct"])
    (tmp_path / "out" / "influence.png").unlink()
    kept, said = run("magnitude", streams=True)
    assert kept == rows and "no influence: 1 of 4 networks in" in said
    assert not (tmp_path / "out" / "influence.png").exists()


def test_the_table_says_how_many_images_have_no_score(few_digits):
    scores = np.zeros(256)
    scores[:5] = np.nan
    spec = disagreement.DIGITS
    params = spec.init(jax.random.key(0))
    case = Case(spec, *params, few_digits, scores)
    other = jax.tree.map(lambda w: w.at[..., 0].set(0), params[0])
    test, train = (compare(case, other, params[1], train=which) for which in (False, True))
    assert train.unscored == 5 and test.unscored == 0
    assert sum(group[2] for group in fields(test, train)["by_memorisation"]) == 251
    row = {**fields(test, train), "method": "kfac", "seed": 0, "model": "mlp", "settings": {}}
    args = argparse.Namespace(
        dataset="digits", sparsity=0.8, examples=64, subsets=12, most_stages=1
    )
    (row,) = influence.with_influence([row], None, None)
    assert "no score" not in disagreement.table([row], args).note
    row["settings"] = {"unscored": 5}
    note = disagreement.table([row], args).note
    assert "; 5 images that all or none of the 12 networks were trained on have no score" in note


def test_labels_are_set_beside_the_teacher():
    row = {"seed": 0, "test_examples": 200}
    rows = [
        {**row, "method": "fishleg", "where": list(range(10))},
        {**row, "method": f"fishleg{disagreement.FREE}", "where": list(range(4))},
    ]
    text = disagreement.against_labels(rows)
    assert text.startswith("fishleg, label-free: -3.0 (-5.4 to -0.6) points")
    assert disagreement.against_labels(rows[:1]) == ""


def test_subsets_have_seven_in_ten_and_differ():
    one, other = ensemble.subset(100, 0), ensemble.subset(100, 1)
    assert one.sum() == other.sum() == 70
    assert 30 < (one & other).sum() < 65
    np.testing.assert_array_equal(one, ensemble.subset(100, 0))


def made_ensemble(models=400, seed=0):
    """Test images of which image 0 hangs on training image 3, image 1 on nothing."""
    rng = np.random.default_rng(seed)
    members = rng.random((models, 8)) < 0.7
    test = rng.random((models, 4)) < 0.5
    test[:, 0] = np.where(members[:, 3], test[:, 0] | (rng.random(models) < 0.8), test[:, 0])
    test[:, 3] = members[:, 6]  # of another class, and wholly
    return ensemble.Ensemble(members, members, test)


@pytest.mark.parametrize("at_once", [4, 2**20])
def test_the_strongest_influence_is_found_within_a_class_and_measured_apart(at_once):
    made, labels = made_ensemble(), np.array([0, 0, 0, 0, 1, 1, 1, 1])
    found = influence.strongest(made, labels, np.array([0, 0, 2, 1]), at_once)
    assert found.image[0] == 3 and found.image[3] == 6
    whole = flj.influence(made.test, made.members).score
    np.testing.assert_allclose(found.score[[0, 3]], [whole[3, 0], whole[6, 3]])
    # both halves find the same image, and measure it in each other
    halves = [flj.influence(made.test[k::2], made.members[k::2]).score[3, 0] for k in (0, 1)]
    np.testing.assert_allclose(found.held_out[0], np.mean(halves))
    assert found.held_out[3] == 1
    # a class without training images is unknown
    assert found.image[2] == -1 and np.isnan(found.score[2]) and np.isnan(found.held_out[2])


def test_noise_has_no_influence_when_it_is_measured_apart():
    rng = np.random.default_rng(0)
    members = rng.random((20, 200)) < 0.7
    made = ensemble.Ensemble(members, members, rng.random((20, 500)) < 0.5)
    found = influence.strongest(made, np.zeros(200, int), np.zeros(500, int))
    error = np.nanstd(found.held_out) / 500**0.5
    assert abs(np.nanmean(found.held_out)) < 4 * error < 0.1
    assert np.nanmean(found.score) > 0.4  # the highest of 200 is high by chance


def test_the_excess_compares_images_that_the_dense_network_has_right():
    held_out = np.array([0.5, 0.3, 0.1, 0.0, 0.9, np.nan])
    found = influence.Strongest(np.zeros(6, int), held_out, held_out)
    right = np.array([True, True, True, True, False, True])
    rows = [{"seed": 0, "method": "kfac", "where_lost": [0, 1]}]
    (row,) = influence.with_influence(rows, found, right)
    np.testing.assert_allclose(row["influence_excess"], 0.4 - 0.05)
    np.testing.assert_allclose(row["influence_error"], (0.02 / 2 + 0.005 / 2) ** 0.5)
    assert "influence on lost images +0.350" in influence.text([row])
    # one lost image has no standard error, and an ensemble without test images no influence
    assert influence.excess(found, [0], right) == (None, None)
    (unknown,) = influence.with_influence(rows, None, None)
    assert unknown["influence_excess"] is None and influence.text([unknown]) == ""


def test_bad_arguments_are_refused(refuses):
    refuses(disagreement.main, ["--method", "magnitude;none"], "'none' is not one of")
    refuses(disagreement.main, ["--sparsity", "1"], "not a sparsity")
