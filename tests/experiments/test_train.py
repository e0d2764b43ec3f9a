"""Training with several optimisers, small: equal terms, what is written, what goes on."""

import json
import math
import shutil

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.models import networks
from experiments.models.specs import MODELS, make_spec
from experiments.train import __main__ as train
from experiments.train import choice, contest, optimizers, options, pruning, steps

SMALL = make_spec(
    "small",
    networks.Mlp((8, 10)),
    "digits",
    (8, 8, 1),
    epochs=2,
    train_batch=100,
    examples=1000,
    batch=100,
)
OPTIONS = ["--rates", "1e-3,0.03", "--trial-steps", "6", "--epochs", "3"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The digits are trained with a network that compiles quickly."""
    monkeypatch.setitem(MODELS, "small", SMALL)
    monkeypatch.setitem(options.NETWORKS, "digits", ("small", 2, 1e-3))


def run(out, *arguments, optimizer="adam,sgd"):
    return train.main([*OPTIONS, "--optimizer", optimizer, "--out", str(out), *arguments])


def rows_of(out, kind="training"):
    rows = json.loads((out / "results.json").read_text())
    return [row for row in rows if row["kind"] == kind]


def losses_of(row):
    return [(one["step"], one["train_loss"], one["accuracy"]) for one in row["history"]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run."""
    out = tmp_path_factory.mktemp("train") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "small", SMALL)
        patch.setitem(options.NETWORKS, "digits", ("small", 2, 1e-3))
        assert run(out) == 0
    return out


def test_results_have_all_fields(finished):
    rows = {row["optimizer"]: row for row in rows_of(finished)}
    assert list(rows) == ["adam", "sgd"]
    for row in rows.values():
        assert row["steps"] == 3 * 12 and [one["epoch"] for one in row["history"]] == [1, 2, 3]
        assert row["train_loss"] == row["history"][-1]["train_loss"] and row["accuracy"] > 15
        for clock in ("seconds", "process_seconds"):
            assert row[clock] == pytest.approx(sum(one[clock] for one in row["history"]))
        assert not row["diverged"] and row["settings"]["weight_decay"] == 1e-3
        assert len({one["sitting"] for one in row["history"]}) == 1
    weights = 64 * 8 + 8 + 8 * 10 + 10
    assert rows["sgd"]["state_bytes"] == 4 * weights + 4  # momentum, and the schedule's count
    assert rows["adam"]["state_bytes"] == 2 * 4 * weights + 8
    assert (finished / "loss.png").stat().st_size > 1000
    assert not list(finished.rglob("checkpoints"))


def test_the_rate_is_the_best_one_on_held_out_training_examples(finished):
    trials, final = rows_of(finished, "trial"), rows_of(finished)
    assert len(trials) == 4 and {row["settings"]["held_out"] for row in trials} == {129}
    for row in final:
        own = {t["learning_rate"]: t["held_out_loss"] for t in trials if _same(t, row)}
        assert row["learning_rate"] == min(own, key=own.get)
        assert row["settings"]["trial_rates"] == [1e-3, 0.03]


def _same(one, other):
    return one["optimizer"] == other["optimizer"]


def test_trials_do_not_see_what_they_are_judged_by():
    train_set = contest.datasets.digits().train
    trials = choice.make_trials(train_set, 100, (0.1,), 6)
    program = steps.program(SMALL, "sgd", 0.0, 100)
    before = choice.try_rate(program, train_set, trials, 0.1)
    shuffled = train_set[1].copy()
    shuffled[-129:] = (shuffled[-129:] + 1) % 10
    after = choice.try_rate(program, (train_set[0], shuffled), trials, 0.1)
    assert after != before
    seen = (train_set[0][:-129], train_set[1][:-129])
    done = program.run(seen, program.start(0), range(1, 7), rate=0.1, length=6, seed=choice.SEED)
    held_out = (train_set[0][-129:], train_set[1][-129:])
    found = contest.training.evaluate(SMALL.model, done.carry.params, held_out, {})
    assert found[1] == pytest.approx(before)


def test_what_is_there_is_not_computed_again(finished, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(finished, tmp_path / "out")
    before = (out / "results.json").read_bytes()
    monkeypatch.setattr(steps.Program, "run", lambda *a, **k: pytest.fail("trained again"))
    assert run(out) == 0
    assert (out / "results.json").read_bytes() == before
    assert "adam's last loss at" in capsys.readouterr().out


def test_a_stopped_run_ends_like_one_that_was_not(finished, tmp_path, monkeypatch):
    out, advance, made = tmp_path / "out", contest.Training.advance, []

    def stop(self, sitting):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(self.program.name)
        advance(self, sitting)

    with monkeypatch.context() as patch:
        patch.setattr(contest.Training, "advance", stop)
        with pytest.raises(KeyboardInterrupt):
            run(out, "--checkpoint-every", "1e-9")
    assert made == ["adam", "sgd", "adam", "sgd"]  # in turn
    assert not rows_of(out) and len(list(out.rglob("checkpoints"))) == 2
    with monkeypatch.context() as patch:
        count = []
        patch.setattr(contest.Training, "advance", lambda *a: (count.append(1), advance(*a))[1])
        assert run(out, "--checkpoint-every", "1e-9") == 0
    assert len(count) == 2  # the third epoch of each
    for one, other in zip(rows_of(finished), rows_of(out), strict=True):
        assert losses_of(one) == losses_of(other)
        assert len({epoch["sitting"] for epoch in other["history"]}) == 2


def test_optimisers_start_alike_and_see_the_same_batches(tmp_path):
    rate = ["--rate", "0.01", "--weight-decay", "0"]
    assert run(tmp_path, *rate, optimizer="adam,adamw") == 0
    adam, adamw = rows_of(tmp_path)
    assert losses_of(adam) == losses_of(adamw) and not rows_of(tmp_path, "trial")


def test_a_training_that_diverges_is_reported(tmp_path, capsys):
    assert run(tmp_path, "--rate", "sgd=1e30,adam=0.01") == 0
    adam, sgd = sorted(rows_of(tmp_path), key=lambda row: row["optimizer"])
    assert sgd["diverged"] and len(sgd["history"]) == 1 and sgd["train_loss"] is None
    assert not adam["diverged"] and len(adam["history"]) == 3
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("sgd"))
    assert line.split()[2:5] == ["–"] * 3


def test_rates_that_diverge_are_not_chosen():
    assert choice.best({1.0: math.nan, 0.1: 2.0, 0.01: None, 0.001: 3.0}) == 0.1
    with pytest.raises(ValueError, match="diverged at all rates tried: 1.0, 0.1"):
        choice.best({1.0: math.nan, 0.1: None})


def test_the_schedule_is_half_a_cosine():
    wanted = optax.cosine_decay_schedule(0.3, 40)
    ours = steps.cosine(0.3, 40)
    for step in (0, 1, 20, 39, 40, 50):
        assert float(ours(step)) == pytest.approx(float(wanted(step)), abs=1e-7)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_every_optimiser_learns(name):
    data = contest.datasets.digits().train
    rate = {"kfac": 0.3, "sgd": 0.1, "muon": 0.03}.get(name, 0.01)
    program = steps.program(SMALL, name, 1e-3, 100)
    before = contest.training.evaluate(SMALL.model, program.start(0).params, data, {})
    done = program.run(data, program.start(0), range(1, 49), rate=rate, length=48, seed=0)
    after = contest.training.evaluate(SMALL.model, done.carry.params, data, {})
    assert after[1] < 0.9 * before[1] and after[0] > before[0] + 10
    assert not done.diverged and done.process_seconds > 0


def test_muon_takes_kernels_and_leaves_the_rest_to_adam():
    params = {
        "conv": {"kernel": jnp.ones((3, 3, 4, 5)), "bias": jnp.ones(5)},
        "embed": {"embedding": jnp.ones((7, 2))},
        "fc": {"kernel": jnp.ones((4, 5))},
    }
    found = optimizers._matrices(params)
    assert found["conv"]["kernel"] == ((0, 1, 2), 3) and found["fc"]["kernel"] == ((0,), 1)
    assert found["conv"]["bias"] is None and found["embed"]["embedding"] is None


@pytest.mark.slow
def test_pruning_reaches_its_sparsity(tmp_path):
    # pruned with the optimiser's estimate, and behind an optimiser that has none
    rate = ["--rate", "0.01", "--prune", "0.5", "--epochs", "6"]
    assert run(tmp_path, *rate, optimizer="fishleg,adam") == 0
    found = {row["optimizer"]: row["sparsity"] for row in rows_of(tmp_path)}
    assert found == {"fishleg": 0.5, "adam": 0.5}
    for row in rows_of(tmp_path):
        assert row["sparsity_target"] == 0.5 and row["history"][-1]["accuracy"] > 20
        assert row["settings"]["pruning"] == {"sparsity": 0.5, "begin": 7, "end": 50, "every": 1}
    assert (tmp_path / "loss_pruned.png").exists()


def test_a_pruning_takes_from_a_tenth_to_seven_tenths():
    assert pruning.make_goal(0.9, 1800) == (0.9, 180, 1260, 30)
    goal = pruning.make_goal(0.9, 60)
    assert goal == (0.9, 6, 42, 1) and goal.end > pruning.START
    assert [goal.due(step) for step in (5, 6, 42, 43)] == [False, True, True, False]


def test_work_of_a_pruning_is_chosen_on_the_host():
    goal = pruning.Goal(0.5, 200, 400, 20)
    found = [optimizers.work("adam", goal, step) for step in (1, 101, 132, 133, 140, 401)]
    sees, held = {"assimilate": True}, {"hold": True}
    assert found == [held, sees, sees, held, sees, held]
    found = [optimizers.work("fishleg", goal, step) for step in (1, 2, 5, 201, 500)]
    assert found == [sees, held, sees, held, sees]
    assert optimizers.work("adam", None, 7) == {}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--optimizer", "soap"], "'soap' is not one of fishleg, kfac, adam"),
        (["--epochs", "0"], "'0' is not a whole number of at least 1"),
        (["--batch-size", "1200"], "--batch-size 1200: 1168 training examples are left beside the"),
        (["--rate", "adam=-1"], "'-1' is not a positive number"),
        (["--weight-decay", "-1"], "'-1' is not a number of at least 0"),
        (["--prune", "0.5", "--epochs", "1", "--batch-size", "600"], "takes 60 steps or more"),
        (["--dataset", "mnist", "--data-dir", "nowhere"], "--data-dir nowhere has no mnist"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_done(refuses, arguments, message):
    refuses(train.main, arguments, message)


def test_the_networks_are_those_of_the_papers():
    found = {name: MODELS[model].data for name, (model, *_) in options.NETWORKS.items()}
    assert found == {name: name for name in options.NETWORKS}


def test_the_loss_is_measured_on_the_same_training_examples():
    train_set = (np.arange(20_000), np.arange(20_000))
    rows, _ = contest.subset(train_set)
    assert len(np.unique(rows)) == contest.SUBSET
    np.testing.assert_array_equal(rows, contest.subset(train_set)[0])
    assert len(contest.subset((np.arange(7), np.arange(7)))[0]) == 7
