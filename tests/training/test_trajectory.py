"""The subspace of an earlier training, and training within it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fishleg_jax as flj


def walk(steps, shapes, seed=0, scale=1.0):
    """Parameters at some steps of a random walk, as lists of arrays."""
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    leaves = [
        scale * (3 + jnp.cumsum(jax.random.normal(k, (steps, *s)), axis=0))
        for k, s in zip(keys, shapes, strict=True)
    ]
    return [{str(i): leaf[t] for i, leaf in enumerate(leaves)} for t in range(steps)]


def flat(tree, lead=0):
    """A tree as rows of a matrix, in double precision."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    return np.concatenate([x.reshape(*x.shape[:lead], -1) for x in leaves], axis=-1)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_directions_are_the_principal_components(scale):
    checkpoints = walk(7, [(4, 5), (6,), ()], scale=scale)
    basis = flj.trajectory_subspace(checkpoints, 3)
    assert basis["0"].shape == (3, 4, 5) and basis["2"].shape == (3,)
    rows = np.stack([flat(one) for one in checkpoints])
    expected = np.linalg.svd(rows - rows.mean(0))[2][:3]
    found = flat(basis, 1)
    np.testing.assert_allclose(found @ found.T, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(np.abs(found @ expected.T), np.eye(3), atol=1e-3)


def test_all_directions_hold_the_trajectory():
    checkpoints = walk(5, [(4, 5), (6,)])
    basis = flat(flj.trajectory_subspace(checkpoints, 4), 1)
    moved = flat(checkpoints[-1]) - flat(checkpoints[0])
    np.testing.assert_allclose(basis.T @ (basis @ moved), moved, atol=1e-4)


def test_updates_within_are_projections_and_the_state_is_that_of_coordinates():
    checkpoints = walk(6, [(4, 5), (6,)])
    basis = flj.trajectory_subspace(checkpoints, 4)
    grads = walk(1, [(4, 5), (6,)], seed=1)[0]
    tx = flj.within_subspace(optax.identity(), basis)
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads))
    rows = flat(basis, 1)
    np.testing.assert_allclose(flat(updates), rows.T @ (rows @ flat(grads)), rtol=1e-4, atol=1e-5)
    adam = flj.within_subspace(optax.adam(0.1), basis).init(grads)
    assert adam.inner[0].mu.shape == (4,)
    jax.tree.map(np.testing.assert_array_equal, adam.basis, basis)


def test_training_within_reaches_the_minimum_of_the_subspace():
    """Least squares around a point outside of the subspace."""
    checkpoints = walk(6, [(4, 5), (6,)])
    goal = walk(1, [(4, 5), (6,)], seed=2)[0]
    basis = flj.trajectory_subspace(checkpoints, 3)
    tx = flj.within_subspace(optax.sgd(0.5, momentum=0.3), basis)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.tree.map(jnp.subtract, params, goal), state, params)
        return (optax.apply_updates(params, updates), state), None

    start = checkpoints[0]
    (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), length=60)
    rows = flat(basis, 1)
    moved = rows.T @ (rows @ (flat(goal) - flat(start)))
    np.testing.assert_allclose(flat(params), flat(start) + moved, atol=1e-3)


def test_refusals():
    checkpoints = walk(4, [(4, 5)])
    with pytest.raises(ValueError, match="checkpoints must be a list of more parameters than"):
        flj.trajectory_subspace(checkpoints, 4)
    with pytest.raises(ValueError, match="rank must be a whole number of at least 1, got 0"):
        flj.trajectory_subspace(checkpoints, 0)
    with pytest.raises(ValueError, match=r"checkpoints\[1\] must have the structure"):
        flj.trajectory_subspace([checkpoints[0], {"other": jnp.ones(2)}], 1)
    with pytest.raises(ValueError, match="rank must be at most the number of directions .* 1, got"):
        flj.trajectory_subspace([*checkpoints[:2], *checkpoints[:2]], 2)
    with pytest.raises(ValueError, match="rank must be at most .* 0, got 1"):
        flj.trajectory_subspace(checkpoints[:1] * 3, 1)
    with pytest.raises(ValueError, match="inner must be an optax transformation"):
        flj.within_subspace(None, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="basis must have the same number of directions"):
        flj.within_subspace(optax.sgd(0.1), [jnp.ones((2, 3)), jnp.ones((3, 3))])
    with pytest.raises(ValueError, match="params: .* must have shape"):
        flj.within_subspace(optax.sgd(0.1), {"w": jnp.ones((2, 3))}).init({"w": jnp.ones(4)})
