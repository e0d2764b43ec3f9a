"""The learned inverse against the exact one, and the guard against all that goes wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fishleg_jax as flj
from fishleg_jax._random import signs
from fishleg_jax.inverse import factors
from fishleg_jax.inverse._fishleg import progress
from fishleg_jax.inverse._fishleg.start import RELATIVE_DAMPING
from fishleg_jax.pruning.one_shot.fit import LOOK
from tests import dense
from tests.dense import inverse_matrix as matrix
from tests.marks import some_slow

DAMPING = 0.05
LOGISTIC = flj.Model(lambda w, x: x @ w, flj.likelihoods.categorical())
fishleg = functools.cache(
    functools.partial(flj.inverse.fishleg, learn=True)
)  # equal calls give one estimator, compiled once
ADAM = optax.adam(1e-2)


@functools.cache
def decaying_adam(updates, rate=1e-2):
    return optax.adam(optax.cosine_decay_schedule(rate, updates))


def logistic(key, dtype=None, examples=30):
    """Softmax regression on correlated inputs: one leaf of (4, 3) and its Fisher."""
    keys = jax.random.split(key, 3)
    mixing = jax.random.normal(keys[0], (4, 4), dtype)
    inputs = jax.random.normal(keys[1], (examples, 4), dtype) @ mixing
    return LOGISTIC, 0.3 * jax.random.normal(keys[2], (4, 3), dtype), (inputs, None)


def fisher_matrices(model, params, batch, damping=DAMPING):
    """The damped Fisher and its inverse."""
    fisher = dense.exact_fisher(model, params, batch)
    fisher = fisher + damping * np.eye(len(fisher))
    return fisher, np.linalg.inv(fisher)


def auxiliary_loss(q, fisher):
    """A(λ) in exact expectation over u ~ N(0, I)."""
    return 0.5 * np.trace(q @ fisher @ q) - np.trace(q)


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_full_factor_finds_the_exact_inverse(x64, key):
    """Within one per cent, from a start that is much further away; and its loss is the least."""
    model, params, batch = logistic(key, jnp.float64)
    estimator = fishleg(
        model, DAMPING, factors=factors.full, optimizer=decaying_adam(2000), start=16, window=100
    )
    fisher, inverse = fisher_matrices(model, params, batch)
    state = dense.run(estimator, params, batch, 16, key)
    assert relative_error(matrix(estimator, state, params), inverse) > 0.05
    state = dense.run(estimator, params, batch, 2000, key, state=state)
    found = matrix(estimator, state, params)
    assert relative_error(found, inverse) < 0.01
    least = -0.5 * np.trace(inverse)
    assert auxiliary_loss(found, fisher) == pytest.approx(least, rel=1e-3)
    assert state.relative_residual < 0.02
    # smoothed over about 39 samples of −½ uᵀF⁻¹u, each of variance ½ tr F⁻²
    spread = np.sqrt(0.5 * np.trace(inverse @ inverse) * 0.05 / 1.95)
    assert abs(state.auxiliary_loss - least) < 5 * spread


def test_every_leaf_gets_the_inverse_of_its_own_block(x64, key):
    """Q is block-diagonal over leaves, and so is what minimises the auxiliary loss."""
    model, params = dense.categorical_mlp(), dense.mlp_params(key, (3, 3), jnp.float64)
    batch = dense.classification_batch(key, 30, dtype=jnp.float64)
    estimator = fishleg(
        model,
        DAMPING,
        factors=factors.full,
        optimizer=decaying_adam(3500),
        start=32,
        window=1000,
    )
    state = dense.run(estimator, params, batch, 3532, key)
    found = matrix(estimator, state, params)
    fisher, _ = fisher_matrices(model, params, batch)
    bias, kernel = slice(0, 3), slice(3, 12)  # in the tree's order
    for block in (bias, kernel):
        assert relative_error(found[block, block], np.linalg.inv(fisher[block, block])) < 0.01
    assert np.abs(found[bias, kernel]).max() == 0


KINDS = {
    "diagonal": factors.diagonal,
    "kronecker": factors.kronecker,
    "convolution": lambda shape, cap: factors.convolution((2, 2, *shape[1:]), cap),
    "spectral": factors.spectral,
    "spectral3": lambda shape, cap: factors.spectral((2, 2, *shape[1:]), cap, axes=3),
    "block_diagonal": lambda shape, cap: factors.block_diagonal(shape, 6),
}


@pytest.mark.parametrize(
    "kind", some_slow(KINDS, lambda kind: kind not in ("kronecker", "convolution"))
)
def test_stationary_points(x64, key, kind):
    """E[uᵀz] = E[zᵀF_γz] once converged, so that A = −½ tr Q; and learning has lowered A."""
    model, params, batch = logistic(key, jnp.float64)
    estimator = fishleg(
        model, DAMPING, factors=KINDS[kind], optimizer=decaying_adam(2000), start=32, window=300
    )
    fisher, inverse = fisher_matrices(model, params, batch)
    start = dense.run(estimator, params, batch, 32, key)
    state = dense.run(estimator, params, batch, 2000, key, state=start)
    q = matrix(estimator, state, params)
    assert np.trace(q @ fisher @ q) == pytest.approx(np.trace(q), rel=0.03)
    before = auxiliary_loss(matrix(estimator, start, params), fisher)
    after = auxiliary_loss(q, fisher)
    assert -0.5 * np.trace(inverse) <= after < before


@pytest.mark.parametrize(
    "arguments",
    [{}, pytest.param({"cap": 2}, marks=pytest.mark.slow)],
    ids=["defaults", "small blocks"],
)
def test_learning_does_not_lose_to_its_start(key, arguments):
    """With all defaults, and where blocks cut every axis so that little is left to gain."""
    model, params = dense.categorical_mlp(), dense.mlp_params(key, (4, 6, 3))
    batch = dense.classification_batch(key, 60, inputs=4)
    fisher, _ = fisher_matrices(model, params, batch)
    estimator = fishleg(model, DAMPING, **arguments)
    start = dense.run(estimator, params, batch, 64, key)
    state = dense.run(estimator, params, batch, 136, key, state=start)
    losses = [auxiliary_loss(matrix(estimator, s, params), fisher) for s in (start, state)]
    assert losses[1] < losses[0]
    assert state.guard.back_offs == 0 and state.guard.skipped == 0


def test_infinite_damping_prunes_by_magnitude(key):
    model, params = dense.categorical_mlp(), dense.mlp_params(key, (4, 6, 3))
    batches = [dense.classification_batch(key, 20, inputs=4)]

    def masks(estimator, sparsity, state):
        result = flj.prune_one_shot(
            *(model, params, estimator, batches),
            sparsity=sparsity,
            compensation=flj.compensation.none(),
            stages=flj.Stages(state=state),
        )
        return dense.ravel(result.masks)

    estimator = fishleg(model, 1e9, start=8, updates=20)
    state = flj.fit(estimator, params, batches, key=key)
    usual = state._replace(damping=state.damping * 1e-12)  # of the same frames
    differs = False
    for sparsity in (0.3, 0.8):
        by_magnitude = masks(flj.inverse.identity(), sparsity, ())
        np.testing.assert_array_equal(masks(estimator, sparsity, state), by_magnitude)
        differs |= (masks(estimator, sparsity, usual) != by_magnitude).any()
    assert differs


@pytest.mark.parametrize("kept", [4, 1], ids=["all weights", "survivors"])
def test_automatic_damping(key, kept):
    """From 4000 Fisher samples: the mean of the Fisher's diagonal over the weights that survive.

    Within five standard errors, as they are for normal samples: cov(a², b²) is 2 cov(a, b)².
    """
    model, params, batch = logistic(key)
    mask = jnp.arange(4)[:, None] < kept * jnp.ones((4, 3))
    fisher = dense.exact_fisher(model, params, batch)[: 3 * kept, : 3 * kept]
    mean = np.mean(np.diag(fisher))
    spread = np.sqrt(2 * np.mean(fisher**2) / 4000) / mean
    estimator = fishleg(model, learn=False, samples=1, window=4000)
    state = dense.run(estimator, params, batch, 4000, key, mask=mask)
    expected = RELATIVE_DAMPING * mean
    assert float(state.damping) == pytest.approx(float(expected), rel=5 * float(spread))


@pytest.mark.parametrize(
    "kind, optimizer",
    [
        ("kronecker", optax.sgd(1e3)),
        ("spectral", optax.adam(3.0)),
        ("full", optax.adam(3.0)),
    ],
    ids=["kronecker, sgd", "spectral, adam", "full, adam"],
)
def test_absurd_learning_rates_do_no_harm(x64, key, kind, optimizer):
    """What users see stays finite, positive definite, and not too large by a factor of two.

    The last is what a negative auxiliary loss says, here in exact expectation.
    """
    model, params, batch = logistic(key, jnp.float64)
    estimator = fishleg(
        model, DAMPING, factors=getattr(factors, kind), optimizer=optimizer, start=32
    )
    fisher, _ = fisher_matrices(model, params, batch)
    state = dense.run(estimator, params, batch, 32, key)
    for i in range(10):
        state = dense.run(estimator, params, batch, 20, jax.random.fold_in(key, i), state=state)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.average))
        q = matrix(estimator, state, params)
        assert np.linalg.eigvalsh(q).min() > 0
        assert auxiliary_loss(q, fisher) < 0
    assert state.guard.back_offs > 0
    assert 0 < state.guard.step_scale < 1


@pytest.mark.parametrize("factor", [1e6, 1e-6])
def test_recovers_from_a_changed_damping(x64, key, factor):
    """The damping is an array of the state; Q follows it, and goes on learning."""
    model, params, batch = logistic(key, jnp.float64)
    estimator = fishleg(model, DAMPING, factors=factors.full, start=32, window=100, optimizer=ADAM)
    state = dense.run(estimator, params, batch, 300, key)
    state = state._replace(damping=state.damping * factor)
    state = dense.run(estimator, params, batch, 600, key, state=state)
    q = matrix(estimator, state, params)
    fisher, inverse = fisher_matrices(model, params, batch, DAMPING * factor)
    assert np.isfinite(q).all()
    assert auxiliary_loss(q, fisher) < 0.5 * (-0.5 * np.trace(inverse))


@pytest.mark.parametrize("learn, when", [(True, 11), (True, 40), (False, 0), (False, 3)])
def test_a_batch_of_nan_is_skipped(key, learn, when):
    """In closed form and in learning; what users see does not move."""
    _, params, (inputs, _) = logistic(key)
    estimator = fishleg(LOGISTIC, start=16, learn=learn)
    state = dense.run(estimator, params, (inputs, None), when, key)
    broken = inputs.at[3, 1].set(jnp.nan), None
    after = dense.run(estimator, params, broken, 1, key, state=state)
    for part in ("damping", "moments", "frames", "average", "auxiliary_loss", "relative_residual"):
        old, new = getattr(state, part), getattr(after, part)
        jax.tree.map(np.testing.assert_array_equal, old, new)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.coordinates))
    assert after.guard.skipped == 1
    assert after.count == state.count
    final = dense.run(estimator, params, (inputs, None), 100, key, state=after)
    assert np.isfinite(matrix(estimator, final, params)).all()
    assert final.relative_residual < 1 or not learn


def test_masks_give_the_inverse_on_the_kept_weights(x64, key):
    """`(F_KK + γ)⁻¹`, which is not the kept block of the inverse of all."""
    model, params, batch = logistic(key, jnp.float64)
    mask = jax.random.bernoulli(jax.random.key(7), 0.6, (4, 3))
    kept = np.asarray(mask).reshape(-1)
    estimator = fishleg(
        model, DAMPING, factors=factors.full, optimizer=decaying_adam(2000), start=16, window=100
    )
    state = dense.run(estimator, params, batch, 2032, key, mask=mask)
    q = matrix(estimator, state, params, mask)
    fisher, inverse = fisher_matrices(model, params, batch)
    expected = np.linalg.inv(fisher[np.ix_(kept, kept)])
    assert relative_error(q[np.ix_(kept, kept)], expected) < 0.01
    assert relative_error(inverse[np.ix_(kept, kept)], expected) > 0.05
    assert (q[~kept] == 0).all() and (q[:, ~kept] == 0).all()
    diagonal = dense.inverse_diagonal(estimator, state, params, mask)
    np.testing.assert_allclose(diagonal, np.diag(q), rtol=1e-9)


@pytest.mark.parametrize(
    "arguments",
    [
        {"kind": "sampled", "examples_per_chunk": 7},
        {"kind": "empirical"},
        {"probe": "sign"},
        {"preconditioned": 50, "join_bias": True},
    ],
    ids=str,
)
def test_variants_learn(key, arguments):
    """Each has a finite, positive diagonal and a loss below that of Q = 0, which is zero."""
    model, params = dense.categorical_mlp(), dense.mlp_params(key, (3, 3))
    batch = dense.classification_batch(key, 30)
    estimator = fishleg(model, DAMPING, start=32, **arguments)
    state = dense.run(estimator, params, batch, 300, key)
    diagonal = dense.inverse_diagonal(estimator, state, params)
    assert np.isfinite(diagonal).all() and (diagonal > 0).all()
    assert state.auxiliary_loss < 0 and state.guard.skipped == 0
    fisher, inverse = fisher_matrices(model, params, batch)
    if arguments.get("kind") == "empirical":
        fisher = dense.gram(dense.gradients(model, params, batch)) + DAMPING * np.eye(12)
        inverse = np.linalg.inv(fisher)
    # at least six tenths of what an unrestricted Q could gain
    loss = auxiliary_loss(matrix(estimator, state, params), fisher)
    assert loss < 0.6 * (-0.5 * np.trace(inverse))


def test_the_sign_probe_has_the_covariance_of_the_normal_one(key):
    drawn = jax.vmap(lambda k: signs(k, (70,), jnp.float32))(jax.random.split(key, 4000))
    drawn = np.asarray(drawn)
    assert set(np.unique(drawn)) == {-1.0, 1.0}
    # each entry has a standard error of 1/√4000, and there are 70² of them
    assert np.abs(drawn.T @ drawn / 4000 - np.eye(70)).max() < 6 / np.sqrt(4000)


def test_the_gradient_probe_solves_for_the_gradient(x64, key):
    """Along the batch's gradient the residual vanishes, which one random direction would not."""
    model, params, (inputs, _) = logistic(key, jnp.float64)
    batch = inputs, jax.random.randint(key, (len(inputs),), 0, 3)
    estimator = fishleg(
        model, DAMPING, factors=factors.full, probe="gradient", start=32, window=100
    )
    state = dense.run(estimator, params, batch, 1000, key)
    fisher, _ = fisher_matrices(model, params, batch)
    gradient = dense.ravel(jax.grad(lambda p: flj.loss(model, p, batch))(params))
    q = matrix(estimator, state, params)
    assert np.linalg.norm(fisher @ q @ gradient - gradient) < 0.01 * np.linalg.norm(gradient)


def test_preconditioning_is_a_warm_up_of_so_many_steps(x64, key):
    """Only the steps that were asked for differ from those of the plain gradient."""
    model, params, batch = logistic(key, jnp.float64)
    make = functools.partial(
        flj.inverse.fishleg,
        model,
        DAMPING,
        factors=factors.full,
        learn=True,
        start=8,
        optimizer=optax.sgd(1e-3),
    )
    plain, warm = make(), make(preconditioned=2)
    start = dense.run(plain, params, batch, 9, key)  # one learning step of each is done

    def moved(state):
        after = [dense.run(e, params, batch, 1, key, state=state) for e in (plain, warm)]
        a, b = [s.coordinates[""].triangles[0] for s in after]
        return float(jnp.abs(a - b).max())

    assert moved(start) > 0
    assert moved(dense.run(plain, params, batch, 1, key, state=start)) < 1e-15


def test_learning_starts_from_the_closed_form(key):
    model, params, batch = logistic(key)
    parts = {"samples": 1, "examples_per_sample": 1}
    closed = fishleg(model, DAMPING, start=16, learn=False, **parts)
    assert closed.updates == 16
    state = dense.run(closed, params, batch, 16, key)
    assert not jax.tree.leaves(state.average)
    learner = fishleg(LOGISTIC, start=16, **parts)
    same = dense.run(learner, params, batch, 16, key)._replace(damping=state.damping)
    np.testing.assert_allclose(
        matrix(closed, state, params), matrix(learner, same, params), rtol=1e-4, atol=1e-5
    )


def test_a_state_says_when_it_has_converged(key):
    """NaN before there is something to say."""
    _, params, batch = logistic(key)
    estimator = fishleg(LOGISTIC, start=16)
    state = dense.run(estimator, params, batch, 16, key)
    assert jnp.isnan(state.auxiliary_loss) and jnp.isnan(state.relative_residual)
    state = dense.run(estimator, params, batch, 1, key, state=state)
    assert jnp.isfinite(state.auxiliary_loss) and jnp.isfinite(state.relative_residual)
    assert state.count == 17


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"damping": 0.0}, "damping must be a positive finite number or None, got 0.0"),
        ({"damping": -1.0}, "damping must be"),
        ({"damping": float("nan")}, "damping must be"),
        ({"damping": float("inf")}, "damping must be"),
        ({"kind": "true"}, "kind must be one of exact, sampled, empirical, got 'true'"),
        ({"probe": "uniform"}, "probe must be one of normal, sign, gradient, got 'uniform'"),
        ({"start": 0}, "start must be a whole number of at least 1, got 0"),
        ({"samples": 0}, "samples must be a whole number of at least 1, got 0"),
        (
            {"examples_per_sample": 0},
            "examples_per_sample must be a whole number of at least 1, got 0",
        ),
        ({"samples": 2.5}, "samples must be a whole number of at least 1, got 2.5"),
        ({"updates": 0}, "updates must be a whole number of at least 1, got 0"),
        ({"preconditioned": -1}, "preconditioned must be a whole number of at least 0, got -1"),
        ({"window": 0}, "window must be a whole number of at least 1, got 0"),
        ({"cap": 0}, "cap must be a whole number of at least 1 or None, got 0"),
        ({"examples_per_chunk": 0}, "examples_per_chunk must be a whole number of at least 1"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        flj.inverse.fishleg(dense.categorical_mlp(), **arguments)


@pytest.mark.parametrize("arguments", [{"kind": "empirical"}, {"probe": "gradient"}], ids=str)
def test_labels_that_are_needed_and_missing(key, arguments):
    model, params, batch = logistic(key)
    estimator = flj.inverse.fishleg(model, DAMPING, **arguments)
    with pytest.raises(ValueError, match="targets are None"):
        estimator.update(estimator.init(params), params, batch, key)


def test_learning_ends_once_the_auxiliary_loss_no_longer_falls(key):
    """At the latest after `updates`."""
    model, params = dense.categorical_mlp(), dense.mlp_params(key, (4, 6, 3))
    batch = dense.classification_batch(key, 60, inputs=4)
    done = []

    def fitted(estimator):
        settled = lambda i, total, state: done.append((i, bool(state.progress.settled)))  # noqa: E731
        return flj.fit(estimator, params, [batch], key=key, on_update=settled)

    estimator = fishleg(model, DAMPING, start=16, updates=400)
    state = fitted(estimator)
    updates, _ = done[-1]
    assert 16 + 2 * progress.WINDOW <= updates < 400 and bool(state.progress.settled)
    first = next(i for i, settled in done if settled)
    assert first <= updates < first + LOOK
    done.clear()
    fitted(estimator._replace(settled=None))
    assert done[-1][0] == 400


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.floats(0, 3))
def test_progress_compares_windows_by_their_standard_errors(seed, fall):
    rng = np.random.default_rng(seed)
    first, second = rng.normal(0, 1, (2, progress.WINDOW)) - np.array([[0], [fall]])
    record = progress.init(jnp.float32)
    note = jax.jit(progress.noted)
    for x in [*first, np.nan, *second]:  # a sample that does not count changes nothing
        assert not record.settled
        record = note(record, x, np.isfinite(x))
    error = np.sqrt((first.var(ddof=1) + second.var(ddof=1)) / progress.WINDOW)
    gain = first.mean() - second.mean()
    assume(abs(gain - error) > 1e-4)
    assert bool(record.settled) == (gain <= error)
