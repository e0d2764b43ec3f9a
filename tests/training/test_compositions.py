"""The natural gradient among the transformations of optax, dtypes, devices and bad numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fishleg_jax as flj
from fishleg_jax.training.damping import GROWTH, START
from fishleg_jax.training.state import natural_state
from tests.training.problems import (
    DIAGONAL,
    LINEAR,
    RATE,
    STEPS,
    at,
    batches,
    gradient,
    initial,
    lowered,
    make_step,
    train,
)

NATURAL = flj.scale_by_inverse_fisher(DIAGONAL, aux_every=3)
CHAIN = optax.chain(NATURAL, optax.scale_by_learning_rate(RATE))


def leaves(tree):
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]


def same(one, other, **tolerance):
    for a, b in zip(leaves(one), leaves(other), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


def test_training_lowers_the_loss():
    params, state, _ = train(CHAIN)
    assert lowered(params) < 0.6
    assert int(natural_state(state).count) == STEPS and int(natural_state(state).failures) == 0


def test_batches_are_assimilated_every_so_many_steps_once_the_estimate_is_ready():
    _, state, _ = train(CHAIN)
    # at the first, and at steps 3, 6, 9 and 12
    assert int(natural_state(state).assimilated) == 5


def test_a_step_compiles_once():
    step = jax.jit(make_step(CHAIN))
    params, state = initial(), CHAIN.init(initial())
    for i in range(4):
        (params, state), _ = step((params, state), at(i, batches()))
    assert step._cache_size() == 1
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))


def test_outside_of_jit_a_step_is_the_same():
    carry = initial(), CHAIN.init(initial())
    once, _ = make_step(CHAIN)(carry, at(0, batches()))
    compiled, _ = jax.jit(make_step(CHAIN))(carry, at(0, batches()))
    same(once[0], compiled[0], rtol=1e-6)


def test_a_held_step_reads_no_batch_and_learns_nothing():
    carry, _ = jax.jit(make_step(NATURAL))((initial(), NATURAL.init(initial())), at(0, batches()))
    params, state = carry
    grads = gradient(params, at(1, batches()))
    held, after = NATURAL.update(grads, state, params, hold=True)
    free, _ = NATURAL.update(grads, state, params, batch=at(1, batches()), assimilate=False)
    same(held, free, rtol=1e-6)
    same(after.estimate, state.estimate)
    assert int(after.count) == 2


def test_assimilate_decides_without_the_step_count():
    params, state = initial(), NATURAL.init(initial())
    for assimilate, number in ((True, 1), (False, 1), (True, 2)):
        batch = at(0, batches())
        _, state = NATURAL.update(
            gradient(params, batch), state, params, batch=batch, assimilate=assimilate
        )
        assert int(state.assimilated) == number


@pytest.mark.parametrize(
    "tx",
    [
        optax.named_chain(("natural", NATURAL), ("rate", optax.scale_by_learning_rate(RATE))),
        optax.chain(optax.clip_by_global_norm(1e3), CHAIN, optax.add_decayed_weights(-1e-3)),
        optax.inject_hyperparams(
            lambda rate: optax.chain(NATURAL, optax.scale_by_learning_rate(rate))
        )(optax.linear_schedule(RATE, RATE / 2, STEPS)),
        flj.MultiSteps(CHAIN, 2).gradient_transformation(),
    ],
    ids=["named_chain", "clip", "inject", "multi_steps"],
)
def test_within_others(tx):
    params, state, _ = train(tx)
    assert lowered(params) < 0.85
    assert int(natural_state(state).failures) == 0


def test_injected_numbers_are_those_given():
    wrapped = optax.inject_hyperparams(flj.scale_by_inverse_fisher, static_args=("estimator",))
    tx = wrapped(DIAGONAL, damping=optax.constant_schedule(0.5), momentum=0.5, aux_every=3)
    chain = optax.chain(tx, optax.scale_by_learning_rate(0.1))
    plain = flj.scale_by_inverse_fisher(DIAGONAL, damping=0.5, momentum=0.5, aux_every=3)
    expected, _, _ = train(optax.chain(plain, optax.scale_by_learning_rate(0.1)))
    found, state, _ = train(chain)
    same(found, expected, rtol=1e-5)
    assert float(natural_state(state).damping) == 0.5


def test_mini_steps_assimilate_the_last_batch_only():
    _, state, _ = train(flj.MultiSteps(CHAIN, 4).gradient_transformation())
    natural = natural_state(state)
    assert int(natural.count) == 3 and int(natural.assimilated) == 2  # steps 1 and 3


def test_bfloat16_weights_get_bfloat16_steps_from_float32_statistics():
    params, state, _ = train(CHAIN, initial(jnp.bfloat16), batches(dtype=jnp.bfloat16))
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(params))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(natural_state(state).momentum))
    assert lowered(params) < 0.6


@pytest.mark.parametrize("where", ["inputs", "targets"])
def test_a_batch_of_nan_makes_no_step_and_leaves_no_trace(where):
    data = batches()
    index = 0 if where == "inputs" else 1
    spoilt = tuple(x.at[5].set(jnp.nan) if i == index else x for i, x in enumerate(data))
    step = jax.jit(make_step(CHAIN))
    params, state = initial(), CHAIN.init(initial())
    for i in range(7):
        before = params, natural_state(state)
        (params, state), _ = step((params, state), at(i, spoilt))
        if i == 5:  # step 6, at which a batch would have been assimilated
            same(params, before[0])
            same(natural_state(state).momentum, before[1].momentum)
            same(natural_state(state).estimate, before[1].estimate)
    assert all(np.isfinite(x).all() for x in leaves((params, natural_state(state).estimate)))
    assert int(natural_state(state).failures) > 0


def test_absurd_learning_rates_leave_finite_weights_and_say_so():
    tx = optax.chain(NATURAL, optax.scale_by_learning_rate(1e30))
    params, state, losses = train(tx)
    assert all(np.isfinite(x).all() for x in leaves(params))
    assert not np.isfinite(losses[-1]) and int(natural_state(state).failures) > 0


@pytest.mark.parametrize(
    "rate", [100.0, optax.constant_schedule(100.0)], ids=["number", "function"]
)
def test_the_optimiser_bounds_whole_steps(rate):
    tx = flj.fishleg_optimizer(LINEAR, rate, max_fisher_norm=0.5)
    params, state, losses = train(tx)
    natural = natural_state(state)
    np.testing.assert_allclose(100 * natural.fisher_norm, 0.5, rtol=1e-5)  # at every step, so far
    assert lowered(params) < 1 and np.isfinite(losses).all()


def test_devices_share_their_batches():
    """Two devices, each with half of every batch, by `vmap` over a named axis."""
    estimator = flj.inverse.fishleg(LINEAR, 0.1, kind="empirical", axis_name="devices")
    for own in (DIAGONAL, estimator):
        tx = optax.chain(
            flj.scale_by_inverse_fisher(own, axis_name="devices"), optax.scale_by_learning_rate(0.1)
        )
        data = batches()
        halves = jax.tree.map(lambda x: x.reshape(STEPS, 2, -1, *x.shape[2:]).swapaxes(0, 1), data)

        def run(data, tx=tx):
            def step(carry, batch):
                params, state = carry
                grads = jax.lax.pmean(gradient(params, batch), "devices")
                updates, state = tx.update(grads, state, params, batch=batch)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, (initial(), tx.init(initial())), data)[0]

        params, state = jax.jit(jax.vmap(run, axis_name="devices"))(halves)
        same(at(0, params), at(1, params), rtol=1e-6)
        same(at(0, natural_state(state).estimate), at(1, natural_state(state).estimate), rtol=1e-6)
        if own is DIAGONAL:  # whose labels are the data's, so that nothing is random
            single = flj.scale_by_inverse_fisher(DIAGONAL)
            expected, _, _ = train(optax.chain(single, optax.scale_by_learning_rate(0.1)))
            same(at(0, params), expected, rtol=1e-4, atol=1e-6)


def test_masks_keep_pruned_weights_out():
    mask = {"w": jnp.ones((4, 3), bool).at[1].set(False), "b": jnp.ones(3, bool)}
    batch = at(0, batches())
    updates, state = NATURAL.update(
        gradient(initial(), batch), NATURAL.init(initial()), initial(), batch=batch, mask=mask
    )
    assert (updates["w"][1] == 0).all() and (updates["w"][0] != 0).all()
    assert (state.estimate.squares["w"][1] == 0).all()


@pytest.mark.parametrize("rate, sign", [(1e-4, -1), (1e3, 1)], ids=["timid", "bold"])
def test_adaptive_damping_follows_the_curvature_along_the_steps(rate, sign):
    """With no curvature known the damping is all there is."""
    blind = flj.inverse.diagonal(LINEAR, 100.0)._replace(
        update=lambda state, *_: state._replace(count=state.count + 1), fisher_diagonal=None
    )
    tx = flj.scale_by_inverse_fisher(blind, damping="adaptive", momentum=0.0)
    state = train(optax.chain(tx, optax.scale_by_learning_rate(rate)), data=batches(6))[1]
    natural = natural_state(state)
    assert sign * (float(natural.ratio) - 1) > 0.5
    assert float(natural.factor) == pytest.approx(GROWTH**sign)
    assert float(natural.damping) == pytest.approx(100 * GROWTH**sign)


def test_the_ratio_of_adaptive_damping_is_that_of_the_definition():
    data = batches(6)
    tx = flj.scale_by_inverse_fisher(DIAGONAL, damping="adaptive")
    chain = optax.chain(tx, optax.scale_by_learning_rate(RATE))
    step, carry = jax.jit(make_step(chain)), (initial(), chain.init(initial()))
    history = []
    for i in range(5):
        history.append(carry)
        carry, _ = step(carry, at(i, data))
    (before, _), (now, previous) = history[3], history[4]
    batch = at(4, data)
    last = jax.tree.map(jnp.subtract, now, before)
    inner = optax.tree.vdot(gradient(now, batch), last)
    loss = lambda params: flj.loss(LINEAR, params, batch)
    measured = 2 * (loss(before) - loss(now) + inner)
    first_order = RATE * natural_state(previous).fisher_norm ** 2
    ratio = natural_state(carry[1]).ratio
    np.testing.assert_allclose(ratio, measured / first_order, rtol=1e-3)


def test_adaptive_damping_starts_at_a_share_of_the_fishers_trace():
    batch = at(0, batches())
    tx = flj.scale_by_inverse_fisher(DIAGONAL, damping="adaptive")
    _, state = tx.update(gradient(initial(), batch), tx.init(initial()), initial(), batch=batch)
    trace = DIAGONAL.fisher_diagonal(state.estimate, initial())["w"].sum()
    np.testing.assert_allclose(state.damping, START * trace, rtol=1e-5)


ARGUMENTS = {
    "aux_every": (0, "aux_every must be a whole number of steps, at least 1, got 0"),
    "damping": (-1.0, "damping must be a positive finite number"),
    "momentum": (1.0, r"momentum must be a number in \[0, 1\), got 1.0"),
    "max_fisher_norm": (0.0, "max_fisher_norm must be a positive finite number or None, got 0.0"),
    "grafting": ("rmsprop", "grafting must be None, 'sgd' or 'adam', got 'rmsprop'"),
    "axis_name": (3, "axis_name must be"),
    "seed": (-1, "seed must be a whole number"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_bad_arguments_are_refused(name):
    value, message = ARGUMENTS[name]
    with pytest.raises(ValueError, match=message):
        flj.scale_by_inverse_fisher(DIAGONAL, **{name: value})


def test_bad_words_models_and_rates_are_refused():
    for arguments, message in (
        ({"damping": "auto"}, "damping must be None, a positive number, a function"),
        ({"damping": lambda step: "no"}, "damping must return a number at every step"),
    ):
        with pytest.raises(ValueError, match=message):
            flj.scale_by_inverse_fisher(DIAGONAL, **arguments)
    with pytest.raises(ValueError, match="estimator must be an InverseFisher"):
        flj.scale_by_inverse_fisher(LINEAR)
    with pytest.raises(ValueError, match="damping must be None for an estimate whose damping"):
        flj.scale_by_inverse_fisher(flj.inverse.identity(), damping=0.1).init(initial())
    with pytest.raises(ValueError, match="learning_rate must be a finite number of at least 0"):
        flj.fishleg_optimizer(LINEAR, -0.1)
    with pytest.raises(ValueError, match="weight_decay must be a finite number of at least 0"):
        flj.fishleg_optimizer(LINEAR, 0.1, weight_decay=-1)


def test_a_step_without_what_it_needs_is_refused():
    params, state = initial(), NATURAL.init(initial())
    batch = at(0, batches())
    grads = gradient(params, batch)
    with pytest.raises(ValueError, match="params must be passed to update"):
        NATURAL.update(grads, state, batch=batch)
    with pytest.raises(ValueError, match="batch must be passed to update for its curvature"):
        NATURAL.update(grads, state, params)
    with pytest.raises(ValueError, match="grads must have the structure of the parameters"):
        NATURAL.update({"w": grads["w"]}, state, params, batch=batch)
    with pytest.raises(ValueError, match="hold must be True or False"):
        NATURAL.update(grads, state, params, batch=batch, hold=1)
    with pytest.raises(ValueError, match="leaves masked out by optax.masked"):
        optax.masked(NATURAL, {"w": True, "b": False}).init(params)
