"""Factorised networks: the function at full rank, budgets, training, files, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj
from fishleg_jax.low_rank.running import factors_of
from tests.low_rank.networks import BATCH, IMAGES, KERNELS, MODEL, PARAMS, predict

decompose = flj.low_rank.decompose
FORMS = ("channel", "spatial", "tucker2")
FULL = dict.fromkeys(KERNELS, 1000)


def weights_of(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def assert_close(small, atol=1e-5):
    found = jax.jit(small.model.predict)(small.params, IMAGES)
    np.testing.assert_allclose(found, predict(PARAMS, IMAGES), atol=atol)


@pytest.fixture(scope="module")
def fisher():
    """One decomposition in the metric of the Fisher."""
    return decompose(MODEL, PARAMS, [BATCH], 0.5)


@pytest.mark.parametrize("form", FORMS)
def test_full_rank_is_the_same_network(form):
    """Strides, paddings, dilations, layouts, a compiled function inside, and vmap."""
    small = decompose(MODEL, PARAMS, [BATCH], ranks=FULL, metric="identity", convolutions=form)
    rows = {row.name: row for row in small.report.rows}
    assert {name for name in rows if rows[name].form} == set(KERNELS)
    assert rows["grouped"].reason == "an operand of conv_general_dilated"
    assert rows["bias"].reason == "bias"
    assert_close(small)
    # weights and operations are those that the library counts
    costs = flj.weight_costs(small.model, small.params, BATCH)
    spent = jax.tree.map(lambda cost, x: cost * x.size, costs, small.params)
    for name in KERNELS:
        assert rows[name].weights[1] == weights_of(small.params[name])
        assert rows[name].flops[1] == pytest.approx(sum(jax.tree.leaves(spent[name])))


def test_full_rank_in_the_metric_of_the_fisher():
    assert_close(decompose(MODEL, PARAMS, [BATCH], ranks=FULL), 2e-5)


@pytest.mark.parametrize("rule", ["global", "equal", "energy", "search"])
def test_budgets_hold(rule):
    total = sum(PARAMS[name].size for name in KERNELS)
    small = decompose(MODEL, PARAMS, [BATCH], 0.5, ranks=rule, metric="identity")
    kept = sum(weights_of(small.params[name]) for name in KERNELS)
    assert 0.3 * total < kept <= 0.5 * total
    left_out = weights_of(PARAMS) - total
    assert small.report.weights == (total + left_out, kept + left_out)


def test_budgets_of_other_units(fisher):
    flops = fisher.report.flops[0]
    small = decompose(MODEL, PARAMS, [BATCH], flj.targets.flops(flops / 2), metric="identity")
    assert small.report.flops[1] <= flops / 2
    half = 4 * sum(PARAMS[name].size for name in KERNELS) // 2
    small = decompose(MODEL, PARAMS, [BATCH], flj.targets.bytes(half), metric="identity")
    assert 4 * sum(weights_of(small.params[name]) for name in KERNELS) <= half
    limit = flj.targets.loss_increase(fisher.report.loss, measured=False)
    least = decompose(MODEL, PARAMS, [BATCH], limit)
    assert 0 < least.report.loss <= fisher.report.loss
    assert least.report.weights[1] <= fisher.report.weights[0]


def test_moments_serve_again(fisher):
    again = decompose(MODEL, PARAMS, [BATCH], 0.5, moments=fisher.moments)
    for x, y in zip(*map(jax.tree.leaves, (again.params, fisher.params)), strict=True):
        np.testing.assert_array_equal(x, y)
    with pytest.raises(ValueError, match="moments: 'stem' with the form 'tucker2' needs shapes"):
        decompose(MODEL, PARAMS, [BATCH], 0.5, moments=fisher.moments, convolutions="tucker2")
    with pytest.raises(ValueError, match="moments must be the field of an earlier result, got"):
        decompose(MODEL, PARAMS, [BATCH], 0.5, moments=[1])


def test_the_fisher_decides_what_is_kept(fisher):
    """Its own prediction is lower than that of a plain decomposition, and so is the loss's rise."""
    plain = decompose(MODEL, PARAMS, [BATCH], 0.5, metric="identity")
    dense = predict(PARAMS, IMAGES)

    def divergence(small):
        p, q = (jax.nn.log_softmax(x) for x in (dense, small.model.predict(small.params, IMAGES)))
        return float((jnp.exp(p) * (p - q)).sum(1).mean())

    assert divergence(fisher) < divergence(plain)


def test_moments_are_those_of_the_gradients():
    """Signs of empirical gradients do not matter to their second moments."""
    small = decompose(MODEL, PARAMS, [BATCH], 0.5, fisher="empirical", examples_per_chunk=4)
    gradients = flj.per_example_gradients(MODEL, PARAMS, BATCH)
    folded = np.asarray(gradients["hidden"], float)
    trace = (folded**2).sum() / len(folded)
    left, right = (
        np.einsum(how, folded, folded) / len(folded) / trace**0.5
        for how in ("smn,skn->mk", "smn,smk->nk")
    )
    np.testing.assert_allclose(small.moments["hidden"][0], left, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(small.moments["hidden"][1], right, rtol=1e-4, atol=1e-7)
    # of (out, in) the transpose, and of convolutions with everything but the outputs in front
    assert [len(x) for x in small.moments["out"]] == [10, 4]
    assert [len(x) for x in small.moments["torch"]] == [3 * 3 * 8, 8]


def test_gradients_are_those_of_the_product(fisher):
    """By the chain rule through one kernel, with all others as they are."""
    small = decompose(MODEL, PARAMS, [BATCH], ranks={"hidden": 2}, metric="identity")
    assert factors_of(small.params["stem"]) is None

    def multiplied(factors):
        return {**PARAMS, "hidden": factors["left"] @ factors["right"]}

    own = small.params["hidden"]
    found = jax.grad(lambda p: flj.loss(small.model, p, BATCH))(small.params)["hidden"]
    wanted = jax.grad(lambda p: flj.loss(MODEL, multiplied(p), BATCH))(own)
    for key in ("left", "right"):
        np.testing.assert_allclose(found[key], wanted[key], atol=1e-6)


def test_the_kernels_are_not_multiplied_out():
    small = decompose(MODEL, PARAMS, [BATCH], ranks={"stem|hidden": 1}, metric="identity")
    text = str(jax.make_jaxpr(small.model.predict)(small.params, IMAGES))
    assert "f32[3,3,3,1]" in text and "f32[8,1]" in text
    assert "f32[3,3,3,6]" not in text and "f32[8,10]" not in text


def test_factorised_networks_are_pruned_saved_and_exported(fisher, tmp_path):
    result = flj.prune_one_shot(
        fisher.model,
        fisher.params,
        flj.inverse.diagonal(fisher.model, labels="empirical"),
        [BATCH],
        sparsity=0.5,
        stages=1,
        held_out=None,
        compensation=flj.compensation.none(),
    )
    assert flj.sparsity(result.params) == pytest.approx(0.5, abs=0.01)
    flj.export.save_params(tmp_path / "small", fisher.params)
    loaded = flj.export.load_params(tmp_path / "small").params
    run = flj.low_rank.apply(predict, PARAMS)
    np.testing.assert_array_equal(run(loaded, IMAGES), fisher.model.predict(fisher.params, IMAGES))
    np.testing.assert_array_equal(run(PARAMS, IMAGES), predict(PARAMS, IMAGES))


def test_repr_and_report(fisher):
    assert repr(fisher).startswith("Decomposition(weights 1,184 to ")
    text = str(fisher.report)
    assert "grouped: an operand of conv_general_dilated" in text and "total" in text


def scanned(params, x):
    return jax.lax.scan(lambda c, _: (jnp.tanh(c @ params["w"]), None), x, None, length=2)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": None}, r"budget must be a share in \(0, 1\], .* got None"),
        ({"budget": 1.5}, r"budget must be a share in \(0, 1\], .* got 1.5"),
        ({"budget": flj.targets.weights(3)}, "budget must be at least .* rank 1 in every kernel"),
        ({"ranks": "best"}, "ranks must be one of global, equal, energy, search or a mapping"),
        ({"ranks": {"hidden": 2}}, "budget must be None if ranks are given by name"),
        ({"budget": None, "ranks": {"hidden": 0}}, "'hidden' needs 1 whole number"),
        ({"budget": None, "ranks": {"conv9": 2}}, "'conv9' matches no leaf"),
        ({"metric": "l2"}, "metric must be one of fisher, identity, got 'l2'"),
        ({"convolutions": "cp"}, "convolutions must be one of channel, spatial, tucker2"),
        ({"decomposable": "grouped"}, "'grouped' is not a kernel with factors"),
        ({"damping": 0.0}, "damping must be a positive finite number"),
    ],
)
def test_refusals(change, message):
    arguments = {"budget": 0.5, "metric": "identity", **change}
    budget = arguments.pop("budget")
    with pytest.raises(ValueError, match=message):
        decompose(MODEL, PARAMS, [BATCH], budget, **arguments)


def test_kernels_that_are_no_kernels():
    params = {"w": jnp.eye(3)}
    model = flj.Model(scanned, flj.likelihoods.gaussian())
    with pytest.raises(ValueError, match=r"got none: w \(an operand of scan\)"):
        decompose(model, params, [(jnp.ones((2, 3)), None)], 0.5)
    factors = {"w": {"left": jnp.ones((3, 1)), "right": jnp.ones((1, 3))}}
    with pytest.raises(ValueError, match="does not multiply its inputs with it"):
        flj.low_rank.apply(scanned, params)(factors, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="params must have the structure of the parameters"):
        flj.low_rank.apply(scanned, params)([], jnp.ones((2, 3)))
