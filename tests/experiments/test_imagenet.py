"""The experiment from end to end on a tiny network: what is written, and what is not done again."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj
from experiments.estimates import dampings, fitting
from experiments.imagenet import __main__ as imagenet
from experiments.imagenet import evaluation as imagenet_run
from experiments.imagenet import methods as imagenet_methods
from experiments.imagenet import one_method as imagenet_prune
from experiments.imagenet import tables as imagenet_tables
from fishleg_jax.pruning import update
from tests.experiments import small_imagenet as small

pytestmark = pytest.mark.slow

SETTINGS = {
    "calibration": 16,
    "held-out": 8,
    "gradients": 8,
    "batch": 8,
    "solve": 8,
    "updates": 3,
    "kfac-mean": 2,
    "iterations": 2,
    "chunk": 6,
}
ARGUMENTS = [f"--{name}={value}" for name, value in SETTINGS.items()]


@pytest.fixture(scope="module", autouse=True)
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    small.write_shared(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FISHLEG_SHARED", str(folder))
        yield folder


def run(out, *arguments):
    given = [*ARGUMENTS, "--out", str(out), *arguments]
    return imagenet.main(given, small.NETWORK, small.load)


def rows_of(out):
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two methods, stopped in the second and then gone on with."""
    out = tmp_path_factory.mktemp("out")
    arguments = ["--method", "magnitude,mfac", "--sparsity", "0.5,0.75"]
    count, prune = 0, flj.prune_one_shot

    def killed(*args, **kwargs):
        nonlocal count
        count += 1
        if count == 15:  # magnitude: 3 to choose and 3 more; mfac: 5 + 3 to choose
            raise KeyboardInterrupt
        return prune(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flj, "prune_one_shot", killed)
        with pytest.raises(KeyboardInterrupt):
            run(out, *arguments)
    before = rows_of(out), (out / "dampings.json").read_text()
    assert run(out, *arguments) == 0
    return out, arguments, before


def test_every_combination_is_there_once(finished):
    out, _, _ = finished
    rows = rows_of(out)
    dense = [row for row in rows if row["method"] == "dense"]
    keys = [(r["method"], r["compensation"], r["sparsity_target"]) for r in rows if r not in dense]
    assert len(dense) == 1 and len(set(keys)) == len(keys) == 8
    for row in rows:
        if row in dense:
            continue
        assert row["sparsity"] == math.floor(row["sparsity_target"] * 1548) / 1548
        assert row["prunable_weights"] == 1548 == 3 * 4 + 8 * 8 * 4 * 6
        assert row["photos"] == 20 and row["dense_top1"] == dense[0]["top1"]
        ranks = np.array(row["ranks"].split(), int)
        assert row["top1"] == 100 * np.mean(ranks == 0) and row["top5"] == 100 * np.mean(ranks < 5)
        assert row["curvature_examples"] == (0 if row["method"] == "magnitude" else 16)
        assert (row["solve_damping"] is not None) == (row["compensation"] == "group")
    assert (out / "top1_vs_sparsity.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_there_is_kept_and_used(finished, monkeypatch, capsys):
    out, arguments, (rows, dampings) = finished
    assert 0 < len(rows) < 9 and rows_of(out)[: len(rows)] == rows
    assert (out / "dampings.json").read_text() == dampings  # none was looked for again
    after = (out / "results.json").read_bytes()
    monkeypatch.setattr(fitting, "fit", lambda *a, **k: pytest.fail("fitted again"))
    monkeypatch.setattr(flj, "prune_one_shot", lambda *a, **k: pytest.fail("pruned again"))
    assert run(out, *arguments) == 0
    assert (out / "results.json").read_bytes() == after
    printed = capsys.readouterr().out
    assert "top-1 in %, batch norm as stored and recomputed" in printed
    assert all(words in printed for words in ("recomputed, 50 %", "fit, GB predicted"))


def test_tables_are_kept_by_what_is_in_them(finished):
    """Top-1 and top-5 beside the dense network's, costs, and a lead for every peer there is."""
    out, _, _ = finished
    rows = rows_of(out)
    dense, pruned = rows[0], [row for row in rows if row["method"] != "dense"]
    made = imagenet_tables.made(pruned, 0.5)
    assert made["top1"].columns[0] == "" and "50 %" in made["top1"].columns
    for top in (1, 5):
        column = made[f"top{top}"].columns.index("50 %")
        shown = {row[0]: row[column] for row in made[f"top{top}"].rows}
        assert shown["dense"] == dense[f"top{top}"]
        for row in pruned:
            if row["sparsity_target"] == 0.5:
                name = f"{row['method']}, {row['compensation']}"
                assert shown[name] == row[f"top{top}"]
    assert "lead" not in made  # of FishLeg, which is not there
    ours = [row | {"method": row["method"].replace("mfac", "fishleg")} for row in pruned]
    made["lead"] = imagenet_tables.made(ours, 0.5)["lead"]
    ((name, *leads),) = made["lead"].rows
    assert name == "over magnitude"
    at = [row for row in ours if (row["sparsity_target"], row["compensation"]) == (0.5, "group")]
    mean = {row["method"]: row["top1"] for row in at}
    found = leads[made["lead"].columns[1:].index("as stored, group, top-1")]
    assert found.startswith(f"{mean['fishleg'] - mean['magnitude']:+.1f} (")
    for table in made.values():
        assert all(len(row) == len(table.columns) for row in table.rows) and str(table)


def test_no_damping_was_better_than_the_one_chosen_by_what_counts(finished):
    out, _, _ = finished
    told = json.loads((out / "dampings.json").read_text())
    assert {(row["method"], row["kind"]) for row in told} == {
        ("magnitude", "solve"),
        ("mfac", "scores"),
        ("mfac", "solve"),
    }
    for row in told:
        lowest = min(row["losses"].values())
        assert row["losses"][f"{row['damping']:.3g}"] * (1 - dampings.COUNTS) <= lowest


def test_other_settings_are_another_result(finished, monkeypatch):
    out, _, _ = finished
    before = len(rows_of(out))
    assert run(out, "--method", "magnitude", "--sparsity", "0.5", "--seed", "1") == 0
    assert len(rows_of(out)) > before


def test_no_photo_is_seen_twice(shared, tmp_path):
    parser = imagenet.make_parser()
    args = parser.parse_args([*ARGUMENTS, "--out", str(tmp_path)])
    job = imagenet._job(args, small.NETWORK, small.load)
    fit, held_out, seen = (
        {photo.tobytes() for photo in part.read(range(len(part)))[0]}
        for part in (job.fit, job.held_out, job.validation)
    )
    assert (len(fit), len(held_out), len(seen)) == (16, 8, 20)
    assert not fit & held_out and not (fit | held_out) & seen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gradients", "5"], "--gradients 5 must divide --calibration 16"),
        (["--samples", "3"], "--samples 3 must divide --batch 8"),
        (["--solve", "17"], "--solve must be at most --calibration 16"),
        (["--calibration", "32"], "40 photos are wanted"),
        (["--photos", "21"], "21 photos are wanted"),
        (["--method", "other"], "'other' is not one of"),
        (["--data-dir", "nowhere"], "nowhere has no imagenet2012"),
    ],
)
def test_bad_arguments_are_one_line(refuses, arguments, message):
    refuses(lambda given: run("out", *given), arguments, message)


def test_missing_weights_are_one_line(refuses):
    main = lambda given: imagenet.main([*ARGUMENTS, *given])  # noqa: E731
    refuses(main, ["--weights", "none.npz"], "make it with: python ../shared/data/prepare.py")


def test_a_walk_ends_where_the_loss_rises():
    def attempt(damping):
        return f"made with {damping:g}", abs(math.log10(damping) - 2)

    up = dampings.choose(attempt, 1.0, factor=10, most=9)
    assert up.damping == 100 and up.result == "made with 100"
    assert list(up.losses) == pytest.approx([1, 10, 100, 1000])
    down = dampings.choose(attempt, 1e4, factor=10, most=9)
    assert down.damping == pytest.approx(100) and len(down.losses) == 5
    assert len(dampings.choose(attempt, 1e-9, factor=10, most=3).losses) == 3


def test_a_walk_goes_nowhere_for_rounding():
    still = dampings.choose(lambda d: (None, 1.7 - 1e-6 * d), 1.0, factor=10, most=9)
    assert still.damping == 1 and list(still.losses) == pytest.approx([1, 10, 0.1])


def test_a_walk_survives_dampings_that_fail():
    def attempt(damping):
        if damping < 10:
            raise FloatingPointError
        return None, damping

    assert dampings.choose(attempt, 1.0, factor=10, most=5).damping == 10
    with pytest.raises(FloatingPointError, match="no damping of 0.1, 1, 0.01 works"):
        dampings.choose(attempt, 0.1, factor=10, most=3)


def test_ranks_count_likelier_classes_ties_and_nan():
    logits = jnp.array([[3.0, 2, 1], [3, 2, 1], [2, 2, 1], [jnp.nan, 2, 1], [1, jnp.nan, 0]])
    labels = jnp.array([0, 2, 0, 0, 0])
    assert imagenet_run.ranks(logits, labels).tolist() == [0, 2, 1, 2, 1]


@pytest.mark.parametrize("name", ["woodfisher", "mfac"])
def test_a_state_moved_to_a_damping_is_one_fitted_there(name, tmp_path):
    args = imagenet.make_parser().parse_args([*ARGUMENTS, "--out", str(tmp_path)])
    job = imagenet._job(args, small.NETWORK, small.load)
    estimates = [imagenet_prune.Estimate(name, job, damping) for damping in (0.5, 2e-2)]
    estimates[0].move(2e-2)
    diagonals = [e.estimator.diagonal(e.state, job.params) for e in estimates]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4), *diagonals)


def test_the_damping_of_means_is_smaller_by_their_number(tmp_path):
    args = imagenet.make_parser().parse_args([*ARGUMENTS, "--out", str(tmp_path)])
    for name, each in (("mfac", 2), ("kfac", 2), ("fishleg", 1)):
        method = imagenet_methods.make(name, small.NETWORK.model, args, 0.5)
        state = method.estimator.init(small.load(None)[0])
        assert float(state.damping) == 0.5 / each


def test_an_error_of_one_method_is_told_and_leaves_the_others(tmp_path, monkeypatch, capsys):
    score = update.score

    def failing(surgeon, state, *rest):
        if hasattr(state, "damping"):
            raise FloatingPointError("not finite")
        return score(surgeon, state, *rest)

    monkeypatch.setattr(update, "score", failing)
    arguments = ["--method", "mfac,magnitude", "--compensation", "independent"]
    assert run(tmp_path, *arguments, "--sparsity", "0.5") == 1
    assert "failed: mfac: no damping" in capsys.readouterr().err
    assert [row["method"] for row in rows_of(tmp_path)] == ["dense", "magnitude"]


def test_bounded_memory_gives_the_same_network(tmp_path):
    arguments = ["--method", "mfac", "--sparsity", "0.75", "--damping", "1", "--solve-damping", "1"]
    assert run(tmp_path, *arguments) == 0
    assert run(tmp_path, *arguments, "--remat", "2", "--examples-per-chunk", "4") == 0
    rows = [row for row in rows_of(tmp_path) if row["method"] == "mfac"]
    assert [row["settings"].get("remat") for row in rows] == [None, None, 2, 2]
    for whole, bounded in zip(rows[:2], rows[2:], strict=True):
        assert bounded["settings"]["examples_per_chunk"] == 4
        np.testing.assert_allclose(whole["loss"], bounded["loss"], rtol=1e-5)
        np.testing.assert_allclose(
            whole["recalibrated_loss"], bounded["recalibrated_loss"], rtol=1e-5
        )
