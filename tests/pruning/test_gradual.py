"""Gradual pruning by itself: zeros, masks, compensation, what is not finite, what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fishleg_jax as flj
from fishleg_jax.pruning.masks.build import number_to_prune
from tests import dense
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
    initial,
    make_step,
    train,
    zeros,
)

OPTIMISERS = {
    "sgd": optax.sgd(0.02, momentum=0.9, nesterov=True),
    "adamw": optax.adamw(0.02, weight_decay=0.1),
    "lion": optax.lion(0.01),
}


PARAMS = initial()
BATCH = at(0, batches())


@pytest.mark.parametrize("name", OPTIMISERS)
def test_pruned_weights_are_zero_and_stay_it(name):
    """To the bit, over some hundred steps; masks only grow, and what is kept trains on."""
    data = jax.tree.map(lambda x: jnp.tile(x, (6, 1, 1)), batches())
    params, state, (path, masks) = train(optax.chain(OPTIMISERS[name], PRUNING), data=data)
    assert (zeros(masks)[29:] == ZEROS).all() and zeros(masks)[3] == 0
    assert not (masks["w"][1:] & ~masks["w"][:-1]).any()
    assert masks["b"].all()
    assert (np.asarray(path["w"])[~np.asarray(masks["w"])] == 0.0).all()
    assert flj.check(state).ok
    kept = np.asarray(flj.masks(state)["w"])
    assert (np.asarray(path["w"][-1])[kept] != np.asarray(path["w"][-2])[kept]).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
def test_bfloat16(dtype):
    """With updates of the optimiser in either dtype."""
    cast = optax.stateless(lambda u, _: jax.tree.map(lambda x: x.astype(dtype), u))
    params = initial(jnp.bfloat16)
    params, state, (path, masks) = train(optax.chain(optax.adamw(0.02), cast, PRUNING), params)
    assert params["w"].dtype == jnp.bfloat16 and params["b"].dtype == jnp.bfloat16
    assert (zeros(masks)[29:] == ZEROS).all()
    assert (np.asarray(path["w"], np.float32)[~np.asarray(masks["w"])] == 0.0).all()
    assert state[2].estimate.squares["w"].dtype == jnp.float32
    assert flj.check(state).ok


def test_one_compilation_for_all_steps_and_the_same_without():
    traces = []

    @jax.jit
    def step(carry, batch):
        traces.append(1)
        return make_step(CHAIN)(carry, batch)

    params, data = initial(), batches()
    carry = bare = params, CHAIN.init(params)
    _, _, (path, masks) = train(CHAIN)
    for i in range(STEPS):
        carry, _ = step(carry, at(i, data))
        np.testing.assert_allclose(carry[0]["w"], path["w"][i], rtol=1e-4, atol=1e-5)
        if i < 10:
            bare, _ = make_step(CHAIN)(bare, at(i, data))
            np.testing.assert_allclose(bare[0]["w"], path["w"][i], rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(flj.masks(bare[1])["w"], masks["w"][i])
    assert len(traces) == 1


def spd(size, seed=0):
    a = np.random.default_rng(seed).normal(size=(size, size))
    return jnp.asarray(np.linalg.inv(a @ a.T / size + 0.1 * np.eye(size)))


def one_update(compensation, sparsity=0.6, estimator=dense.STATED, params=None, model=None):
    """Weights after a step of the optimiser with a mask update in it, and the masks."""
    params = initial(jnp.float64) if params is None else params
    tx = flj.gradual_prune(
        *(estimator, sparsity),
        model=model,
        compensation=compensation,
        prunable="w",
        saliency="obs",
    )
    state = tx.init(params)
    state = state._replace(estimate=spd(15))
    updates = dense.random_like(jax.random.key(3), params, 0.1)
    data = at(0, batches(1, dtype=jnp.float64))
    out, state = jax.jit(tx.update)(updates, state, params, batch=data)
    moved = jax.tree.map(jnp.add, params, updates)
    return moved, optax.apply_updates(params, out), state, data


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_a_mask_update_is_a_stage_of_one_shot_pruning(x64, scale):
    """At p + u, in dense algebra: scores, the lowest of them, and the sum of corrections."""
    moved, params, state, _ = one_update(flj.compensation.independent(scale))
    inverse, w = np.asarray(spd(15)), dense.ravel(moved)
    scores = w**2 / (2 * np.diag(inverse))
    prunable = dense.ravel({"w": np.ones((4, 3)), "b": np.zeros(3)}).astype(bool)
    order = np.argsort(np.where(prunable, scores, np.inf))
    lost = np.zeros(15, bool)
    lost[order[: number_to_prune(0.6, 12)]] = True
    expected = w - scale * inverse @ np.where(lost, w / np.diag(inverse), 0)
    np.testing.assert_array_equal(dense.ravel(flj.masks(state)), ~lost)
    np.testing.assert_allclose(dense.ravel(params), np.where(lost, 0, expected), rtol=1e-12)
    assert (dense.ravel(params)[lost] == 0.0).all()


@pytest.mark.parametrize(
    "compensation",
    [
        flj.compensation.none(),
        flj.compensation.independent(first_order=True),
        flj.compensation.group(damping=0.1, tolerance=1e-12, iterations=40),
        flj.compensation.group(damping=1e-4, first_order=True, attempts=4),
    ],
    ids=["none", "checked", "group", "group_first_order"],
)
def test_compensations_are_those_of_one_shot_pruning(x64, compensation):
    """Which runs them on the host, where these are compiled into the step."""
    moved, params, state, data = one_update(compensation, model=MODEL)
    curvature = flj.curvature(MODEL, [data])
    old = jax.tree.map(lambda p: jnp.ones(p.shape, bool), moved)
    masks = flj.masks(state)
    delta, _ = compensation(moved, old, masks, curvature, dense.STATED, spd(15))
    expected = flj.apply_masks(jax.tree.map(jnp.add, moved, delta), masks)
    np.testing.assert_allclose(dense.ravel(params), dense.ravel(expected), rtol=1e-7, atol=1e-9)
    assert flj.check(state).sparsity == 7 / 12 and flj.check(state).ok


def test_the_model_is_the_estimators_unless_another_is_given(x64):
    compensation = flj.compensation.group(damping=0.1, iterations=10)
    given = one_update(compensation, model=MODEL)
    own = one_update(compensation, estimator=dense.STATED._replace(model=MODEL))
    np.testing.assert_array_equal(own[1]["w"], given[1]["w"])


def test_permuted_weights_give_permuted_masks():
    rows, columns = np.array([2, 0, 3, 1]), np.array([1, 2, 0])
    params, _, (_, masks) = train(CHAIN)
    start, (x, y) = initial(), batches()
    turned = {"w": start["w"][rows][:, columns], "b": start["b"][columns]}
    others, _, (_, other_masks) = train(CHAIN, turned, (x[..., rows], y[..., columns]))
    np.testing.assert_array_equal(other_masks["w"], masks["w"][:, rows][:, :, columns])
    np.testing.assert_allclose(others["w"], params["w"][rows][:, columns], rtol=1e-4, atol=1e-5)


def with_nan(data, *steps):
    x, y = data
    return x, y.at[jnp.array(steps)].set(jnp.nan)


def test_nan_in_a_batch_leaves_no_trace_but_a_count():
    """Neither in the estimate, nor in masks, nor in what the pruning makes of the updates."""
    tx = optax.chain(
        optax.stateless(lambda u, _: jax.tree.map(lambda x: jnp.nan_to_num(0.02 * -x), u)), PRUNING
    )
    bad = with_nan(batches(), 8, 17)
    params, state, (path, masks) = train(tx, data=bad)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((params, state[1].estimate)))
    assert (zeros(masks)[29:] == ZEROS).all()
    report = flj.check(state)
    assert (report.ok, report.failures, report.violations) == (False, 2, 0)
    assert "2 times a batch or a mask update was refused" in report.message
    # of the first, third, sixth ... step, until at the thirtieth there is nothing more to score
    assert int(state[1].assimilated) == 10 - 2
    assert int(state[1].estimate.count) == 4 * (10 - 2)  # gradients in each


def test_scores_that_are_not_finite_are_refused_until_they_are():
    """A step whose updates are NaN at a mask update: nothing pruned then, all of it at the next."""
    tx = flj.gradual_prune(MAGNITUDE, 0.5, mask_every=1)
    params, fine = initial(), jax.tree.map(jnp.zeros_like, initial())
    bad = {"w": fine["w"].at[1, 1].set(jnp.nan), "b": fine["b"]}
    out, state = tx.update(bad, tx.init(params), params)
    assert flj.masks(state)["w"].all() and flj.check(state)[:4] == (False, 0, 1, 1)
    np.testing.assert_array_equal(out["w"], bad["w"])  # what the optimiser did is its own affair
    out, state = tx.update(fine, state, params)
    assert zeros(flj.masks(state)) == 6 and flj.check(state)[:4] == (False, 0, 1, 0)


NEVER_READY = flj.inverse.diagonal(MODEL)._replace(ready=lambda state: jnp.array(False))
NAN_INVERSE = flj.InverseFisher(
    init=lambda params: jnp.zeros(()),
    update=lambda state, params, batch, key, mask=None: jnp.mean(batch[1]),
    multiply=lambda state, v, mask=None: jax.tree.map(lambda x: x * jnp.nan, v),
    diagonal=lambda state, params, mask=None: jax.tree.map(jnp.ones_like, params),
)


def test_a_compensation_that_is_not_finite_is_refused_with_its_masks():
    tx = flj.gradual_prune(NAN_INVERSE, 0.5, mask_every=1)
    params, data = initial(), at(0, batches())
    out, state = tx.update(params, tx.init(params), params, batch=data)
    np.testing.assert_array_equal(out["w"], params["w"])
    assert flj.masks(state)["w"].all() and flj.check(state).failures == 1


def test_an_estimate_that_would_be_spoiled_stays_as_it_was():
    """Though its update does not look whether the batch is finite."""
    tx = flj.gradual_prune(NAN_INVERSE, CUBIC, aux_every=1)
    params, (x, y) = initial(), at(0, batches())
    _, state = tx.update(params, tx.init(params), params, batch=(x, y))
    before = float(state.estimate)
    for i, bad in enumerate((y.at[0, 0].set(jnp.nan), jnp.full_like(y, 3e38))):  # one overflows
        _, state = tx.update(params, state, params, batch=(x, bad))
        assert before != 0 and float(state.estimate) == before
        assert flj.check(state).failures == i + 1


def test_gradients_that_an_estimate_leaves_out_are_told():
    """Those of a finite batch, too, by which the model overflows."""
    params, (x, y) = initial(), BATCH
    _, state = PRUNING.update(params, PRUNING.init(params), params, batch=(x.at[5].set(1e30), y))
    assert int(state.estimate.skipped) == 1 and flj.check(state).failures == 1
    assert bool(jnp.isfinite(state.estimate.squares["w"]).all())


def test_a_check_that_finds_no_step_refuses_the_mask_update():
    checked = flj.compensation.independent(check_step=True)
    tx = flj.gradual_prune(MAGNITUDE, 0.5, model=MODEL, compensation=checked)
    params, (x, y) = initial(), BATCH
    still = jax.tree.map(jnp.zeros_like, params)
    _, state = tx.update(still, tx.init(params), params, batch=(x, y.at[0].set(jnp.nan)))
    assert flj.masks(state)["w"].all() and flj.check(state).failures == 1
    _, state = tx.update(still, state, params, batch=(x, y))
    assert zeros(flj.masks(state)) == 6 and flj.check(state).failures == 1


def test_a_sparsity_that_is_none_is_counted():
    # at steps at which nobody looks beforehand
    tx = flj.gradual_prune(MAGNITUDE, lambda step: jnp.where((step < 3) | (step > 50), 0.5, 1.5))
    state = train(tx)[1]
    report = flj.check(state)
    assert report.failures == STEPS - 2 and "sparsity outside [0, 1)" in report.message


def test_not_last_in_the_chain_is_told():
    tx = optax.chain(PRUNING, optax.sgd(0.02))
    _, state, _ = train(tx)
    report = flj.check(state)
    assert not report.ok and report.violations > 0
    assert "must be last in the chain" in report.message
    assert report.sparsity == ZEROS / 12


@functools.cache
def fishleg_run():
    """Two phases of training with FishLeg, and the state between them."""
    tx = optax.chain(
        optax.adam(0.01), flj.fishleg_prune(MODEL, CUBIC, aux_every=2, mask_every=5, damping=0.01)
    )
    data = jax.tree.map(lambda x: jnp.tile(x, (2, 1, 1)), batches())
    first = train(tx, data=at(slice(STEPS), data))
    second = train(tx, first[0], at(slice(STEPS, None), data), first[1])
    return first, second


def test_fishleg_is_carried_on_and_refined():
    """It waits for its start, is refined at every other step, and prunes by what it has learned."""
    (_, between, (_, masks)), (params, state, (path, later)) = fishleg_run()
    # ready after 32 batches, when the schedule is over: at once, and no more is learned then
    assert zeros(masks)[30] == 0 and zeros(masks)[31] == ZEROS
    assert int(between[1].estimate.count) == 32 and int(between[1].assimilated) == 32
    assert flj.check(state).ok and (zeros(later) == ZEROS).all()
    assert flj.sparsity(params) == ZEROS / 12


def test_fishleg_refines_until_the_last_weight_has_gone():
    schedule = flj.schedules.cubic(0.7, begin=40, end=100)
    tx = optax.chain(
        optax.adam(0.01),
        flj.fishleg_prune(
            MODEL, schedule, aux_every=4, mask_every=10, aux_optimizer=optax.adam(1e-2)
        ),
    )
    data = jax.tree.map(lambda x: jnp.tile(x, (3, 1, 1)), batches())
    _, state, (_, masks) = train(tx, data=data)
    # the start, and learning at every fourth step before the hundredth, where nothing is left to do
    assert int(state[1].assimilated) == 32 + len(range(36, 100, 4))
    assert 0 < float(state[1].estimate.relative_residual) < 1
    coordinates = jax.tree.leaves(state[1].estimate.average)
    assert any((x != 0).any() for x in coordinates)
    assert (zeros(masks)[99:] == ZEROS).all() and flj.check(state).ok


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sparsity": 1.0}, "sparsity must be a number in \\[0, 1\\), got 1.0"),
        ({"sparsity": "0.5"}, "sparsity must be a number in \\[0, 1\\) or a function of the step"),
        ({"estimator": MODEL}, "estimator must be an InverseFisher"),
        ({"scope": "leaf"}, "scope must be one of global, layer, erk or a mapping"),
        ({"compensation": flj.compensation.group}, "compensation must be one of flj.compensation"),
        ({"compensation": "group"}, "compensation must be one of flj.compensation, .* got 'group'"),
        ({"aux_every": 0}, "aux_every must be a whole number of steps, at least 1, got 0"),
        ({"mask_every": 2.5}, "mask_every must be a whole number of steps, at least 1, got 2.5"),
        ({"regrow": 1.5}, "regrow must be a number in \\[0, 1\\] or a function, got 1.5"),
        ({"mask_every": None}, "mask_every must be a whole number of steps, at least 1, got None"),
        ({"prunable": 5}, "prunable must be regular expressions over key paths"),
        ({"seed": 1.5}, "seed must be a whole number in .*, got 1.5"),
        ({"seed": 2**70}, "seed must be a whole number in .*, got 1180591620717411303424"),
        (
            {"axis_name": 3},
            "axis_name must be the name of an axis, a tuple of names or None, got 3",
        ),
        ({"model": 3}, "model must be a fishleg_jax.Model, got 3"),
        ({"renew": 101}, "renew must be at most mask_every, 100, got 101"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        flj.gradual_prune(**{"estimator": DIAGONAL, "sparsity": 0.5} | arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"renew": 31}, "renew must be at least 32, .* got 31"),
        ({"damping": 0.1, "estimator": DIAGONAL}, "damping must be None if an estim"),
        (
            {"aux_optimizer": optax.sgd(0.1), "estimator": DIAGONAL},
            "aux_optimizer must be None if an estimator is given",
        ),
    ],
)
def test_what_does_not_go_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        flj.fishleg_prune(MODEL, 0.5, **arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch": 3}, "batch must be a tuple \\(inputs, targets\\) .*, got int"),
        ({"batch": (jnp.ones((4, 4)),)}, "batch must be a tuple .*, got tuple of length 1"),
        (
            {"batch": (jnp.ones((4, 4)), jnp.ones((3, 3)))},
            "the same number of examples, got \\[3, 4\\]",
        ),
        ({"assimilate": "yes"}, "assimilate must be None, True, False or traced, got 'yes'"),
        ({"assimilate": 1}, "assimilate must be None, True, False or traced, got 1"),
        (
            {"assimilate": True, "hold": True},
            "assimilate must be None or False if hold is True",
        ),
        ({"grad": 3}, "grad must have the structure of the parameters"),
        ({"grad": {"w": jnp.ones(4), "b": jnp.ones(3)}}, "grad: 'w' must have shape \\(4, 3\\)"),
    ],
)
def test_bad_arguments_of_a_step(arguments, message):
    with pytest.raises(ValueError, match=message):
        PRUNING.update(PARAMS, PRUNING.init(PARAMS), PARAMS, **{"batch": BATCH} | arguments)


def test_updates_that_are_not_like_the_weights():
    with pytest.raises(ValueError, match="updates: 'w' must have shape"):
        PRUNING.update({**PARAMS, "w": jnp.ones(2)}, PRUNING.init(PARAMS), PARAMS, batch=BATCH)


def test_more_weights_than_can_be_counted_are_refused():
    pruning = flj.gradual_prune(MAGNITUDE, 0.5)
    with pytest.raises(ValueError, match="at most 2³¹ - 1 weights can share .* got 3500000000"):
        jax.eval_shape(pruning.init, {"w": jax.ShapeDtypeStruct((70000, 50000), jnp.float32)})


def raising(step):
    raise RuntimeError(f"no sparsity at {type(step).__name__}\nsecond line")


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda step: jnp.full(3, 0.5), "an array of shape \\(3,\\) and dtype float32"),
        (lambda step: jnp.full((1,), 0.5), "an array of shape \\(1,\\) and dtype float32"),
        (lambda step: [0.5], "returned \\[0.5\\]"),
        (lambda step: step > 3, "an array of shape \\(\\) and dtype bool"),
        (lambda step: step + 0.5j, "an array of shape \\(\\) and dtype complex64"),
        (lambda step: 0.5j, "returned 0.5j"),
        (lambda step: True, "returned True"),
        (lambda step: "0.5", "returned '0.5'"),
        (lambda step: None, "returned None"),
        (raising, "raised RuntimeError: no sparsity at DynamicJaxprTracer"),
        (lambda: 0.5, "raised TypeError: .* takes 0 positional arguments"),
        (lambda step: 0.5 if step > 3 else 0.0, "jnp.where .* raised TracerBoolConversionError"),
    ],
    ids=range(12),
)
@pytest.mark.parametrize("name", ["sparsity", "regrow"])
def test_functions_of_the_step_that_return_no_number(name, function, message):
    """Are told before a step is compiled."""
    with pytest.raises(
        ValueError, match=f"^{name} must return a number at every step .*{message}"
    ) as caught:
        flj.gradual_prune(**{"estimator": MAGNITUDE, "sparsity": 0.5} | {name: function})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sparsity", [np.array(1.5), np.array("0.5"), jnp.array(False)])
def test_arrays_that_are_no_sparsity(sparsity):
    with pytest.raises(ValueError, match="sparsity must be"):
        flj.gradual_prune(MAGNITUDE, sparsity)


def test_functions_of_the_step_that_return_numbers_of_python_and_numpy():
    for value in (0.5, 0, np.float64(0.5), np.array(0.5), jnp.float32(0.5)):
        function = lambda step, value=value: value
        state = flj.gradual_prune(MAGNITUDE, function, regrow=function).init(PARAMS)
        assert flj.check(state).ok


@pytest.mark.parametrize(
    "params, message",
    [
        ({"w": jnp.ones(3)}, "prunable selects no leaf"),
        ({"w": jnp.ones((2, 2), int)}, "params: 'w' must be a floating-point array"),
        ({"w": jnp.full((2, 2), jnp.nan)}, "params: 'w' has NaN"),
        ({}, "params has no leaves"),
        (None, "params must be passed to update, got None"),
    ],
    ids=str,
)
def test_bad_weights(params, message):
    with pytest.raises(ValueError, match=message):
        PRUNING.init(params)


def test_what_is_not_handed_to_update():
    state = PRUNING.init(PARAMS)
    with pytest.raises(ValueError, match="params must be passed to update, got None"):
        PRUNING.update(PARAMS, state, batch=BATCH)
    with pytest.raises(ValueError, match="batch must be passed to update"):
        PRUNING.update(PARAMS, state, PARAMS)
    checked = flj.gradual_prune(
        MAGNITUDE, 0.5, compensation=flj.compensation.independent(check_step=True)
    )
    with pytest.raises(ValueError, match="curvature is needed .* for the check of the step"):
        checked.update(PARAMS, checked.init(PARAMS), PARAMS)


def test_states_without_a_pruning_and_with_two():
    for read in (flj.masks, flj.check):
        with pytest.raises(ValueError, match="of one gradual pruning .*, found 0 in tuple"):
            read(optax.adam(0.1).init(PARAMS))
        with pytest.raises(ValueError, match="found 2 in tuple"):
            read((PRUNING.init(PARAMS), PRUNING.init(PARAMS)))
    with pytest.raises(ValueError, match="masks must have the structure"):
        flj.apply_masks(PARAMS, optax.adam(0.1).init(PARAMS))


def test_states_are_arrays_that_share_no_memory():
    """They go through jit, checkpoints, and donation."""
    state = jax.jit(PRUNING.init)(PARAMS)
    leaves = jax.tree.leaves(state)
    assert all(isinstance(x, jax.Array) for x in leaves)
    assert state.key.dtype == jnp.uint32
    update = jax.jit(PRUNING.update, donate_argnums=1)
    for _ in range(2):
        _, state = update(PARAMS, state, PARAMS, batch=BATCH)
    assert int(state.count) == 2


@pytest.mark.parametrize("kind", ["diagonal", pytest.param("woodfisher", marks=pytest.mark.slow)])
def test_an_estimate_that_is_renewed_is_of_the_last_batches_alone(kind):
    """Before every step that `mask_every` divides: gradual WoodFisher, which is made for that."""
    estimator = DIAGONAL
    if kind == "woodfisher":  # of 12 gradients: later ones it would leave out
        estimator = flj.inverse.woodfisher(MODEL, 0.1, gradients=12, examples_per_gradient=4)
    pruning = flj.gradual_prune(estimator, CUBIC, mask_every=10, renew=3)
    data = batches()
    params, state, (path, masks) = train(optax.chain(optax.sgd(0.01), pruning), data=data)
    # up to the thirtieth step, where the schedule is over
    start = at(26, path)
    expected, update = estimator.init(params), jax.jit(estimator.update)
    for i in (27, 28, 29):
        expected = update(expected, at(i - 1, path), at(i, data), None, at(28, masks))
    found = estimator.diagonal(state[1].estimate, start)
    kept = np.asarray(masks["w"][28])
    wanted = estimator.diagonal(expected, start)
    np.testing.assert_allclose(np.where(kept, found["w"], 0), np.where(kept, wanted["w"], 0), 1e-4)
    assert int(state[1].assimilated) == 3 and int(state[1].estimate.count) == 12
    assert (zeros(masks)[29:] == ZEROS).all() and flj.check(state).ok


@pytest.mark.parametrize(
    "mask_every, renew, batches_seen", [(10, 3, 3), (40, 5, 5), (20, 8, 15), (7, 7, 13)]
)
def test_the_end_of_a_schedule_has_an_estimate_of_its_own(mask_every, renew, batches_seen):
    """Wherever it lies between two steps that `mask_every` divides; or of both where they meet."""
    end = 27
    linear = lambda step: 0.75 * jnp.clip((step - 5) / (end - 5), 0, 1)
    pruning = flj.gradual_prune(DIAGONAL, linear, mask_every=mask_every, renew=renew)
    tx = optax.chain(optax.sgd(0.01), pruning)
    _, state, (_, masks) = train(tx, data=at(slice(end), batches()))
    assert zeros(masks)[-1] == 9 and zeros(masks)[-2] < 9
    assert int(state[1].assimilated) == batches_seen and int(state[1].latest) == end


def test_a_number_waits_for_all_batches_of_a_renewed_estimate():
    pruning = flj.gradual_prune(DIAGONAL, 0.5, mask_every=40, renew=6)
    _, state, (_, masks) = train(optax.chain(optax.sgd(0.01), pruning))
    assert zeros(masks).tolist() == [0] * 5 + [6] * 35
    assert int(state[1].assimilated) == 6  # and no more of what nothing will be made


def test_a_target_that_was_not_reached_is_told():
    tx = flj.gradual_prune(NEVER_READY, 0.5, mask_every=1)
    params = initial()
    state = tx.init(params)
    _, state = tx.update(params, state, params, batch=at(0, batches()))
    told = flj.check(state)
    assert (told.sparsity, told.asked) == (0, 0.5)
    assert not told.ok and "requested 0.5 is not reached: 1 times" in told.message
    with pytest.raises(ValueError, match="state must be the concrete state of one pruning"):
        flj.check(jax.tree.map(lambda x: jnp.stack([x, x]), state))


def checks(tx, data):
    """What is told after every step of an optimiser that does nothing."""
    still = jax.tree.map(jnp.zeros_like, PARAMS)

    def step(carry, batch):
        params, state = carry
        updates, state = tx.update(still, state, params, batch=batch)
        params = optax.apply_updates(params, updates)
        return (params, state), state._replace(masks=None, estimate=None)

    _, states = jax.jit(lambda c: jax.lax.scan(step, c, data))((PARAMS, tx.init(PARAMS)))
    return [flj.check(at(i, states)) for i in range(len(data[0]))]


def ready_after(number):
    return DIAGONAL._replace(ready=lambda state: state.count >= 4 * number)  # gradients in a batch


def test_a_mask_update_that_is_overdue_is_told_until_it_is_made():
    """Due at every fourth step; weights that wait for the next one are no fault."""
    told = checks(flj.gradual_prune(ready_after(17), CUBIC, mask_every=4), batches())
    assert [t.overdue for t in told] == [0] * 7 + [1] * 4 + [2] * 4 + [3] * 4 + [0] * 21
    assert all(t.ok == (t.overdue == 0) for t in told)
    waiting = told[22]
    assert (
        waiting.asked > waiting.sparsity + 1 / 12
        and "the next mask update will prune" in waiting.message
    )
    assert told[-1].sparsity == ZEROS / 12 and "requested" not in told[-1].message


def test_fishleg_that_has_not_seen_its_first_batches_is_told():
    schedule = flj.schedules.cubic(0.7, begin=5, end=20)
    told = checks(flj.fishleg_prune(MODEL, schedule), at(slice(33), batches()))
    assert [t.ok for t in told] == [True] * 19 + [False] * 12 + [True] * 2
    assert "(after 31 batches)" in told[30].message and told[31].sparsity == ZEROS / 12


@pytest.mark.parametrize("spoiled", [False, True], ids=["too_few_batches", "refused_batches"])
def test_a_schedule_that_ends_before_the_estimate_is_ready_is_not_ok(spoiled):
    data = with_nan(batches(), *range(STEPS)) if spoiled else batches()
    tx = flj.gradual_prune(DIAGONAL if spoiled else ready_after(41), CUBIC, mask_every=4)
    told = checks(tx, data)
    assert [t.ok for t in told[:8]] == [not spoiled] * 7 + [False]
    # at the regular ones, and from the end of the schedule at every step
    assert told[-1].overdue == len(range(8, 30, 4)) + len(range(30, STEPS + 1))
    assert (told[-1].ok, told[-1].sparsity) == (False, 0) and (told[-1].failures > 0) == spoiled
    seen = 0 if spoiled else STEPS
    assert f"was not ready (after {seen} batches)" in told[-1].message


def test_holding_where_the_schedule_ends_is_told():
    update = jax.jit(PRUNING.update, static_argnames="hold")
    still = jax.tree.map(jnp.zeros_like, PARAMS)
    params, state, told = PARAMS, PRUNING.init(PARAMS), []
    for i in range(STEPS):
        hold = 20 <= i < STEPS - 1
        updates, state = update(still, state, params, batch=BATCH, hold=hold)
        params = optax.apply_updates(params, updates)
        told.append(flj.check(state))
    assert all(t.ok for t in told[:23])  # the last weight is due at the 24th step, again at others
    assert [t.overdue for t in told[23:]] == [1, 1, 1, 1, 2, 2, *range(3, 13), 0]
    assert not any(t.ok for t in told[23:-1]) and "hold=True" in told[-2].message
    assert told[22].asked < told[29].asked == np.float32(0.7)
    assert told[-1].ok and told[-1].sparsity == ZEROS / 12
