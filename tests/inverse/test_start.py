"""The start in closed form: what it takes from which batches, and the damping that it measures."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj
from fishleg_jax.inverse import factors
from fishleg_jax.inverse._fishleg.start import RELATIVE_DAMPING
from fishleg_jax.inverse._kronecker import algebra, frames
from tests import dense


def predict(params, x):
    """A linear layer whose bias has ten thousand times the Fisher of its kernel."""
    return x @ params["kernel"] + 100 * params["bias"]


def test_vectors_do_not_count_beside_matrices():
    model = flj.Model(predict, flj.likelihoods.gaussian())
    params = {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}
    inputs = jax.random.rademacher(jax.random.key(0), (64, 3), jnp.float32)
    estimator = flj.inverse.fishleg(model)
    state = flj.fit(estimator, params, [(inputs, None)], key=jax.random.key(1))
    # the kernel's Fisher has ones on its diagonal
    assert abs(state.damping / RELATIVE_DAMPING - 1) < 0.1


def test_vectors_count_where_there_is_nothing_else():
    model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
    inputs = 2 * jax.random.rademacher(jax.random.key(0), (64, 6), jnp.float32)
    estimator = flj.inverse.fishleg(model)
    state = flj.fit(estimator, jnp.zeros(6), [(inputs, None)], key=jax.random.key(1))
    assert abs(state.damping / (4 * RELATIVE_DAMPING) - 1) < 0.1


@pytest.mark.parametrize("factor", [factors.kronecker, factors.spectral, factors.diagonal])
def test_one_pass_gives_the_fisher_of_all_batches(x64, factor):
    """Frames and spectrum, near enough for nine tenths of what an unrestricted Q would gain."""
    model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
    root = jax.random.normal(jax.random.key(0), (6, 6), jnp.float64)
    inputs = jnp.tile(6**0.5 * root, (90, 1))  # whose second moment is that of the rows
    inputs = jax.random.permutation(jax.random.key(2), inputs).reshape(9, 60, 6)
    estimator = flj.inverse.fishleg(model, 0.1, factors=factor)
    params = jnp.ones((6, 2))
    state = flj.fit(estimator, params, [(x, None) for x in inputs], key=jax.random.key(1))
    assert int(state.count) == 9 and float(state.seen) == 540
    fisher = np.kron(np.asarray(root.T @ root), np.eye(2))
    expected = np.linalg.inv(fisher + 0.1 * np.eye(12))
    if factor is factors.diagonal:  # random signs have no noise of their own
        diagonal = dense.jitted(estimator.fisher_diagonal)(state, params)
        expected = jnp.tile(jnp.diag(root.T @ root)[:, None], 2)
        np.testing.assert_allclose(diagonal, expected, rtol=1e-9)
    elif factor is factors.spectral:  # the damping of the others is another one
        found = dense.inverse_matrix(estimator, state, params)
        loss = 0.5 * np.trace(found @ (fisher + 0.1 * np.eye(12)) @ found) - np.trace(found)
        assert loss < 0.9 * (-0.5 * np.trace(expected))


def test_a_turned_frame_keeps_the_fisher_it_stands_for(x64):
    """Where the new eigenvectors are those of the old Fisher, its diagonal there is exact."""
    factor, rng = factors.spectral((5, 4), 3, sandwich=False), np.random.default_rng(0)
    samples = jnp.asarray(rng.normal(size=(40, 5, 4)) @ rng.normal(size=(4, 4)))
    moments = frames.mean_moments(factor, samples)
    one_by_one = jax.tree.map(
        lambda x: x.mean(0), jax.vmap(partial(frames.moments_of, factor))(samples)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), moments, one_by_one)
    old = frames.decompose(factor, frames.empty_frame(factor, jnp.float64), moments)
    old = old._replace(spectrum=frames.mean_spectrum(factor, old, samples))
    other = frames.mean_moments(factor, samples[:20])
    new = frames.turn(factor, old, other)

    def matrix(frame):
        eye = jnp.eye(20).reshape(20, 5, 4)
        coordinates, damping = frames.NOT_LEARNED, jnp.asarray(1e-9)
        product = lambda v: algebra.multiply(factor, frame, coordinates, damping, v)  # noqa: E731
        return np.linalg.inv(np.asarray(jax.vmap(product)(eye)).reshape(20, 20))

    # the new one is the best approximation of the old in its own eigenvectors
    basis = np.asarray(
        jax.vmap(lambda v: algebra.rotate(factor, new, v))(jnp.eye(20).reshape(20, 5, 4))
    ).reshape(20, -1)
    in_basis = basis.T @ matrix(old) @ basis
    found = basis.T @ matrix(new) @ basis
    np.testing.assert_allclose(np.diag(found), np.diag(in_basis), rtol=1e-6, atol=1e-8)
    back = frames.turn(factor, new, other)
    np.testing.assert_allclose(back.spectrum, new.spectrum, rtol=1e-9, atol=1e-12)


def test_moments_follow_a_network_that_moves():
    """A window forgets: what came long ago counts for nothing, in frames and eigenvalues."""
    model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
    first, second = (jnp.zeros((64, 2)).at[:, i].set(1) for i in (0, 1))  # one input each
    estimator = flj.inverse.fishleg(model, 0.1, window=4)
    batches = [(first, None)] * 8 + [(second, None)] * 40
    params = jnp.ones((2, 3))
    state = flj.fit(estimator, params, batches, key=jax.random.key(0))
    found = dense.jitted(estimator.fisher_diagonal)(state, params)
    assert found[0].max() < 1e-3 and found[1].min() > 0.5


def test_a_changed_damping_stays_as_a_factor():
    model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
    inputs = jax.random.rademacher(jax.random.key(0), (64, 6), jnp.float32)
    estimator, params = flj.inverse.fishleg(model, window=2), jnp.zeros(6)
    states = [flj.fit(estimator, params, [(inputs, None)], key=jax.random.key(1))] * 2
    states[1] = flj.inverse.with_damping(states[0], 3 * float(states[0].damping))
    twice = 2 * inputs, None  # four times the Fisher
    update = jax.jit(estimator.update)
    for i in range(20):
        states = [update(s, params, twice, jax.random.key(i)) for s in states]
    assert float(states[1].damping / states[0].damping) == pytest.approx(3, rel=1e-5)
    assert float(states[0].damping) == pytest.approx(4 * RELATIVE_DAMPING, rel=0.3)


def test_a_carried_state_is_refined_in_a_quarter_of_a_fit():
    """Half of it is of the new weights; and the state that was carried is still there."""
    model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
    sign = jax.random.rademacher(jax.random.key(0), (512, 6), jnp.float32)
    cut = lambda x: [(x[i : i + 64], None) for i in range(0, 512, 64)]  # noqa: E731
    estimator, params = flj.inverse.fishleg(model), jnp.zeros((6, 2))
    key, calls = jax.random.key(1), []
    old = flj.fit(estimator, params, cut(sign), key=key)
    new = flj.fit(
        estimator, params, cut(2 * sign), key=key, state=old, on_update=lambda *a: calls.append(a)
    )
    assert len(calls) == 2 and int(old.count) == 8 and int(new.count) == 4
    trace = [float(dense.jitted(estimator.fisher_diagonal)(s, params).mean()) for s in (old, new)]
    assert trace == pytest.approx([1, 2.5], rel=1e-4)  # signs have no noise
    assert float(new.damping) == pytest.approx(2.5 * RELATIVE_DAMPING, rel=1e-4)
    with pytest.raises(ValueError, match="carries no state on"):
        flj.fit(flj.inverse.kfac(model), params, cut(sign), key=key, state=old)


@pytest.mark.parametrize("least, samples", [(4, 4), (8, 2), (9, 1)])
@pytest.mark.parametrize("most", [None, 16])
def test_a_batch_gives_as_many_samples_as_have_enough_examples(least, samples, most):
    """Held together, or one by one."""
    model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
    inputs = jax.random.normal(jax.random.key(0), (16, 12))
    estimator = flj.inverse.fishleg(
        model, 0.1, factors=factors.full, start=2, examples_per_sample=least, samples=most
    )
    state = flj.fit(estimator, jnp.ones(12), [(inputs, None)], key=jax.random.key(1))
    ((moments,),) = state.moments.values()
    assert np.linalg.matrix_rank(moments[0]) == 2 * samples  # of two batches
