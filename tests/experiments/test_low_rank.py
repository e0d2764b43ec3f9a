"""Decompositions beside each other: budgets, training on, results that are kept."""

import json

import jax
import jax.numpy as jnp
import numpy as np

import fishleg_jax as flj
from experiments.low_rank import __main__ as low_rank
from experiments.low_rank.decomposing import factored
from experiments.models import networks
from experiments.models.specs import MODELS
from tests.experiments.small import small_spec


def test_two_methods_at_equal_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(MODELS, "mlp", MODELS["mlp"]._replace(epochs=1))
    arguments = ["--networks", "mlp", "--methods", "fisher_global,plain_equal", "--seeds", "0"]
    arguments += ["--shares", "0.2", "--examples", "128", "--out", str(tmp_path)]
    assert low_rank.main(arguments) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    kernels = 64 * 128 + 128 * 64 + 64 * 10
    for row in rows:
        before, after = row["weights"]
        assert after - (before - kernels) <= 0.2 * kernels
        assert row["trained_loss"] < row["loss"]
    assert (tmp_path / "low_rank.png").stat().st_size > 1000
    assert "20 %: accuracy, %" in capsys.readouterr().out
    monkeypatch.setattr(low_rank, "decomposed", None)
    assert low_rank.main(arguments) == 0
    assert json.loads((tmp_path / "results.json").read_text()) == rows


def test_forms_of_convolutions_beside_each_other(tmp_path, capsys):
    """Every form has a row; networks without convolutions have equal ones."""
    arguments = ["--networks", "mlp", "--methods", "plain_global", "--shares", "0.2"]
    arguments += ["--convolutions", "spatial,tucker2", "--epochs", "0", "--out", str(tmp_path)]
    assert low_rank.main(arguments) == 0
    printed = capsys.readouterr().out
    one, other = json.loads((tmp_path / "results.json").read_text())
    assert one["settings"]["convolutions"] == "spatial"
    assert other["settings"]["convolutions"] == "tucker2"
    assert one["ranks"] == other["ranks"]
    assert "plain SVD, one threshold, spatial" in printed
    assert "plain SVD, one threshold, tucker2" in printed


def test_batch_norm_is_trained_with_factors():
    """The training loss of factors of full rank is that of the network, and so are statistics."""
    spec = small_spec(networks.Block(4, 2), (6, 6, 2))
    images = jax.random.normal(jax.random.key(0), (4, 6, 6, 2))
    variables = spec.module.init(jax.random.key(1), images, True)
    params, constants = variables["params"], variables["batch_stats"]
    model = flj.Model(
        lambda p, x, c: spec.module.apply({"params": p, "batch_stats": c}, x, False).mean((1, 2)),
        flj.likelihoods.categorical(),
    )
    batch = images, jnp.arange(4), constants
    small = flj.low_rank.decompose(model, params, [batch], ranks={"": 99}, metric="identity")
    network = factored(spec, small, params)
    apply = lambda own, p: own.module.apply(
        {"params": p, "batch_stats": constants}, images, train=True, mutable=["batch_stats"]
    )
    for one, other in zip(
        jax.tree.leaves(apply(network, small.params)),
        jax.tree.leaves(apply(spec, params)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_refusals(refuses, tmp_path):
    out = ["--out", str(tmp_path / "new")]
    refuses(low_rank.main, [*out, "--shares", "0"], "a share of the weights must be above 0")
    refuses(low_rank.main, [*out, "--methods", "cp"], "'cp' is not one of fisher_global")
