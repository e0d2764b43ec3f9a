"""Likelihoods against their definitions: sums over targets, quadrature, scipy."""

import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import fishleg_jax as flj
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


def predict(params, x):
    return x @ params


def squares(outputs, targets):
    return ((outputs - targets) ** 2).sum(axis=1)


BATCH = jnp.ones((4, 2)), jnp.ones((4, 3))
WEIGHTS = jnp.ones((2, 3))


def test_equal_arguments_make_one_likelihood():
    make = likelihoods.categorical
    assert make(-100).ignore == -100 and make().ignore is None
    assert make() == make(None) == make(ignore=None) != make(ignore=-100)
    assert make(-100) == make(ignore=np.int64(-100)) != make(-1)
    assert likelihoods.bernoulli() == likelihoods.bernoulli() != make()
    make = likelihoods.gaussian
    assert make() == make(1) == make(scale=np.float64(1.0)) != make(0.5) != make(None) == make(None)
    assert flj.Model(predict, make(0.5)) == flj.Model(predict, make(0.5))


def test_a_model_is_a_named_tuple_of_its_two_functions():
    model = flj.Model(predict, likelihoods.Likelihood(squares))
    again = pickle.loads(pickle.dumps(model))
    assert isinstance(again, flj.Model) and isinstance(again.likelihood, likelihoods.Likelihood)
    assert again == model and hash(again) == hash(model)
    other = model._replace(likelihood=likelihoods.gaussian())
    assert isinstance(other, flj.Model) and other.predict is predict and other != model
    taken, likelihood = model
    assert (taken, likelihood) == (predict, model.likelihood)
    assert flj.Model(likelihood=likelihood, predict=predict) == model
    assert isinstance(likelihood._replace(fisher=predict), likelihoods.Likelihood)


@pytest.mark.parametrize(
    "given, message",
    [
        (likelihoods.categorical, r"got the function categorical; call it: .*categorical\(\)"),
        (likelihoods.Likelihood, "got the class Likelihood"),
        ("categorical", "got 'categorical'$"),
        (None, "got None$"),
        (squares, "got the function squares; a negative log-likelihood goes into"),
        (tuple(likelihoods.gaussian()), "got "),
    ],
)
def test_what_is_no_likelihood_is_refused_by_the_model(given, message):
    expected = f"likelihood must be a fishleg_jax.likelihoods.Likelihood, .*{message}"
    with pytest.raises(ValueError, match=expected):
        flj.Model(predict, given)
    with pytest.raises(ValueError, match=expected):
        flj.Model(predict, likelihoods.gaussian())._replace(likelihood=given)


@pytest.mark.parametrize("given", [None, "mlp", lambda params: params, jnp.ones(3)])
def test_what_can_not_predict_is_refused_by_the_model(given):
    expected = r"predict must be a function \(params, inputs\) or \(params, inputs, constants\)"
    with pytest.raises(ValueError, match=expected):
        flj.Model(given, likelihoods.gaussian())


@pytest.mark.parametrize(
    "fields, message",
    [
        ((None,), "negative_log_likelihood must be a function, got None"),
        (("mse",), "negative_log_likelihood must be a function, got 'mse'"),
        ((squares, 3), "sample must be a function or None, got 3"),
        ((squares, None, "exact"), "fisher must be a function or None, got 'exact'"),
        ((squares, None, None, 1), "check_targets must be a function or None, got 1"),
        ((squares, None, None, None, -100), "takes_targets must be True or False, got -100"),
        ((squares, None, None, None, True, None, 0.5), "ignore must be a whole number"),
    ],
)
def test_what_is_no_function_is_refused_by_the_likelihood(fields, message):
    with pytest.raises(ValueError, match=message):
        likelihoods.Likelihood(*fields)


USES = {
    "losses": lambda model: flj.losses(model, WEIGHTS, BATCH),
    "product": lambda m: flj.fisher_vector_product(m, WEIGHTS, BATCH, WEIGHTS, kind="empirical"),
    "gradients": lambda model: flj.per_example_gradients(model, WEIGHTS, BATCH),
    "curvature": lambda model: flj.curvature(model, [BATCH]).gradient(WEIGHTS),
    "fit": lambda model: flj.fit(
        flj.inverse.diagonal(model, labels="empirical"), WEIGHTS, [BATCH], key=jax.random.key(0)
    ),
    "one shot": lambda model: flj.prune_one_shot(
        model, WEIGHTS, flj.inverse.diagonal(model, labels="empirical"), [BATCH], sparsity=0.5
    ),
}


@pytest.mark.parametrize("use", USES)
def test_one_mean_for_all_examples_is_refused(use):
    mean = likelihoods.Likelihood(lambda outputs, targets: squares(outputs, targets).mean())
    with pytest.raises(ValueError, match=r"one number for each of the 4 examples.*got shape \(\)"):
        USES[use](flj.Model(predict, mean))


@pytest.mark.parametrize("use", USES)
def test_constants_that_are_missing_are_refused(use):
    model = flj.Model(lambda params, x, constants: x @ params, likelihoods.gaussian())
    message = r"batch has no constants, but the model's predict takes \(params, inputs, constants\)"
    with pytest.raises(ValueError, match=message):
        USES[use](model)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, "remat"])
def test_constants_that_are_missing_are_refused_of_what_is_wrapped(wrap):
    plain = lambda params, x, constants: x @ params
    if wrap == "remat":
        model = flj.remat(flj.Model(plain, likelihoods.gaussian()))
    else:
        model = flj.Model(wrap(plain), likelihoods.gaussian())
    with pytest.raises(ValueError, match="batch has no constants, but the model's predict takes"):
        flj.losses(model, WEIGHTS, BATCH)


def test_errors_inside_of_a_model_are_left_as_they_are():
    model = flj.Model(lambda params, x: x @ params + None, likelihoods.gaussian())
    with pytest.raises(TypeError):
        flj.losses(model, WEIGHTS, BATCH)


def test_constants_that_are_too_many_are_refused():
    with pytest.raises(ValueError, match="batch has constants, but the model's predict takes"):
        flj.losses(flj.Model(predict, likelihoods.gaussian()), WEIGHTS, (*BATCH, jnp.ones(1)))


@pytest.mark.parametrize("use", USES)
def test_a_negative_log_likelihood_alone_does_where_nothing_else_is_needed(use):
    USES[use](flj.Model(predict, likelihoods.Likelihood(squares, None, None)))


BARE = flj.Model(predict, likelihoods.Likelihood(squares))
NO_FISHER = flj.Model(predict, likelihoods.gaussian()._replace(fisher=None))


def grouped(model):
    estimator = flj.inverse.diagonal(model, labels="empirical")
    return flj.prune_one_shot(
        model, WEIGHTS, estimator, [BATCH], sparsity=0.5, compensation=flj.compensation.group()
    )


@pytest.mark.parametrize(
    "need, missing",
    [
        (lambda: flj.inverse.kfac(BARE), "sample"),
        (lambda: flj.inverse.mfac(BARE, labels="sampled"), "sample"),
        (lambda: flj.inverse.fishleg(BARE, kind="sampled"), "sample"),
        (lambda: flj.inverse.fishleg(NO_FISHER), "fisher"),
        (lambda: flj.fisher_vector_product(BARE, WEIGHTS, BATCH, WEIGHTS), "fisher"),
        (lambda: flj.curvature(NO_FISHER, [BATCH]).product(WEIGHTS, WEIGHTS), "fisher"),
        (
            lambda: flj.per_example_gradients(
                BARE, WEIGHTS, BATCH, labels="sampled", key=jax.random.key(0)
            ),
            "sample",
        ),
        (lambda: grouped(NO_FISHER), "fisher"),
        (
            lambda: flj.trust(BARE, WEIGHTS, flj.inverse.identity(), [BATCH, BATCH], sparsity=0.5),
            "fisher",
        ),
    ],
)
def test_what_needs_more_of_a_likelihood_says_so(need, missing):
    with pytest.raises(ValueError, match=f"likelihood has {missing}=None"):
        need()


@pytest.mark.parametrize(
    "likelihood, message",
    [
        (likelihoods.categorical(), r"one array of shape \(examples, ..., classes\) for categ"),
        (likelihoods.bernoulli(), r"one array of shape \(examples, ...\) for bernoulli"),
        (likelihoods.gaussian(), r"one array of shape \(examples, ...\) for gaussian"),
    ],
)
def test_outputs_of_another_make_are_refused(likelihood, message):
    model = flj.Model(lambda params, x: (x @ params, x), likelihood)
    with pytest.raises(ValueError, match=f"outputs of the model must be {message}"):
        flj.losses(model, WEIGHTS, BATCH)
    with pytest.raises(ValueError, match=r"must be a pair \(mean, log_scale\)"):
        flj.losses(flj.Model(predict, likelihoods.gaussian(None)), WEIGHTS, BATCH)


@pytest.mark.parametrize(
    "likelihood, outputs, targets",
    [
        (likelihoods.categorical(), LOGITS, None),
        (likelihoods.categorical(ignore=-1), LOGITS, np.array([[2, -1]])),
        (likelihoods.bernoulli(), MEANS, None),
        (likelihoods.gaussian(0.5), MEANS, None),
    ],
)
def test_the_root_squared_is_the_fisher(x64, likelihood, outputs, targets):
    outputs = jnp.asarray(outputs, jnp.float64)
    given = () if targets is None else (jnp.asarray(targets),)
    basis = jnp.eye(outputs.size).reshape(-1, *outputs.shape)

    def matrix(function):  # columns
        return np.stack([function(outputs, e, *given).reshape(-1) for e in basis], axis=1)

    root = matrix(likelihood.root)
    np.testing.assert_allclose(root @ root.T, matrix(likelihood.fisher), atol=1e-12)
