"""Likelihoods against their definitions: sums over targets, quadrature, scipy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from fishleg_jax import likelihoods
from tests import dense

LOGITS = np.array([[[0.3, -1.0, 2.0], [0.0, 0.5, -0.5]]])  # one example of two outputs
MEANS = np.array([[0.3, -1.0]])


def joint(values, weights):
    """All combinations of the values of independent targets, with their probabilities."""
    choices = [list(zip(v, w, strict=True)) for v, w in zip(values, weights, strict=True)]
    for combination in itertools.product(*choices):
        yield np.array([v for v, _ in combination]), np.prod([w for _, w in combination])


def class_targets():
    return [(t[None], p) for t, p in joint([range(3)] * 2, dense.softmax(LOGITS)[0])]


def binary_targets():
    p = 1 / (1 + np.exp(-LOGITS.reshape(-1)))
    return [(t.reshape(LOGITS.shape), w) for t, w in joint([(0.0, 1.0)] * 6, np.c_[1 - p, p])]


def normal_targets(scales):
    """Gauss-Hermite nodes, exact here: products of two scores are of degree four."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(6)
    values = MEANS[0][:, None] + np.broadcast_to(scales, 2)[:, None] * nodes
    return [(t[None], w) for t, w in joint(values, [weights / weights.sum()] * 2)]


SCALED = np.array([[0.2, -0.4]])
CASES = {
    "categorical": (likelihoods.categorical(), LOGITS, class_targets()),
    "bernoulli": (likelihoods.bernoulli(), LOGITS, binary_targets()),
    "known": (likelihoods.gaussian(0.7), MEANS, normal_targets(0.7)),
    "learned": (likelihoods.gaussian(None), (MEANS, SCALED), normal_targets(np.exp(SCALED[0]))),
    "shared": (
        likelihoods.gaussian(None),
        (MEANS, SCALED[:, :1]),
        normal_targets(np.exp(SCALED[0, 0])),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_fisher_is_the_expected_outer_product_of_scores(x64, case):
    likelihood, outputs, targets = CASES[case]
    outputs = jax.tree.map(jnp.asarray, outputs)
    score = jax.jit(jax.grad(lambda o, t: likelihood.negative_log_likelihood(o, t).sum()))
    expected = 0
    for target, probability in targets:
        s = dense.ravel(score(outputs, target))
        expected += probability * np.outer(s, s)
    product = dense.matrix_of(lambda v: likelihood.fisher(outputs, v), outputs)
    np.testing.assert_allclose(product, expected, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_probabilities_of_all_targets_add_up(x64, case):
    """`exp(−nll)` sums, or integrates, to one; against the weights of the enumeration."""
    likelihood, outputs, targets = CASES[case]
    outputs = jax.tree.map(jnp.asarray, outputs)
    if case in ("categorical", "bernoulli"):
        nll = [likelihood.negative_log_likelihood(outputs, t)[0] for t, _ in targets]
        np.testing.assert_allclose(np.exp(-np.array(nll)), [p for _, p in targets], atol=1e-14)
    else:
        grid = np.linspace(-12, 12, 241)
        pairs = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
        outputs = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(pairs), x.shape[1])), outputs)
        density = np.exp(-likelihood.negative_log_likelihood(outputs, jnp.asarray(pairs)))
        assert density.sum() * (grid[1] - grid[0]) ** 2 == pytest.approx(1, abs=1e-9)


def test_negative_log_likelihood_sums_over_outputs_not_examples(x64):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(4, 5, 3)), rng.integers(0, 3, (4, 5))
    expected = -np.log(np.take_along_axis(dense.softmax(logits), labels[..., None], -1)).sum((1, 2))
    found = likelihoods.categorical().negative_log_likelihood(jnp.asarray(logits), labels)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_gaussian_against_scipy(x64):
    rng = np.random.default_rng(0)
    mean, log_scale, target = rng.normal(size=(3, 4, 2, 3))
    expected = -scipy.stats.norm.logpdf(target, mean, np.exp(log_scale)).sum((1, 2))
    outputs = jnp.asarray(mean), jnp.asarray(log_scale)
    found = likelihoods.gaussian(None).negative_log_likelihood(outputs, target)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    expected = -scipy.stats.norm.logpdf(target, mean, 0.3).sum((1, 2))
    found = likelihoods.gaussian(0.3).negative_log_likelihood(jnp.asarray(mean), target)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_bernoulli_reads_grey_values_as_probabilities(x64):
    rng = np.random.default_rng(0)
    logits, grey = rng.normal(size=(4, 3)), rng.uniform(size=(4, 3))
    p = 1 / (1 + np.exp(-logits))
    expected = -(grey * np.log(p) + (1 - grey) * np.log(1 - p)).sum(1)
    found = likelihoods.bernoulli().negative_log_likelihood(jnp.asarray(logits), grey)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("make, target", [("categorical", [1]), ("bernoulli", [[1.0, 0.0, 1.0]])])
def test_extreme_logits_stay_finite(make, target):
    likelihood, logits = getattr(likelihoods, make)(), jnp.array([[1e4, -1e4, 0.0]])
    assert jnp.isfinite(likelihood.negative_log_likelihood(logits, jnp.array(target))).all()
    assert jnp.isfinite(likelihood.fisher(logits, jnp.ones_like(logits))).all()


@pytest.mark.parametrize("case", CASES)
def test_samples_have_the_right_frequencies(key, case):
    """Means over 4000 keys, within five standard deviations of that mean."""
    likelihood, outputs, targets = CASES[case]
    outputs = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), outputs)
    keys = jax.random.split(key, 4000)
    samples = np.asarray(jax.vmap(lambda k: likelihood.sample(k, outputs))(keys), float)
    assert samples.shape[1:] == targets[0][0].shape
    for power in (1, 2):
        moment = sum(p * t**power for t, p in targets)
        spread = np.sqrt(sum(p * t ** (2 * power) for t, p in targets) - moment**2)
        error = np.abs((samples**power).mean(0) - moment)
        np.testing.assert_array_less(error, 5 * spread / np.sqrt(len(samples)) + 1e-6)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_scales_are_refused(scale):
    with pytest.raises(ValueError, match="scale must be a positive finite number"):
        likelihoods.gaussian(scale)
