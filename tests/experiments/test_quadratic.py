"""Quadratic models against dense algebra, the limit of large damping, and the command."""

import json
from argparse import Namespace

import jax
import numpy as np
import pytest

import fishleg_jax as flj
from experiments.estimates import methods
from experiments.models.specs import MODELS
from experiments.quadratic import __main__ as quadratic
from experiments.quadratic import damping
from experiments.quadratic import pruning as quadratic_case
from experiments.quadratic.forms import exact_form, gradient_slopes, quadratic_form
from experiments.running import results
from tests import dense

MODEL = dense.categorical_mlp()
SIZES = (5, 8, 3)
EXAMPLES = 80


@pytest.fixture(scope="module")
def case():
    """A tiny network in the place of a model of `MODELS`, so that everything compiles quickly."""
    keys = jax.random.split(jax.random.key(1), 2)
    params = dense.mlp_params(keys[0], SIZES)
    inputs, targets = dense.classification_batch(keys[1], EXAMPLES, SIZES[0], SIZES[-1])
    train = np.asarray(inputs), np.asarray(targets)
    args = Namespace(sparsity=0.5, scope="global", compensation="independent", seed=0)
    spec = MODELS["mlp"]._replace(model=MODEL, batch=30)
    curvature, calibration = quadratic_case.divide(train, 60, 0)
    trained = results.Dense(params, {}, 0.0, 0.0)
    return quadratic_case.Case(
        args, spec, trained, curvature, calibration, train, methods.share(60, 30)
    )


def test_images_are_in_one_part_only(case):
    seen = [set(map(bytes, images)) for images, _ in (case.curvature, case.calibration)]
    assert list(map(len, seen)) == [60, 20] and not seen[0] & seen[1]


@pytest.mark.parametrize("method", ["magnitude", "diagonal", "fishleg_start"])
def test_a_form_by_conjugate_gradients_is_that_of_the_dense_inverse(case, method):
    estimate = quadratic_case.fitted(method, case)
    delta = dense.random_like(jax.random.key(3), case.dense.params)
    form = quadratic_form(method, estimate.estimator, estimate.state, delta, None)
    inverse = dense.inverse_matrix(estimate.estimator, estimate.state, delta)
    gamma = getattr(estimate.state, "damping", 0.0)
    matrix = np.linalg.inv(inverse.astype(np.float64)) - gamma * np.eye(len(inverse))
    assert form.residual < 1e-5
    flat = dense.ravel(delta)
    np.testing.assert_allclose(form.value, flat @ matrix @ flat, rtol=1e-4)


def test_forms_of_gradients_are_those_of_the_dense_fisher(case):
    params = case.dense.params
    delta = dense.random_like(jax.random.key(3), params)
    flat = dense.ravel(delta)
    for method in ("woodfisher", "mfac"):
        estimate = quadratic_case.fitted(method, case)
        slopes = gradient_slopes(MODEL, params, estimate.batches, delta, case.part.each)
        form = quadratic_form(method, estimate.estimator, estimate.state, delta, slopes)
        rows = np.concatenate([dense.gradients(MODEL, params, b) for b in estimate.batches])
        np.testing.assert_allclose(slopes.mean(), rows.mean(axis=0) @ flat, rtol=1e-3, atol=1e-6)
        rows = rows.reshape(case.part.gradients, case.part.each, -1).mean(axis=1)
        assert form.residual == 0
        np.testing.assert_allclose(form.value, flat @ dense.gram(rows) @ flat, rtol=1e-4)
    # batches of one size, so that the mean over them is that over the examples
    exact = np.mean([dense.exact_fisher(MODEL, params, b) for b in estimate.batches], axis=0)
    np.testing.assert_allclose(
        exact_form(MODEL, params, estimate.batches, delta), flat @ exact @ flat, rtol=1e-4
    )


def test_the_form_of_kfac_is_that_of_its_factors(case):
    params, (inputs, targets) = case.dense.params, case.curvature
    delta = dense.random_like(jax.random.key(3), params)
    estimator = flj.inverse.kfac(MODEL, labels="empirical")
    state = flj.fit(estimator, params, [(inputs, targets)], key=jax.random.key(0))
    rows = flj.per_example_gradients(MODEL, params, (inputs, targets))
    expected = 0.0
    for layer, kernels in ((name, rows[name]["kernel"]) for name in rows):
        m, x = np.asarray(kernels, np.float64), np.asarray(delta[layer]["kernel"])
        a, b = np.einsum("nij,nkj->ik", m, m), np.einsum("nij,nik->jk", m, m)
        expected += np.sum(x * (a @ x @ b)) / np.trace(a) / len(m)
        squares = np.mean(np.asarray(rows[layer]["bias"]) ** 2, axis=0)
        expected += np.sum(squares * np.asarray(delta[layer]["bias"]) ** 2)
    form = quadratic_form("kfac", estimator, state, delta, None)
    np.testing.assert_allclose(form.value, expected, rtol=1e-4)


@pytest.mark.parametrize(
    "method",
    [
        "diagonal",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("kfac", "woodfisher", "mfac", "fishleg_start")
        ),
    ],
)
def test_magnitude_is_the_limit_of_large_damping(case, method):
    expected = quadratic_case.prune(case, quadratic_case.fitted("magnitude", case))
    estimate = quadratic_case.fitted(method, case)
    limit = damping.at_damping(method, case, estimate, 1e9)
    assert float(limit.state.damping) == pytest.approx(1e9)
    result = quadratic_case.prune(case, limit)
    jax.tree.map(np.testing.assert_array_equal, result.masks, expected.masks)
    jax.tree.map(
        lambda new, old: np.testing.assert_allclose(new, old, atol=1e-3),
        result.params,
        expected.params,
    )


@pytest.mark.slow
def test_a_square_root_is_fitted_anew_for_another_damping(case):
    case = case._replace(part=methods.share(60, 60))
    case = case._replace(dense=case.dense._replace(params=dense.mlp_params(jax.random.key(2))))
    inputs = case.curvature[0][:, :3]
    case = case._replace(curvature=(inputs, case.curvature[1]))
    first = quadratic_case.fitted("woodfisher", case)
    assert all(isinstance(block, jax.Array) for block in first.state.blocks.values())
    changed = damping.at_damping("woodfisher", case, first, 0.5)
    fresh = quadratic_case.fitted("mfac", case, 0.5)
    found, wanted = (
        dense.inverse_matrix(fit.estimator, fit.state, case.dense.params)
        for fit in (changed, fresh)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_small_run_writes_its_results(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = "--model mlp --epochs 1 --method magnitude,mfac --examples 60 --sparsity 0.5"
    assert quadratic.main([*arguments.split(), "--dampings", "1e-3,1e9", "--out", str(out)]) == 0
    names = {"quadratic.json", "quadratic.png", "damping.json", "damping.png", "mlp_seed0.npz"}
    assert {path.name for path in out.iterdir()} == names
    magnitude, mfac = json.loads((out / "quadratic.json").read_text())
    assert (magnitude["method"], mfac["method"]) == ("magnitude", "mfac")
    assert magnitude["damping"] is None and mfac["damping"] == pytest.approx(1e-5)
    for row in (magnitude, mfac):
        assert row["t"] == pytest.approx(np.linspace(0, 1, 11))
        assert row["measured"][0] == row["predicted"][0] == row["predicted_exact"][0] == 0
        assert row["predicted"][-1] == pytest.approx(row["slope"] + row["form"] / 2)
        assert row["ratio"] == pytest.approx(row["predicted"][-1] / row["measured"][-1])
        assert row["curvature_examples"] == 60 and row["calibration_examples"] == 1000
    swept = json.loads((out / "damping.json").read_text())
    assert [(row["method"], row["damping"]) for row in swept] == [
        ("magnitude", None),
        ("mfac", 1e-3),
        ("mfac", 1e9),
    ]
    assert swept[0]["accuracy"] == pytest.approx(swept[2]["accuracy"], abs=0.5)
    printed = capsys.readouterr()
    assert "ratio" in printed.out and "1e+09" in printed.out and printed.err == ""


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sparsity", "0.5,0.9"], "'0.5,0.9' is not a sparsity in [0, 1)"),
        (["--dampings", "1e-3,0"], "'0' is not a positive number"),
        (["--dampings", "inf"], "'inf' is not a positive number"),
        (["--method", "mfac,magic"], "'magic' is not one of magnitude"),
        (["--examples", "1297"], "--examples 1297: digits has 1297 images to train on, and some"),
        (["--examples", "1298"], "--examples 1298: digits has 1297"),
        (["--seed", "0,1"], "'0,1' is not a whole number"),
        (["--data-dir", "nowhere"], "--data-dir is for mnist and cifar10"),
    ],
)
def test_bad_arguments_get_one_line_and_nothing_is_written(refuses, arguments, message):
    refuses(quadratic.main, [*arguments, "--out", "out"], message)
