"""Gradual pruning, small: what is written, what a second run does not do again, what is refused."""

import contextlib
import io
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fishleg_jax as flj
from experiments import killing
from experiments.gradual import __main__ as gradual
from experiments.gradual import loop as gradual_run
from experiments.gradual import plans as gradual_plan
from experiments.models import checkpoints, training
from experiments.models.specs import MODELS

NETWORK = ["--model", "mlp", "--steps", "100", "--mask-every", "10", "--seed", "0"]
WEIGHTS = 64 * 128 + 128 * 64 + 64 * 10


def run(out, *arguments, method="magnitude,diagonal"):
    return gradual.main(
        [*NETWORK, "--method", method, "--sparsity", "0.7", "--out", str(out), *arguments]
    )


def rows_of(out):
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """The folder of a run, and what it printed."""
    out, told = tmp_path_factory.mktemp("gradual") / "out", io.StringIO()
    with contextlib.redirect_stdout(told):
        assert run(out) == 0
    return out, told.getvalue()


@pytest.fixture(scope="module")
def finished(printed):
    """The folder of a run."""
    return printed[0]


@pytest.fixture
def out(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "out")


def test_results_have_all_fields(finished):
    rows = {row["method"]: row for row in rows_of(finished)}
    assert list(rows) == ["dense", "magnitude", "diagonal"]
    for method, row in rows.items():
        pruned = 0 if method == "dense" else math.floor(0.7 * WEIGHTS)
        assert row["sparsity"] == pytest.approx(pruned / WEIGHTS, abs=1e-9)
        assert row["accuracy"] > 60 and row["seconds"] > 0  # chance is 10
        assert row["peak_memory_bytes"] is None or row["peak_memory_bytes"] >= 0
        assert row["settings"]["steps"] == 100 and row["model"] == "mlp"
        if method != "dense":
            assert row["dense_accuracy"] == rows["dense"]["accuracy"]
            assert row["start_accuracy"] < 40  # random weights
            assert row["violations"] == row["failures"] == 0
    assert rows["diagonal"]["settings"]["renew"] == 1
    assert rows["diagonal"]["settings"]["saliency"] == "auto"
    assert rows["magnitude"]["settings"]["saliency"] == "magnitude"
    taken = {method: row["predicted_memory_bytes"] for method, row in rows.items()}
    assert taken["dense"] > 3 * 4 * WEIGHTS  # with the moments of Adam
    assert taken["magnitude"] > taken["dense"] + WEIGHTS  # the masks
    assert taken["diagonal"] > taken["magnitude"] + 4 * WEIGHTS
    for name in ("accuracy_vs_sparsity.png", "training.png"):
        assert (finished / name).stat().st_size > 1000


def test_memory_is_told_before_a_run_and_after_it(printed):
    lines = [line for line in printed[1].splitlines() if line.startswith("diagonal to 70 %, seed")]
    [row] = [row for row in rows_of(printed[0]) if row["method"] == "diagonal"]
    predicted = f"{row['predicted_memory_bytes'] / 1e6:.0f} MB"
    assert lines[0] == f"diagonal to 70 %, seed 0: a run is predicted to take {predicted}"
    assert lines[1].startswith(
        f"diagonal to 70 %, seed 0: memory of the run, predicted {predicted}, measured "
    )


def test_what_is_kept_of_a_run_is_what_was_measured(finished):
    spec = MODELS["mlp"]
    for row in rows_of(finished)[1:]:
        folder = (finished / row["metrics"]).parent
        params, constants = checkpoints.load(folder / "weights.npz", spec)
        test = gradual.datasets.digits().test
        found = training.evaluate(spec.model, params, test, constants)
        assert found == pytest.approx((row["accuracy"], row["loss"]))
        masks = flj.load_masks(folder / "masks.npz", params)
        jax.tree.map(lambda x, m: np.testing.assert_array_equal(x[~m], 0), params, masks)
        lines = [json.loads(line) for line in (finished / row["metrics"]).read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(10, 101, 10))
        sparsities = [line["sparsity"] for line in lines]
        assert sparsities == sorted(sparsities) and sparsities[-1] == pytest.approx(0.7, abs=1e-4)
        assert not (folder / "checkpoints").exists()


def test_what_is_there_is_not_computed_again(out, monkeypatch, capsys):
    before = (out / "results.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(gradual, "run", lambda *a, **k: pytest.fail("a run, of what was there"))
        assert run(out) == 0
    assert (out / "results.json").read_bytes() == before
    printed = capsys.readouterr().out
    assert "seed 0, diagonal to 70 %: in" in printed and "test accuracy, %" in printed


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(finished, tmp_path, monkeypatch):
    batch_at = gradual_run.batch_at

    def stopped(name, train, *, seed, step, batch):
        if step == 43:  # while weights are pruned
            raise KeyboardInterrupt
        return batch_at(name, train, seed=seed, step=step, batch=batch)

    options = ["--dense", "start"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gradual_run, "batch_at", stopped)
        run(tmp_path, *options, "--checkpoint-every", "1e-9", method="diagonal")
    [folder] = (tmp_path / "runs").iterdir()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["42", "43"]
    assert run(tmp_path, *options, method="diagonal") == 0
    whole = {n: x for n, x in killing.finished(finished).items() if n.startswith(folder.name)}
    assert killing.identical(killing.finished(tmp_path), whole)
    lines = [
        path / folder.name / "metrics.jsonl" for path in (tmp_path / "runs", finished / "runs")
    ]
    assert lines[0].read_bytes() == lines[1].read_bytes()


@pytest.mark.slow
def test_less_memory_is_another_setting_and_the_same_weights(finished, tmp_path):
    options = ["--dense", "start", "--remat", "2", "--examples-per-chunk", "24"]
    assert run(tmp_path, *options, method="diagonal") == 0
    [row] = rows_of(tmp_path)
    [plain] = [row for row in rows_of(finished) if row["method"] == "diagonal"]
    bounds = {"remat": 2, "examples_per_chunk": 24}
    assert row["settings"]["estimate"] == plain["settings"]["estimate"] | bounds
    found, expected = (
        checkpoints.load((out / r["metrics"]).parent / "weights.npz", MODELS["mlp"])[0]
        for out, r in ((tmp_path, row), (finished, plain))
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), found, expected)
    assert row["metrics"] != plain["metrics"]  # nor would it go on from the other's checkpoints


def test_held_out_training_examples_are_no_test_images(tmp_path):
    assert run(tmp_path, "--validate", "200", method="magnitude") == 0
    args = gradual._parser().parse_args([*NETWORK, "--validate", "200"])
    whole = gradual.datasets.digits()
    split = gradual._split(args, whole)
    for part, cut in ((split.train, slice(-200)), (split.test, slice(-200, None))):
        for x, y in zip(part, whole.train, strict=True):
            np.testing.assert_array_equal(x, y[cut])
    [row] = [row for row in rows_of(tmp_path) if row["method"] == "magnitude"]
    [folder] = (tmp_path / "runs").glob("mlp_magnitude*")
    params, _ = checkpoints.load(folder / "weights.npz", MODELS["mlp"])
    found = training.evaluate(MODELS["mlp"].model, params, split.test, {})
    assert found[0] == pytest.approx(row["accuracy"])


def counting(ready):
    """An estimate that knows nothing but how many batches it saw."""
    return flj.InverseFisher(
        init=lambda params: jnp.zeros((), jnp.int32),
        update=lambda state, params, batch, key, mask=None: state + 1,
        multiply=lambda state, tangent, mask=None: tangent,
        diagonal=lambda state, params, mask=None: jax.tree.map(jnp.ones_like, params),
        ready=lambda state: state >= ready,
    )


@pytest.mark.parametrize("method, ready", [("fishleg", gradual_plan.START), ("diagonal", 1)])
def test_the_host_assimilates_when_the_library_would(method, ready):
    argv = ["--model", "mlp", "--steps", "600", "--mask-every", "20", "--aux-every", "6"]
    args = gradual._parser().parse_args(argv)
    plan = gradual_plan.make_plan(MODELS["mlp"], args, method, 0.7)
    assert plan.begin == 60 and plan.end == 420
    schedule = flj.schedules.cubic(plan.sparsity, begin=plan.begin, end=plan.end)
    tx = flj.gradual_prune(counting(ready), schedule, aux_every=6, mask_every=20, renew=plan.renew)
    params, batch = jnp.arange(1.0, 101).reshape(10, 10), (jnp.ones((1, 10)), None)

    def step(carry, _):
        params, state = carry
        updates, new = tx.update(jnp.zeros_like(params), state, params, batch=batch)
        return (optax.apply_updates(params, updates), new), new.estimate

    _, seen = jax.lax.scan(step, (params, tx.init(params)), None, length=600)
    seen = np.asarray(seen)
    changed = np.diff(seen, prepend=0) != 0
    wanted = np.array([gradual_plan.assimilates(plan, n) for n in range(1, 601)])
    # what is seen before the first weight goes would be forgotten by those that are made anew
    first = 0 if plan.renew is None else 60
    # the library may be done a few steps before the end, where a schedule in millionths is flat
    np.testing.assert_array_equal(changed[first:400], wanted[first:400])
    assert not changed[420:].any() and not wanted[420:].any()


@pytest.mark.parametrize("saliency", gradual_plan.SALIENCIES)
def test_the_scores_are_those_that_the_command_names(saliency):
    spec, argv = MODELS["mlp"], ["--model", "mlp", "--saliency", saliency]
    plan = gradual_plan.make_plan(spec, gradual._parser().parse_args(argv), "diagonal", 0.7)
    tx = gradual_plan.make_pruning(spec, plan, seed=0)
    params = jax.eval_shape(spec.init, jax.random.key(0))[0]
    chosen = jax.eval_shape(tx.init, params).chosen  # of candidates, where the loss decides
    assert plan.settings["saliency"] == saliency and (chosen is not None) == (saliency == "auto")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--steps", "20", "--mask-every", "20"], "--steps 20 is too few for --mask-every 20"),
        (["--validate", "1290"], "--validate 1290 leaves 7 examples to train on"),
        (["--damping", "magnitude=1"], "'magnitude' is not one of fishleg"),
        (["--dataset", "faces", "--model", "cnn"], "--model cnn is for digits, --dataset is faces"),
        (["--remat", "-1"], "--remat: '-1' is not a whole number of at least 1"),
        (["--examples-per-chunk", "0"], "'0' is not a whole number of at least 1"),
        (["--steps", "9"], "'9' is not a whole number of at least 10"),
    ],
)
def test_bad_arguments_get_one_line_and_nothing_is_written(refuses, arguments, message):
    refuses(gradual.main, arguments, message)
