"""Gradual pruning among the transformations of optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fishleg_jax as flj
from tests.pruning.training import (
    CHAIN,
    CUBIC,
    DIAGONAL,
    MAGNITUDE,
    MODEL,
    PRUNING,
    STEPS,
    ZEROS,
    at,
    batches,
    gradient,
    initial,
    make_step,
    train,
    zeros,
)


def is_pruned(params, state):
    kept = np.asarray(flj.masks(state)["w"])
    return (~kept).sum() == ZEROS and (np.asarray(params["w"])[~kept] == 0.0).all()


@pytest.mark.parametrize(
    "tx",
    [
        optax.named_chain(("sgd", optax.sgd(0.02)), ("pruning", PRUNING)),
        optax.chain(
            optax.chain(optax.clip_by_global_norm(0.5), optax.add_decayed_weights(0.1)),
            optax.sgd(0.02),
            PRUNING,
        ),
        optax.inject_hyperparams(
            lambda learning_rate: optax.chain(optax.sgd(learning_rate), PRUNING)
        )(optax.linear_schedule(0.02, 0.01, 20)),
        optax.chain(optax.adamw(0.02), PRUNING),
        optax.chain(optax.sgd(0.02, momentum=0.9), PRUNING),
        optax.chain(optax.lion(0.002), PRUNING),
    ],
    ids=["named_chain", "clip_and_decay", "inject", "adamw", "momentum", "lion"],
)
def test_within_others(tx):
    params, state, _ = train(tx)
    assert is_pruned(params, state) and flj.check(state).ok
    assert flj.sparsity(params) == ZEROS / 12


def test_apply_if_finite_makes_a_step_of_nan_undone():
    """Of the pruning, too: the masks, counters and estimate of a run without that batch."""
    tx = optax.apply_if_finite(CHAIN, 5)
    x, y = batches()
    bad = x, y.at[12].set(jnp.nan)
    params, state, _ = train(tx, data=bad)
    fine = jax.tree.map(lambda a: jnp.concatenate([a[:12], a[13:]]), (x, y))
    expected, other, _ = train(tx, data=fine)
    np.testing.assert_array_equal(params["w"], expected["w"])
    jax.tree.map(np.testing.assert_array_equal, state.inner_state, other.inner_state)
    assert flj.check(state).ok


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_a_sparsity_that_is_injected_and_changed_by_hand(dtype):
    inject = optax.inject_hyperparams(flj.gradual_prune, hyperparam_dtype=jnp.float32)
    tx = inject(MAGNITUDE, sparsity=0.29, mask_every=1000)
    params, data = {"w": jnp.arange(1.0, 101, dtype=dtype).reshape(10, 10)}, None
    state = tx.init(params)
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params, batch=data)
        return optax.apply_updates(params, updates), state

    counts = []
    for i in range(12):
        if i == 6:
            state.hyperparams["sparsity"] = jnp.float32(0.95)
        params, state = step(params, state)
        counts.append(int((params["w"] == 0).sum()))
    # at once, and what is changed from where it has stood still for a step
    assert counts == [*[29] * 7, *[95] * 5] and len(traces) == 1
    assert flj.check(state).ok and state.hyperparams["mask_every"].dtype == jnp.int32


def test_a_schedule_that_is_injected():
    inject = optax.inject_hyperparams(flj.fishleg_prune)
    pruning = inject(MODEL, sparsity=CUBIC, estimator=DIAGONAL, aux_every=3, mask_every=4)
    params, state, (_, masks) = train(optax.chain(optax.sgd(0.02), pruning))
    assert is_pruned(params, state) and flj.check(state).ok
    assert (zeros(masks)[31:] == ZEROS).all()


@pytest.mark.parametrize("estimator", [MAGNITUDE, DIAGONAL], ids=["magnitude", "diagonal"])
def test_a_constant_that_is_injected_prunes_when_a_number_does(estimator):
    options = {"sparsity": 0.5, "mask_every": 1000, "aux_every": 3}
    inject = optax.inject_hyperparams(flj.gradual_prune, static_args=("mask_every", "aux_every"))
    data = at(slice(4), batches())
    counts = [
        zeros(train(optax.chain(optax.sgd(0.02), pruning), data=data)[2][1]).tolist()
        for pruning in (inject(estimator, **options), flj.gradual_prune(estimator, **options))
    ]
    assert counts == [[6] * 4, [6] * 4]


def test_a_schedule_that_is_injected_does_not_prune_at_every_step():
    """But where one that is handed in does, and at its first value, and a step after its end."""
    schedule = optax.linear_schedule(0.1, 0.9, 25)
    inject = optax.inject_hyperparams(flj.gradual_prune, static_args="mask_every")
    params = jnp.arange(1.0, 1001).reshape(10, 100)
    changes = []
    for pruning in (
        inject(MAGNITUDE, sparsity=schedule, mask_every=10),
        flj.gradual_prune(MAGNITUDE, lambda step: schedule(step - 1), mask_every=10),
    ):
        step = lambda state, _, tx=pruning: (
            tx.update(params, state, params)[1],
            flj.masks(state).sum(),
        )
        _, kept = jax.lax.scan(step, pruning.init(params), length=STEPS)
        changes.append(np.flatnonzero(np.diff(kept)) + 1)
    assert [x.tolist() for x in changes] == [[1, 10, 20, 27], [10, 20, 26]]


def counting(estimator):
    """An estimator that tells how often its update is really run."""
    runs = []

    def update(state, params, batch, key, mask=None):
        jax.debug.callback(lambda: runs.append(1))
        return estimator.update(state, params, batch, key, mask)

    return estimator._replace(update=update), runs


def minis(data, number):
    """Batches cut into mini-batches, one after the other."""
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[1] // number, *x.shape[2:]), data)


@pytest.mark.parametrize("as_transformation", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_multi_steps_pay_for_curvature_once(as_transformation):
    """And prune as one with a batch would that is the last mini-batch."""
    estimator, runs = counting(DIAGONAL)
    pruning = flj.gradual_prune(estimator, CUBIC, aux_every=3, mask_every=4)
    tx = flj.MultiSteps(optax.chain(optax.sgd(0.02), pruning), 4)
    if as_transformation:
        tx = optax.chain(tx.gradient_transformation())
    data = minis(batches(), 4)
    params, state, (path, masks) = train(tx, data=data)
    jax.effects_barrier()
    assert len(runs) == len([1, *range(3, 30, 3)])
    assert is_pruned(params, state) and flj.check(state).ok
    steps = np.arange(4 * STEPS) // 4
    # masks change at the last mini-step only, and then the weights are zero
    changed = 1 + np.flatnonzero(np.diff(zeros(masks)))
    assert len(changed) > 3 and (changed % 4 == 3).all() and steps[-1] == STEPS - 1
    assert (np.asarray(path["w"])[~np.asarray(masks["w"])] == 0.0).all()


@pytest.mark.slow
def test_multi_steps_of_optax_work_as_well_at_their_price():
    estimator, runs = counting(DIAGONAL)
    pruning = flj.gradual_prune(estimator, CUBIC, aux_every=3, mask_every=4)
    inner = optax.chain(optax.sgd(0.02), pruning)
    params, state, _ = train(optax.MultiSteps(inner, 4), data=minis(batches(), 4))
    jax.effects_barrier()
    assert len(runs) == 4 * len([1, *range(3, 30, 3)])
    ours, other, _ = train(flj.MultiSteps(inner, 4), data=minis(batches(), 4))
    np.testing.assert_array_equal(params["w"], ours["w"])
    jax.tree.map(np.testing.assert_array_equal, state, other)


def test_a_step_that_only_holds_has_no_branch_and_ends_as_one_where_nothing_is_due():
    pruning = flj.gradual_prune(flj.inverse.identity(), 0.5, mask_every=10)
    params, updates = initial(), jax.tree.map(jnp.ones_like, initial())
    params, state = both(pruning, params, pruning.init(params), updates)  # 0.5 is reached at once
    assert flj.sparsity(params) == 0.5
    usual, held = (both(pruning, params, state, updates, hold=hold) for hold in (False, True))
    jax.tree.map(np.testing.assert_array_equal, usual, held)
    assert flj.sparsity(held[0]) == 0.5
    program = str(jax.make_jaxpr(lambda: pruning.update(updates, state, params, hold=True))())
    assert "while[" not in program and "cond[" not in program
    broken = jax.tree.map(jnp.ones_like, params)
    assert flj.check(both(pruning, broken, state, updates, hold=True)[1]).violations > 0
    with pytest.raises(ValueError, match="hold must be True or False, got 'yes'"):
        pruning.update(updates, state, params, hold="yes")


def both(pruning, params, state, updates, **options):
    updates, state = pruning.update(updates, state, params, **options)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize("known", [True, False])
def test_assimilate_from_python_needs_no_conditional(known):
    estimator, runs = counting(DIAGONAL)
    pruning = flj.gradual_prune(estimator, CUBIC, aux_every=3)
    params, data = initial(), at(0, batches())
    state = pruning.init(params)
    update = lambda flag: lambda: pruning.update(params, state, params, batch=data, assimilate=flag)
    branches = [str(jax.make_jaxpr(update(flag))()).count("while[") for flag in (None, known)]
    # two are those of the assimilation: whether there is one, and what undoes it
    assert branches[1] == branches[0] - (1 if known else 2)
    jax.jit(update(known))()[1].count.block_until_ready()
    jax.effects_barrier()
    assert len(runs) == known
    state = jax.jit(update(known))()[1]
    assert int(state.assimilated) == known


def test_assimilate_that_is_traced_is_a_further_condition():
    estimator, runs = counting(DIAGONAL)
    pruning = flj.gradual_prune(estimator, CUBIC, aux_every=3)
    params, data = initial(), batches()

    def step(state, pair):
        i, batch = pair
        _, state = pruning.update(params, state, params, batch=batch, assimilate=i % 2 == 0)
        return state, None

    state, _ = jax.lax.scan(step, pruning.init(params), (jnp.arange(STEPS), data))
    jax.effects_barrier()
    # the first step, and the third, ninth ... which have even numbers from 0
    assert len(runs) == int(state.assimilated) == len([0, *range(2, 29, 6)])


@pytest.mark.parametrize(
    "outside", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["inside", "outside"]
)
def test_schedule_free(outside):
    """It averages weights of its own, for which there is apply_masks."""
    if outside:
        tx = optax.chain(optax.contrib.schedule_free(optax.sgd(0.02), 0.02), PRUNING)
    else:
        tx = optax.contrib.schedule_free(optax.chain(optax.sgd(0.02), PRUNING), 0.02)
    params, state, _ = train(tx)
    inner = state[0] if outside else state
    handed_out = optax.contrib.schedule_free_eval_params(inner, params)
    assert (handed_out["w"] != 0).all()
    masked = flj.apply_masks(handed_out, state)
    assert is_pruned(masked, state) and (masked["b"] == handed_out["b"]).all()
    assert flj.check(state).ok == outside
    assert is_pruned(params, state) == outside


def test_an_average_of_weights():
    def step(carry, batch):
        average, carry = carry
        carry, _ = make_step(CHAIN)(carry, batch)
        return (optax.incremental_update(carry[0], average, 0.1), carry), None

    params = initial()
    (average, (params, state)), _ = jax.jit(lambda c, d: jax.lax.scan(step, c, d))(
        (params, (params, CHAIN.init(params))), batches()
    )
    assert is_pruned(params, state) and (average["w"] != 0).all()
    assert is_pruned(flj.apply_masks(average, state), state)


def test_lookahead_by_magnitude():
    """It hands no batch on, and keeps slow weights."""
    pruning = flj.gradual_prune(MAGNITUDE, CUBIC, mask_every=4)
    tx = optax.lookahead(optax.chain(optax.sgd(0.02), pruning), 5, 0.5)
    start = initial()
    params = optax.LookaheadParams.init_synced(start)
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(gradient(params.fast, batch), state, params)
        return optax.apply_updates(params, updates), state

    for i in range(STEPS):
        params, state = step(params, state, at(i, batches()))
    for handed_out in params:
        assert is_pruned(flj.apply_masks(handed_out, state), state)
    assert (params.slow["w"] != 0).all()
    tx = optax.lookahead(optax.chain(optax.sgd(0.02), PRUNING), 5, 0.5)
    params = optax.LookaheadParams.init_synced(start)
    with pytest.raises(ValueError, match="wrappers that drop extra arguments"):
        tx.update(start, tx.init(params), params)


@pytest.mark.slow
def test_lookahead_with_curvature_outside_of_it():
    """The pruning then sees both kinds of weights, of which the fast ones are the model's."""
    model = flj.Model(lambda params, x: MODEL.predict(params.fast, x), MODEL.likelihood)
    estimator = flj.inverse.diagonal(model, labels="empirical", examples_per_gradient=4)
    pruning = flj.gradual_prune(estimator, CUBIC, mask_every=4, prunable="^fast/w")
    tx = optax.chain(optax.lookahead(optax.sgd(0.02), 5, 0.5), pruning)
    params = optax.LookaheadParams.init_synced(initial())

    def step(carry, batch):
        params, state = carry
        updates, state = tx.update(gradient(params.fast, batch), state, params, batch=batch)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), batches())
    kept = np.asarray(flj.masks(state).fast["w"])
    assert (~kept).sum() == ZEROS and flj.check(state).ok
    assert (np.asarray(params.fast["w"])[~kept] == 0.0).all()
    slow = flj.apply_masks(params.slow, flj.masks(state).fast)
    assert (np.asarray(slow["w"])[~kept] == 0.0).all() and (params.slow["w"] != 0).all()


def kernels(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


@pytest.mark.parametrize(
    "tx",
    [
        optax.masked(PRUNING, kernels),
        optax.masked(CHAIN, kernels),
        optax.partition({"p": PRUNING, "s": optax.sgd(0.1)}, {"w": "p", "b": "s"}),
        optax.masked(flj.fishleg_prune(MODEL, CUBIC), kernels),
        optax.partition(
            {"p": flj.fishleg_prune(MODEL, CUBIC), "s": optax.sgd(0.1)}, {"w": "p", "b": "s"}
        ),
    ],
    ids=["masked", "masked_chain", "partition", "masked_fishleg", "partition_fishleg"],
)
def test_masked_and_partition_are_refused_with_what_to_do_instead(tx):
    with pytest.raises(ValueError, match="choose the leaves to prune by prunable"):
        tx.init(initial())


def test_a_state_made_outside_of_masked_does_not_get_past_it_either():
    """As of a checkpoint that was written without it."""
    tx = optax.masked(PRUNING, kernels)
    state = optax.MaskedState(PRUNING.init(initial()))
    with pytest.raises(ValueError, match="choose the leaves to prune by prunable"):
        tx.update(initial(), state, initial(), batch=at(0, batches()))


def test_masked_inside_of_the_chain():
    outside = optax.chain(optax.masked(optax.sgd(0.02), kernels), PRUNING)
    params, state, _ = train(outside)
    assert is_pruned(params, state)
