"""All methods on one network: what is written, what a second run does not do again."""

import contextlib
import functools
import json
import math
import shutil

import jax
import numpy as np
import pytest

import fishleg_jax as flj
from experiments.compare import __main__ as compare
from experiments.compare import one_method
from experiments.models import training
from fishleg_jax.pruning.one_shot import goal
from tests.experiments.test_one_shot import KEYS

pytestmark = pytest.mark.slow

NETWORK = ["--model", "mlp", "--epochs", "1", "--examples", "65", "--gradients", "30"]
METHODS = ["magnitude", "woodfisher", "mfac"]
WEIGHTS = 64 * 128 + 128 * 64 + 64 * 10


def run(out, *arguments, methods=METHODS, seeds="0,1"):
    named = ["--method", ",".join(methods), "--seed", seeds, "--out", str(out)]
    sparsity = [] if "--target" in arguments else ["--sparsity", "0.5,0.9"]
    return compare.main([*NETWORK, *named, *sparsity, *arguments])


def rows_of(out):
    return json.loads((out / "results.json").read_text())


def no_fit(*args, **kwargs):
    pytest.fail("a fit, of what was there already")


@contextlib.contextmanager
def counted():
    """The names of the methods that are fitted meanwhile."""
    names, fit = [], one_method.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            one_method, "fit", lambda *a, name, **k: names.append(name) or fit(*a, name=name, **k)
        )
        yield names


def killed_at(killing_method, killing_seed):
    """`one_method.prune`, killed as it comes to a method and seed."""
    prune = one_method.prune

    def one(method, *args):
        if (method, args[-2]) == (killing_method, killing_seed):
            raise KeyboardInterrupt
        return prune(method, *args)

    return one


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a run that was killed, and what was in its results then."""
    folder = tmp_path_factory.mktemp("compare") / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(one_method, "prune", killed_at("woodfisher", 1))
        run(folder)
    return folder, rows_of(folder)


@pytest.fixture(scope="module")
def resumed(killed):
    """The methods that the same command then fitted."""
    with counted() as names:
        assert run(killed[0]) == 0
    return names


@pytest.fixture(scope="module")
def finished(killed, resumed):
    """The folder of a run that came to its end."""
    return killed[0]


@pytest.fixture
def out(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "out")


@pytest.fixture
def trained(finished, tmp_path):
    """A folder with its networks alone."""
    for path in finished.glob("*.npz"):
        shutil.copy(path, tmp_path)
    return tmp_path


def test_a_killed_run_goes_on(killed, resumed, finished):
    assert len(killed[1]) == 8  # all of seed 0, and the first method of seed 1
    assert resumed == ["woodfisher", "mfac"]
    assert rows_of(finished)[:8] == killed[1]


def test_results_have_all_fields(finished):
    rows = rows_of(finished)
    keys = [(row["method"], row["sparsity_target"], row["seed"]) for row in rows]
    assert sorted(keys) == sorted((m, s, i) for m in METHODS for s in (0.5, 0.9) for i in (0, 1))
    for row in rows:
        assert row.keys() == KEYS | {
            "fit_seconds",
            "prune_seconds",
            "peak_memory_bytes",
            "predicted_memory_bytes",
        }
        target = row["sparsity_target"]
        assert row["sparsity"] == pytest.approx(math.floor(target * WEIGHTS) / WEIGHTS, abs=1e-12)
        assert row["seconds"] == pytest.approx(row["fit_seconds"] + row["prune_seconds"])
        assert row["peak_memory_bytes"] is None or row["peak_memory_bytes"] >= 0
        assert row["curvature_examples"] == (0 if row["method"] == "magnitude" else 60)
        assert row["settings"]["prunable_weights"] == WEIGHTS
    settings = {row["method"]: row["settings"] for row in rows}
    assert settings["woodfisher"]["gradients"] == settings["mfac"]["window"] == 30
    assert settings["woodfisher"]["examples_per_gradient"] == 2
    assert (finished / "accuracy_vs_sparsity.png").stat().st_size > 1000


def test_woodfisher_and_mfac_prune_alike(finished):
    losses = {
        (row["method"], row["seed"], row["sparsity_target"]): row["loss"]
        for row in rows_of(finished)
    }
    for (method, *rest), loss in losses.items():
        if method == "woodfisher":
            assert losses["mfac", *rest] == pytest.approx(loss, rel=1e-3)


def test_all_methods_see_the_same_images(trained, monkeypatch, capsys):
    seen = {}

    def fail(estimator, params, batches, *, name, **others):
        seen[name] = np.concatenate([inputs.reshape(len(inputs), -1) for inputs, _ in batches])
        raise FloatingPointError(f"no inverse of {name}")

    monkeypatch.setattr(one_method, "fit", fail)
    assert run(trained, methods=["diagonal", *METHODS[1:], "kfac", "fishleg"], seeds="0") == 1
    assert {name: len(images) for name, images in seen.items()} == dict.fromkeys(seen, 60)
    for images in seen.values():
        np.testing.assert_array_equal(images, seen["kfac"])
    # one that fails keeps none of the others from their turn
    assert "failed: seed 0, diagonal: no inverse of diagonal" in capsys.readouterr().err
    assert not (trained / "results.json").exists()


def test_what_is_there_is_not_computed_again(out, monkeypatch, capsys):
    before = (out / "results.json").read_bytes()
    monkeypatch.setattr(one_method, "fit", no_fit)
    assert run(out) == 0
    assert (out / "results.json").read_bytes() == before
    printed = capsys.readouterr().out
    assert "seed 1, mfac: 2 of 2 sparsities are in" in printed and "test loss" in printed
    assert len(list(out.iterdir())) == 4  # results, picture, and two networks


def test_a_new_sparsity_is_added_to_what_is_there(out, monkeypatch):
    before = rows_of(out)
    assert run(out, "--sparsity", "0.9,0.7", methods=["magnitude"], seeds="1") == 0
    rows = rows_of(out)
    assert rows[:-1] == before
    added = rows[-1]
    assert (added["method"], added["sparsity_target"], added["seed"]) == ("magnitude", 0.7, 1)


def test_settings_of_other_methods_make_no_difference(out, monkeypatch):
    monkeypatch.setattr(one_method, "fit", no_fit)
    assert run(out, "--damping", "kfac=3") == 0
    assert run(out, "--labels", "sampled", "--stages", "2", methods=["magnitude"]) == 0


def test_other_settings_are_kept_apart(out, capsys):
    before = rows_of(out)
    with counted() as names:
        assert run(out, "--scope", "layer", methods=["magnitude"], seeds="0") == 0
    assert names == ["magnitude"]
    rows = rows_of(out)
    assert rows[: len(before)] == before
    new = rows[len(before) :]
    assert [row["settings"]["scope"] for row in new] == ["layer", "layer"]
    printed = capsys.readouterr().out
    assert f"results.json ({len(before)} results of other settings too)" in printed
    shown = next(line for line in printed.splitlines() if line.startswith("magnitude  "))
    assert [f"{row['accuracy']:.2f}" for row in new] == shown.split()[1:3]


def test_less_memory_is_another_setting_with_the_same_results(out, monkeypatch):
    plain = {
        row["sparsity_target"]: row
        for row in rows_of(out)
        if (row["method"], row["seed"]) == ("mfac", 0)
    }
    number = len(rows_of(out))
    assert run(out, "--remat", "2", "--examples-per-chunk", "24", methods=["mfac"], seeds="0") == 0
    rows = rows_of(out)[number:]
    assert [row["sparsity_target"] for row in rows] == list(plain)
    for row in rows:
        before = plain[row["sparsity_target"]]
        assert row["loss"] == pytest.approx(before["loss"], rel=1e-4)
        own = {**row["settings"]}
        assert (own.pop("remat"), own.pop("examples_per_chunk")) == (2, 24)
        assert own == pytest.approx(before["settings"])
    monkeypatch.setattr(one_method, "fit", no_fit)
    assert run(out, methods=["mfac"], seeds="0") == 0  # those of before are found as ever


def test_other_weights_are_other_results(out):
    path = next(out.glob("*_seed1.npz"))
    with counted() as names:
        assert run(out, "--checkpoint", str(path), methods=["magnitude"], seeds="0,1") == 0
    assert names == ["magnitude"]  # these weights were those of seed 1


def test_options_reach_the_pruning(trained, monkeypatch, capsys):
    calls, prune_one_shot = [], flj.prune_one_shot
    monkeypatch.setattr(
        flj, "prune_one_shot", lambda *a, **k: calls.append(k) or prune_one_shot(*a, **k)
    )
    # halves are pruned in a stage each, or most of the time would be theirs
    monkeypatch.setattr("fishleg_jax.pruning.trust.Stages", functools.partial(flj.Stages, 1))
    options = "--stages 2 --schedule linear --first-order --costs flops --trust --sparsity 0.5"
    more = "--scale 0.5 --scope layer --labels sampled --damping 0.1"
    arguments = [*options.split(), *more.split()]
    assert run(trained, *arguments, methods=["magnitude", "diagonal"], seeds="0") == 0
    magnitude, diagonal = rows_of(trained)
    assert magnitude["settings"]["stages"] == 1 and "agreement" not in magnitude
    expected = {"stages": 2, "schedule": "linear", "first_order": True, "costs": "flops"}
    expected |= {"scope": "layer", "scale": 0.5, "labels": "sampled", "damping_given": 0.1}
    assert expected.items() <= diagonal["settings"].items()
    assert 0 < diagonal["agreement"] <= 1 and diagonal["inflation"] > 0
    assert diagonal["fit_seconds"] > 0 and diagonal["prune_seconds"] > 0
    given = [call for call in calls if "stages" in call and call["stages"].number == 2]
    assert len(given) == 1 and given[0]["compensation"].first_order
    assert given[0]["scope"] == "layer"
    # a bias adds, a kernel adds too
    assert jax.tree.leaves(given[0]["prunable"].costs) == [1.0, 2.0] * 3
    assert "agreement of halves" in capsys.readouterr().out


def test_the_group_update_in_stages_of_fresh_images(trained, monkeypatch):
    calls, prune_one_shot = [], flj.prune_one_shot
    monkeypatch.setattr(
        flj, "prune_one_shot", lambda *a, **k: calls.append((a, k)) or prune_one_shot(*a, **k)
    )
    options = "--compensation group --stages 3 --fresh --held-out 40"
    more = "--solve-damping 0.01 --iterations 4 --sparsity 0.5"
    arguments = [*options.split(), *more.split()]
    assert run(trained, *arguments, methods=["magnitude", "diagonal"], seeds="0") == 0
    assert run(trained, *arguments, methods=["magnitude", "diagonal"], seeds="0") == 0
    magnitude, diagonal = rows_of(trained)  # the second run had nothing to do
    assert magnitude["settings"]["compensation"] == "none"
    expected = {"compensation": "group", "fresh": True, "held_out": 40, "solve_damping": 0.01}
    assert expected.items() <= diagonal["settings"].items()
    assert diagonal["curvature_examples"] == 3 * 60  # 65 are no multiple of 30 gradients
    staged = (call for call in calls if "stages" in call[1])
    (args, given) = next(call for call in staged if call[1]["stages"].number == 3)
    images = [np.asarray(b[0]).reshape(len(b[0]), -1) for b in [*args[3], *given["held_out"]]]
    assert given["stages"].batches_per_stage * 3 == len(args[3])
    assert sum(map(len, images)) == 3 * 60 + 40
    assert len(np.unique(np.concatenate(images), axis=0)) == 3 * 60 + 40  # none is seen twice


def test_training_on_holds_the_masks_and_resumes(out, monkeypatch, capsys):
    trained, train = [], training.train
    monkeypatch.setattr(
        training, "train", lambda *a, **k: trained.append((k, train(*a, **k))) or trained[-1][1]
    )
    before, arguments = rows_of(out), ["--finetune", "2", "--finetune-rate", "1e-2"]
    assert run(out, *arguments, methods=["magnitude"], seeds="0") == 0
    rows = rows_of(out)
    assert rows[: len(before)] == before
    new, plain = rows[len(before) :], [r for r in before if r["method"] == "magnitude"][:2]
    for row, old, (given, (params, _)) in zip(new, plain, trained, strict=True):
        assert row.keys() - old.keys() == {
            "finetuned_accuracy",
            "finetuned_loss",
            "finetune_seconds",
        }
        assert row["accuracy"] == old["accuracy"]  # that of one shot, as before
        assert row["finetuned_accuracy"] > row["accuracy"]
        assert row["settings"] == old["settings"] | {"finetune": 2, "finetune_rate": 0.01}
        assert flj.sparsity(params) == row["sparsity"]
        assert given["start"][1] == {}
        jax.tree.map(lambda p, m: np.testing.assert_array_equal(p[~m], 0), params, given["masks"])
    assert "fine-tuned, %" in capsys.readouterr().out

    monkeypatch.setattr(one_method, "fit", no_fit)
    assert run(out, *arguments, methods=["magnitude"], seeds="0") == 0
    assert "fine-tuned, %" in capsys.readouterr().out
    assert run(out) == 0  # what was there without it is found
    assert "fine-tuned" not in capsys.readouterr().out
    assert rows_of(out) == rows


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--finetune-rate", "0.1"], "--finetune-rate is that of --finetune EPOCHS"),
        (["--finetune", "0"], "'0' is not a whole number of at least 1"),
        (["--iterations", "3"], "--iterations is for --compensation group"),
        (["--target", "size:3"], "'size:3' is not one of weights, bytes, flops, loss, accuracy"),
        (["--target", "weights:0.5"], "'weights:0.5' is no whole number of weights"),
        (["--target", "weights:12.7"], "'weights:12.7' is no whole number of weights"),
        (
            ["--target", "weights:2", "--scope", "layer"],
            "each of 3 leaves keeps at least one weight",
        ),
        (["--target", "bytes:1"], "--target bytes:1: the target in bytes must be at least 4"),
        (["--target", "loss:0.1", "--sparsity", "0.5"], "--target is instead of --sparsity"),
        (["--first-order", "--selection", "qubo"], "--selection qubo has no gradient, swaps has"),
        (["--first-order", "--method", "magnitude"], "--method magnitude takes no gradient"),
        (["--target", "loss:0.1", "--trust"], "--target goes with neither --path nor --trust"),
        (["--fisher", "estimate"], "is for --compensation group and --method mfac"),
        (["--compensation", "group", "--scale", "0.5"], "--scale is for --compensation indep"),
        (["--held-out", "1290"], "and the training data has 1297"),
        (["--fresh"], "--fresh is for several --stages"),
        (["--path", "--sparsity", "0.5,0.9"], "--path needs a stage for each of 2 sparsities"),
        (["--recalibrate", "--stages", "2"], "--recalibrate is for several --stages of a model"),
        (["--held-out", "9", "--compensation", "none"], "--held-out checks an update"),
        (["--method", "magic"], "'magic' is not one of magnitude, diagonal"),
        (["--damping", "0"], "'0' is not a positive number"),
        (["--damping", "magnitude=1"], "'magnitude' is not one of diagonal"),
        (["--damping", "mfac=1,mfac=2"], "mfac is given twice"),
        (["--block-size", "all"], "'all' is not a whole number of at least 1, leaf or none"),
        (["--gradients", "66"], "--gradients 66: there are only 65 images"),
        (["--scale", "1.1"], "'1.1' is not a number in [0, 1]"),
        (["--scale", "1", "--compensation", "none"], "--compensation none makes none"),
        (["--trust", "--gradients", "1"], "there is only one"),
        (["--stages", "0"], "'0' is not a whole number of at least 1"),
        (["--schedule", "cubic"], "invalid choice: 'cubic'"),
        (["--examples", "1298"], "--examples 1298: digits has 1297"),
        (["--remat", "x"], "--remat: 'x' is not a whole number of at least 1"),
        (["--examples-per-chunk", "0"], "'0' is not a whole number of at least 1"),
    ],
)
def test_bad_arguments_get_one_line_and_nothing_is_written(refuses, arguments, message):
    refuses(compare.main, [*NETWORK, *arguments, "--out", "out"], message)


def test_what_does_not_fit_into_memory_is_refused_at_once(refuses, monkeypatch):
    monkeypatch.setattr("fishleg_jax.inverse._memory.available", lambda: 1_000_000)
    arguments = [*NETWORK, "--method", "woodfisher", "--out", "out"]
    refuses(compare.main, arguments, "error: woodfisher: gradients=30 for 17,226 weights")


@pytest.mark.parametrize("text", ["[{", "{}", "[1]", '[{"method": "mfac"}]'])
def test_results_that_are_none_are_left_alone(refuses, text, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(text)
    refuses(compare.main, [*NETWORK, "--out", str(tmp_path)], str(path))


def test_one_path_passes_through_all_sparsities(trained, capsys):
    options = ["--path", "--stages", "4", "--compensation", "group", "--iterations", "3"]
    assert run(trained, *options, methods=["diagonal"], seeds="0") == 0
    low, high = rows_of(trained)
    assert (low["sparsity_target"], high["sparsity_target"]) == (0.5, 0.9)
    assert [low["sparsity"], high["sparsity"]] == pytest.approx([0.5, 0.9], abs=1e-4)
    told = [stage["sparsity"] for stage in high["stages"]]
    assert (low["images_seen"], high["images_seen"]) == (60, 60)  # all stages saw the same ones
    assert len(told) == 4 and 0.5 in told and told[-1] == 0.9
    assert low["stages"] == high["stages"][: len(low["stages"])]  # one pruning goes on
    assert low["seconds"] < high["seconds"] and low["loss"] < high["loss"]
    assert run(trained, *options, methods=["diagonal"], seeds="0") == 0
    assert "2 of 2 sparsities are in" in capsys.readouterr().out


@pytest.mark.parametrize("stages", [2, 3, 5, 16])
def test_stages_on_a_path(stages):
    path = one_method.through([0.5, 0.9], stages)
    assert len(path) == stages and path == sorted(path) and 0.5 in path and path[-1] == 0.9
    steps = np.diff(np.log1p(-np.asarray([0.0, *path])))
    assert steps.min() / steps.max() < 4  # log density falls about evenly: 0.69 and 1.61 nats


def test_targets_other_than_a_sparsity(trained, capsys):
    options = ["--target", "weights:3000,loss:0.2,accuracy:2,flops:9000", "--held-out", "200"]
    assert run(trained, *options, methods=["diagonal"], seeds="0") == 0
    rows = {row["sparsity_target"]: row for row in rows_of(trained)}
    assert rows["weights:3000"]["sparsity"] == pytest.approx(1 - 3000 / WEIGHTS)
    # every weight of a dense layer makes two operations
    assert rows["flops:9000"]["sparsity"] == pytest.approx(1 - 4500 / WEIGHTS)
    for name in ("loss:0.2", "accuracy:2"):
        assert 0 < rows[name]["sparsity"] < 0.99
    printed = capsys.readouterr().out
    assert "sparsity, %" in printed and "accuracy:2" in printed
    assert run(trained, *options, methods=["diagonal"], seeds="0") == 0
    assert len(rows_of(trained)) == 4


@pytest.mark.parametrize("selection", ["swaps", "annealing"])
def test_a_selection_betters_the_masks(out, selection):
    before = rows_of(out)
    options = ["--selection", selection, "--border", "16", "--sparsity", "0.9"]
    assert run(out, *options, methods=["mfac", "magnitude"], seeds="0") == 0
    (bettered,) = rows_of(out)[len(before) :]  # magnitude has no selection: it was there already
    assert (bettered["settings"]["selection"], bettered["settings"]["border"]) == (selection, 16)
    wanted = {"method": "mfac", "seed": 0, "sparsity_target": 0.9}
    (plain,) = (row for row in before if wanted.items() <= row.items())
    assert "selection" not in plain["settings"]
    assert bettered["sparsity"] == plain["sparsity"]
    assert bettered["loss"] != plain["loss"]


@pytest.mark.parametrize("path", [[], ["--path"]])
def test_a_pruning_that_stops_on_the_way_is_no_result(out, monkeypatch, capsys, path):
    """A stage that goes wrong beyond 85 % costs the sparsity beyond, and says so."""
    advance = goal.advance

    def breaking(plan, fitted, sparsity):
        if sparsity > 0.85:
            raise FloatingPointError("the compensated weights have NaN")
        return advance(plan, fitted, sparsity)

    monkeypatch.setattr(goal, "advance", breaking)
    assert run(out, "--stages", "2", *path, methods=["diagonal"], seeds="0") == 1
    captured = capsys.readouterr()
    assert "diagonal: 90 %: stage 2 of 2 failed: the compensated weights have NaN" in captured.err
    assert "diagonal" in captured.out
    own = [r["sparsity_target"] for r in rows_of(out) if r["method"] == "diagonal"]
    assert own == [0.5]
