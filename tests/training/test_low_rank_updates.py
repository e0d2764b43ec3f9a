"""Optimiser states in subspaces, beside dense algebra and among transformations."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import fishleg_jax as flj
from fishleg_jax.training import projection

MODEL = flj.Model(
    lambda p, x: jnp.tanh(x @ p["in"] + p["bias"]) @ p["out"], flj.likelihoods.gaussian()
)
EXAMPLES, STEPS = 16, 12
ADAM = optax.scale_by_adam()


def initial(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "in": jax.random.normal(keys[0], (12, 20)) / 12**0.5,
        "bias": jnp.zeros(20),
        "out": jax.random.normal(keys[1], (20, 10)) / 20**0.5,
    }
    return jax.tree.map(lambda x: x.astype(dtype), params)


def batches(steps=STEPS):
    keys = jax.random.split(jax.random.key(1), 2)
    inputs = jax.random.normal(keys[0], (steps, EXAMPLES, 12))
    return inputs, jnp.sin(inputs @ jax.random.normal(keys[1], (12, 10)))


def train(tx, params=None, data=None):
    """Weights, state and losses after a step on each batch."""
    params = initial() if params is None else params

    def step(carry, batch):
        params, state = carry
        loss, grads = jax.value_and_grad(lambda p: flj.loss(MODEL, p, batch))(params)
        updates, state = tx.update(grads, state, params, batch=batch)
        return (optax.apply_updates(params, updates), state), loss

    run = jax.jit(lambda params, data: jax.lax.scan(step, (params, tx.init(params)), data))
    (params, state), losses = run(params, batches() if data is None else data)
    return params, state, losses


def gradients(shape, rank, steps, seed):
    """Gradients whose columns lie in one subspace of this rank."""
    keys = jax.random.split(jax.random.key(seed), 2)
    columns = jax.random.normal(keys[0], (*shape[:-1], rank))
    rows = jax.random.normal(keys[1], (steps, *shape[:-2], rank, shape[-1]))
    return columns @ rows


def follow(tx, grads):
    """Updates of one leaf over some gradients, and the last state."""

    def step(state, gradient):
        update, state = tx.update(gradient, state)
        return state, update

    state, updates = jax.lax.scan(step, tx.init(jnp.zeros_like(grads[0])), grads)
    return updates, state


@pytest.mark.parametrize(
    ("shape", "stacked", "sides"),
    [
        ((6, 4), False, (4, 6)),
        ((3, 3, 16, 32), False, (32, 144)),
        ((64, 4, 16), False, (64, 64)),
        ((5, 4, 6), True, (4, 6)),
        ((5, 3, 2, 6), True, (6, 6)),
    ],
)
def test_leaves_become_matrices_and_come_back(shape, stacked, sides):
    form = projection.form_of(shape, stacked)
    assert (form.small, form.large) == sides
    leaf = jax.random.normal(jax.random.key(0), shape)
    matrix = form.matrix(leaf)
    assert matrix.shape == (*shape[: int(stacked)], *sides)
    np.testing.assert_array_equal(form.leaf(matrix, leaf), leaf)


def test_leaves_without_two_sides_have_no_form():
    assert [projection.form_of(s, False) for s in ((), (7,), (4, 0))] == [None] * 3
    assert projection.form_of((3, 7), True) is None


@settings(max_examples=5, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    shape=st.sampled_from([(9, 14), (14, 9), (2, 9, 14)]),
    subspaces=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-25, 1.0, 1e12]),
)
def test_bases_are_orthonormal_and_hold_gradients_of_their_rank(shape, subspaces, seed, scale):
    """Whatever the scale; with several subspaces after as many refreshes."""
    grads = scale * gradients(shape, 3, 4, seed)
    tx = flj.low_rank_updates(
        optax.trace(0.9), 3, 1, subspaces=subspaces, stacked=".*" if len(shape) > 2 else None
    )
    _, state = follow(tx, grads)
    (basis,) = state.bases.values()
    eye = jnp.broadcast_to(jnp.eye(3), (*basis.shape[:-2], 3, 3))
    np.testing.assert_allclose(basis.mT @ basis, eye, atol=2e-6)
    form = projection.form_of(shape, len(shape) > 2)
    matrix = form.matrix(grads[-1]) / scale
    if not form.transposed:  # else the subspace of the smaller side is another in every step
        np.testing.assert_allclose(basis @ (basis.mT @ matrix), matrix, atol=2e-4)
    assert int(state.refreshes) == 4


@pytest.mark.parametrize("residual", [False, True])
def test_momentum_in_a_subspace_that_holds_the_gradients_is_momentum(residual):
    """Across refreshes, at which the basis turns within the subspace and the momentum with it."""
    grads = gradients((9, 14), 3, 8, 0)
    expected, _ = follow(optax.trace(0.9, nesterov=True), grads)
    tx = flj.low_rank_updates(optax.trace(0.9, nesterov=True), 3, 3, residual=residual)
    found, state = follow(tx, grads)
    assert int(state.refreshes) == 3
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_first_step_of_adam_is_that_of_the_formula():
    """Not Adam's own: second moments of coordinates depend on the basis."""
    gradient = jax.random.normal(jax.random.key(0), (9, 14))
    tx = flj.low_rank_updates(ADAM, 4, 5)
    update, state = tx.update({"w": gradient}, tx.init({"w": gradient}))
    basis = np.asarray(state.bases["w"], np.float64)
    dense = np.asarray(gradient, np.float64)
    seen = basis.T @ dense
    step = seen / (np.abs(seen) + 1e-8)  # both moments, corrected for their start at zero
    scale = np.linalg.norm(step, axis=0) / np.linalg.norm(seen, axis=0)
    expected = basis @ step + scale * (dense - basis @ seen)
    np.testing.assert_allclose(update["w"], expected, rtol=1e-4, atol=1e-5)


def test_the_basis_holds_nearly_as_much_as_the_leading_singular_vectors():
    left, _, right = jnp.linalg.svd(jax.random.normal(jax.random.key(0), (30, 40)), False)
    gradient = left * 0.8 ** jnp.arange(30) @ right
    tx = flj.low_rank_updates(ADAM, 8)
    _, state = tx.update(gradient, tx.init(gradient))
    held = jnp.linalg.norm(state.bases[""].mT @ gradient) ** 2
    best = jnp.sum(0.8 ** (2 * jnp.arange(8)))
    assert 0.97 * best < held <= best * (1 + 1e-5)


def test_a_step_without_memory_with_the_residual_is_the_gradient():
    gradient = jax.random.normal(jax.random.key(0), (9, 14))
    tx = flj.low_rank_updates(optax.trace(0.0), 2)
    state = tx.init(gradient)
    assert state.bases[""].shape == (9, 2)
    np.testing.assert_allclose(tx.update(gradient, state)[0], gradient, rtol=1e-5, atol=1e-6)


def test_the_rest_is_bounded_where_a_gradient_lies_outside_of_the_subspace():
    """Momentum moves all columns; the gradient of the last is orthogonal to the basis."""
    tx = flj.low_rank_updates(optax.trace(0.9), 2, 5)
    first = jnp.zeros((9, 14)).at[:2].set(jax.random.normal(jax.random.key(0), (2, 14)))
    _, state = tx.update(first, tx.init(first))
    second = first.at[:, -1].set(jnp.zeros(9).at[5].set(1.0))
    update, after = tx.update(second, state)
    moved = jnp.linalg.norm(after.inner.trace[:, -1])
    np.testing.assert_allclose(jnp.linalg.norm(update[5, -1]), 10 * moved, rtol=1e-4)
    np.testing.assert_allclose(update[:, :-1], 1.9 * first[:, :-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [99, 0.999])
def test_at_full_rank_leaves_pass_whole_and_adam_is_adam(rank):
    expected, plain, _ = train(optax.chain(ADAM, optax.scale(-0.01)))
    found, state, _ = train(optax.chain(flj.low_rank_updates(ADAM, rank), optax.scale(-0.01)))
    assert not state[0].bases
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    jax.tree.map(np.testing.assert_array_equal, state[0].inner, plain[0])


def test_leaves_pass_whole_where_their_projection_would_not_be_smaller():
    params = {"square": jnp.ones((12, 12)), "flat": jnp.ones((12, 400))}
    adam = flj.low_rank_updates(ADAM, 8).init(params)  # 8 (12 + 2 n) against 2 · 12 n
    momentum = flj.low_rank_updates(optax.trace(0.9), 8).init(params)  # 8 (12 + n) against 12 n
    assert set(adam.bases) == {"flat"} and set(momentum.bases) == {"flat"}
    assert flj.low_rank_updates(ADAM, 7).init(params).bases["square"].shape == (12, 7)
    assert not flj.low_rank_updates(optax.identity(), 1).init(params).bases


def test_a_refresh_rotates_moments_into_the_new_subspace():
    keys = jax.random.split(jax.random.key(0), 3)
    tx = flj.low_rank_updates(ADAM, 4, 2)
    state = tx.init(jnp.zeros((9, 14)))
    for key in keys[:2]:
        _, state = tx.update(jax.random.normal(key, (9, 14)), state)
    last = jax.random.normal(keys[2], (9, 14))
    _, after = tx.update(last, state)
    turn = after.bases[""].T @ state.bases[""]
    seen = after.bases[""].T @ last
    mu = 0.9 * turn @ state.inner.mu + 0.1 * seen
    nu = 0.999 * turn**2 @ state.inner.nu + 0.001 * seen**2
    np.testing.assert_allclose(after.inner.mu, mu, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(after.inner.nu, nu, rtol=1e-4, atol=1e-7)
    assert (int(state.refreshes), int(after.refreshes), int(after.age)) == (1, 2, 1)


def test_of_several_subspaces_a_refresh_replaces_the_oldest():
    keys = jax.random.split(jax.random.key(0), 2)
    tx = flj.low_rank_updates(ADAM, 6, 1, subspaces=3)
    first = tx.update(jax.random.normal(keys[0], (9, 14)), tx.init(jnp.zeros((9, 14))))[1]
    second = tx.update(jax.random.normal(keys[1], (9, 14)), first)[1]
    kept = second.bases[""].T @ first.bases[""][:, 2:]
    np.testing.assert_allclose(jnp.abs(kept), jnp.eye(6, 4), atol=1e-5)


def test_training_with_a_fraction_of_the_state():
    data = jax.tree.map(lambda x: jnp.tile(x, (20, 1, 1)), batches(3))
    tx = optax.chain(flj.low_rank_updates(ADAM, 2, 4), optax.scale(-0.01))
    _, state, losses = train(tx, data=data)
    _, plain, reference = train(optax.chain(ADAM, optax.scale(-0.01)), data=data)
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert size(state) < size(plain) / 3
    assert losses[0] - losses[-3:].mean() > 0.8 * (losses[0] - reference[-3:].mean())
    assert int(state[0].refreshes) == 15


def chained(rate=0.01):
    return optax.chain(flj.low_rank_updates(ADAM, 3, 4), optax.scale_by_learning_rate(rate))


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.clip_by_global_norm(1e3), chained(), optax.add_decayed_weights(-1e-4)),
        optax.inject_hyperparams(chained)(optax.linear_schedule(0.02, 0.01, STEPS)),
        flj.MultiSteps(chained(), 2).gradient_transformation(),
        optax.apply_if_finite(chained(), 3),
        optax.chain(
            optax.inject_hyperparams(
                flj.low_rank_updates, static_args=("inner", "rank", "subspaces", "residual", "seed")
            )(ADAM, 3, refresh=4),
            optax.scale(-0.01),
        ),
    ],
    ids=["clip", "inject", "multi_steps", "apply_if_finite", "injected refresh"],
)
def test_within_others(tx):
    _, state, losses = train(tx, data=batches(40))
    assert losses[-5:].mean() < 0.97 * losses[:5].mean()
    is_own = lambda x: isinstance(x, flj.LowRankState)
    (own,) = (x for x in jax.tree.leaves(state, is_leaf=is_own) if is_own(x))
    assert int(own.refreshes) == (5 if int(own.inner.count) == 20 else 10)


def test_a_step_compiles_once_and_is_the_same_outside_of_jit():
    tx = chained()
    step = jax.jit(lambda grads, state: tx.update(grads, state))
    params = initial()
    state = plain = tx.init(params)
    for i in range(6):
        grads = jax.tree.map(lambda x, i=i: jnp.sin(i + x), params)
        (found, state), (expected, plain) = step(grads, state), tx.update(grads, plain)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, expected
        )
    assert step._cache_size() == 1
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))


def test_pruned_weights_stay_zero_behind_it():
    """In a chain and in the wrapper, with masks of exactly the sparsity asked for."""
    own = {"estimator": flj.inverse.identity(), "mask_every": 4}
    goal = flj.schedules.cubic(0.6, begin=4, end=16)
    behind = optax.chain(chained(0.05), flj.fishleg_prune(MODEL, goal, **own))
    around = flj.prune(chained(0.05), MODEL, goal, **own)
    for tx in (behind, around):
        params, state, _ = train(tx, data=batches(20))
        masks = flj.masks(state)
        assert flj.sparsity(params) == pytest.approx(0.6, abs=0.005)

        def step(carry, _, tx=tx):
            params, state = carry
            updates, state = tx.update(
                jax.tree.map(jnp.ones_like, params), state, params, hold=True
            )
            return (optax.apply_updates(params, updates), state), params

        _, after = jax.lax.scan(step, (params, state), length=6)  # past the end, with a refresh
        jax.tree.map(lambda x, m: np.testing.assert_array_equal(x[:, ~m], 0), after, masks)
        assert flj.check(state).ok


@pytest.mark.parametrize("when", [0, 4])
def test_a_gradient_of_nan_reaches_no_basis(when):
    tx = flj.low_rank_updates(ADAM, 3, 4)
    state = tx.init(initial())
    for i in range(6):
        grads = jax.tree.map(lambda x, i=i: jnp.sin(1.0 + i + x), initial())
        if i == when:
            grads["in"] = grads["in"].at[2, 3].set(jnp.nan)
        before = state
        updates, state = tx.update(grads, state)
        assert all(jnp.isfinite(x).all() for x in state.bases.values())
        if i == when:  # the inner transformation's own answer, and a refresh that waits
            assert jnp.isnan(updates["in"]).any() and jnp.isfinite(updates["out"]).all()
            jax.tree.map(np.testing.assert_array_equal, state.bases, before.bases)
        if i == when + 1:
            assert int(state.age) == 1 and int(state.refreshes) == int(before.refreshes) + 1


def test_bfloat16_weights_get_bfloat16_steps():
    tx = optax.chain(
        flj.low_rank_updates(optax.scale_by_adam(mu_dtype=jnp.bfloat16), 3, 4), optax.scale(-0.01)
    )
    params, state, losses = train(
        tx, initial(jnp.bfloat16), jax.tree.map(lambda x: x.astype(jnp.bfloat16), batches(40))
    )
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves((params, state[0].inner.mu)))
    assert {x.dtype for x in state[0].bases.values()} == {jnp.dtype("float32")}
    assert losses[-5:].mean() < losses[:5].mean()


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import fishleg_jax as flj
keys = jax.random.split(jax.random.key(0), 2)
params = {"w": jax.random.normal(keys[0], (16, 24)), "b": jnp.ones(24)}
adam = optax.scale_by_adam()
tx = optax.chain(flj.low_rank_updates(adam, 4, 2), optax.scale(-0.1))
def run(params):
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
        return (optax.apply_updates(params, updates), state), None
    return jax.lax.scan(step, (params, tx.init(params)), length=5)[0][0]
expected = jax.jit(run)(params)
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((4,), ("x",), (kind,))
    for spec in (P("x"), P(None, "x")):
        own = {"w": spec, "b": P("x")}
        put = {k: jax.device_put(x, NamedSharding(mesh, own[k])) for k, x in params.items()}
        with jax.set_mesh(mesh):
            found = jax.jit(run)(put)
        for k in params:
            np.testing.assert_allclose(found[k], expected[k], rtol=1e-4, atol=1e-5)
print(jax.device_count(), "devices")
"""


@pytest.mark.slow
def test_sharded_weights_take_the_same_steps():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    run = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "4 devices"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ADAM, 0), "rank must be a whole number of at least 1, or a share"),
        ((ADAM, 1.5), "rank must be a whole number of at least 1, or a share"),
        ((ADAM, 4, 0), "refresh must be a whole number of steps, at least 1, got 0"),
        ((3, 4), "inner must be an optax transformation, got 3"),
        ((optax.adam(0.1), 4), "inner must keep the sign of the gradient"),
        ((optax.add_decayed_weights(0.1), 4), "inner must not read the weights"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        flj.low_rank_updates(*arguments)


def test_further_refusals():
    with pytest.raises(ValueError, match="subspaces must be at most the rank, 4, got 5"):
        flj.low_rank_updates(ADAM, 4, subspaces=5)
    with pytest.raises(ValueError, match=r"seed must be a whole number in \[0, 2³¹\), got -1"):
        flj.low_rank_updates(ADAM, 4, seed=-1)
    with pytest.raises(ValueError, match="residual must be True or False"):
        flj.low_rank_updates(ADAM, 4, residual=2)
    tx = flj.low_rank_updates(ADAM, 2)
    with pytest.raises(ValueError, match="params: 'n' must be a floating-point array"):
        tx.init({"n": jnp.arange(3)})
    with pytest.raises(ValueError, match="updates: 'w' must have the shape that init saw, got"):
        tx.update({"w": jnp.ones((9, 12))}, tx.init({"w": jnp.ones((12, 14))}))
    assert flj.low_rank_updates(optax.sgd(0.1, momentum=0.9), 2, residual=False)
