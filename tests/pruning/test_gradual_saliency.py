"""Scores of gradual pruning by name, by a function, and chosen by the loss on the step's batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fishleg_jax as flj
from fishleg_jax.inverse.base import with_damping
from fishleg_jax.pruning.gradual import choice
from fishleg_jax.pruning.scores import scores_by
from tests.pruning.training import (
    DIAGONAL,
    MAGNITUDE,
    MODEL,
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

CUBIC = flj.schedules.cubic(0.7, begin=5, end=30)
DATA = batches()
BATCH = at(0, DATA)


def cube(params, masks, estimator, state, gradient):
    assert gradient is None
    diagonal = estimator.diagonal(state, params, masks)
    return jax.tree.map(lambda w, q: jnp.abs(w) ** 3 * q, params, diagonal)


def one_step(saliency, compensation=None, batch=BATCH, params=None, sparsity=0.5, **options):
    """The state before and after the first step, which assimilates its batch and prunes."""
    pruning = flj.gradual_prune(
        options.pop("estimator", DIAGONAL),
        sparsity,
        model=MODEL,
        saliency=saliency,
        compensation=compensation,
        prunable="w",
        **options,
    )
    params = initial() if params is None else params
    updates = jax.tree.map(lambda x: 0.1 * x + 0.01, params)
    out, state = jax.jit(pruning.update)(updates, pruning.init(params), params, batch=batch)
    target = jax.tree.map(jnp.add, params, updates)
    return target, optax.apply_updates(params, out), state


@pytest.mark.parametrize("saliency", ["obs", "obd", "mixture", "magnitude", cube])
def test_masks_are_those_of_the_scores_where_the_optimiser_would_go(saliency):
    target, params, state = one_step(saliency, flj.compensation.none())
    masks = jax.tree.map(jnp.ones_like, state.masks)
    scores = scores_by(saliency, DIAGONAL, state.estimate, target, masks)
    expected = flj.make_masks(scores, 0.5, prunable="w")
    np.testing.assert_array_equal(state.masks["w"], expected["w"])
    np.testing.assert_array_equal(params["w"] == 0, ~expected["w"])
    assert state.chosen is None


def test_names_give_different_masks():
    """So that the test above can fail."""
    found = {str(one_step(name)[2].masks["w"].tolist()) for name in ("obs", "magnitude", cube)}
    assert len(found) == 3


def losses_of(candidates, target, state, batch=BATCH, sparsity=0.5):
    """Loss of every candidate, made by hand on the host."""
    found = []
    full = jax.tree.map(jnp.ones_like, state.masks)
    for candidate in candidates:
        estimate = with_damping(state.estimate, state.estimate.damping * candidate.factor)
        scores = scores_by(candidate.saliency, DIAGONAL, estimate, target, full)
        masks = flj.make_masks(scores, sparsity, prunable="w")
        maker = flj.compensation.independent(float(candidate.compensated))
        delta, _ = maker(target, full, masks, None, DIAGONAL, estimate)
        found.append((flj.losses(MODEL, jax.tree.map(jnp.add, target, delta), batch), delta, masks))
    return found


def test_auto_takes_the_candidate_with_the_lowest_loss():
    """On 256 examples of a linear model, where one candidate is far below magnitude."""
    keys = jax.random.split(jax.random.key(5), 3)
    x = jax.random.normal(keys[0], (256, 4)) * jnp.array([0.01, 0.1, 3.0, 10.0])
    y = x @ jnp.array([[3.0] * 3, [2.0] * 3, [1.0] * 3, [0.5] * 3])
    batch = x, y + 0.01 * jax.random.normal(keys[1], y.shape)
    params = {"w": jnp.array([[3.0], [2.0], [1.0], [0.5]]) * jnp.ones(3), "b": jnp.zeros(3)}
    target, after, state = one_step("auto", batch=batch, params=params)
    names = choice.candidates(DIAGONAL, state.estimate)
    found = losses_of(names, target, state, batch)
    means = [float(each[0].mean()) for each in found]
    best = int(np.argmin(means))
    assert means[best] < 0.1 * means[0]
    won = [name for name, number in state.chosen.items() if number]
    assert len(won) == 1 and sum(map(int, state.chosen.values())) == 1
    winner = [str(name) for name in names].index(won[0])
    # equal masks make equal losses: the first of these wins
    assert means[winner] == pytest.approx(means[best], rel=1e-3)
    np.testing.assert_array_equal(state.masks["w"], found[winner][2]["w"])
    expected = jax.tree.map(jnp.add, target, found[winner][1])
    np.testing.assert_allclose(after["w"], expected["w"], rtol=1e-5, atol=1e-6)


def test_a_model_in_training_mode_decides_where_there_is_one():
    """As above; but in training all inputs count the same, and small weights the least."""
    keys = jax.random.split(jax.random.key(5), 3)
    scales = jnp.array([0.01, 0.1, 3.0, 10.0])
    x = jax.random.normal(keys[0], (256, 4)) * scales
    params = {"w": jnp.array([[3.0], [2.0], [1.0], [0.5]]) * jnp.ones(3), "b": jnp.zeros(3)}
    batch = x, x @ params["w"] + 0.01 * jax.random.normal(keys[1], (256, 3))

    def predict(p, x):
        return x @ params["w"] + MODEL.predict(p, x / scales) - MODEL.predict(params, x / scales)

    in_training = flj.Model(predict, MODEL.likelihood)
    small = np.array([[True], [True], [False], [False]]) * np.ones(3, bool)
    for model, kept in ((None, ~small), (in_training, small)):
        state = one_step("auto", batch=batch, params=params, training_model=model)[2]
        np.testing.assert_array_equal(state.masks["w"], kept)
    with pytest.raises(ValueError, match="training_model must be a fishleg_jax.Model, got a func"):
        one_step("auto", training_model=predict)
    narrow = flj.Model(lambda p, x: predict(p, x)[:, :2], MODEL.likelihood)
    pruning = flj.gradual_prune(DIAGONAL, 0.5, model=MODEL, training_model=narrow, prunable="w")
    with pytest.raises(ValueError, match="batch, under training_model, .* got"):
        pruning.update(params, pruning.init(params), params, batch=batch)


@pytest.mark.parametrize("stacked", [False, True])
def test_auto_prunes_each_leaf_as_much_as_magnitude_would(stacked):
    """Of each layer, in a stacked leaf, though scores and magnitudes disagree about the weights."""
    keys = jax.random.split(jax.random.key(6), 4)
    params = {
        "w": jax.random.normal(keys[0], (2, 4, 4)) * jnp.array([1.0, 0.3])[:, None, None],
        "v": jax.random.normal(keys[1], (4, 3)),
    }

    def predict(params, x):
        for layer in params["w"]:
            x = x @ layer
        return x @ params["v"]

    x = jax.random.normal(keys[2], (256, 4)) * jnp.array([0.01, 0.1, 3.0, 10.0])
    batch = x, predict(params, x) + 0.01 * jax.random.normal(keys[3], (256, 3))
    model = flj.Model(predict, flj.likelihoods.gaussian())
    leaves = flj.Leaves(stacked="w" if stacked else None)
    pruning = flj.gradual_prune(flj.inverse.diagonal(model), 0.5, model=model, prunable=leaves)
    state = pruning.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = jax.jit(pruning.update)(zeros, state, params, batch=batch)[1]

    squares = jax.tree.map(lambda w: w**2, params)
    expected = flj.make_masks(squares, 0.5)
    axes = {"w": (1, 2) if stacked else None, "v": None}
    for name in expected:
        counts = [(~masks[name]).sum(axes[name]) for masks in (state.masks, expected)]
        np.testing.assert_array_equal(*counts)
    # so that this can fail: other weights have gone
    assert any(bool(jnp.any(state.masks[name] != expected[name])) for name in params)


def test_magnitude_stays_unless_another_is_better_by_the_margin():
    values = jnp.array([1.0, 1.2, 0.8, 1.1])

    def choose(*others):
        table = jnp.stack([values, *others])
        tried = jnp.zeros(())  # the weight names the candidate whose losses it has

        def attempt(index):
            deltas = jnp.stack([index, index]).astype(jnp.float32)
            return choice.Attempt(jnp.array(True), deltas, jnp.array([True, False]))

        each = lambda w: table[w.astype(int)]  # noqa: E731
        number = len(table)
        return int(choice.lowest(attempt, number, each, tried, jnp.array(True), None).index)

    noisy = values - jnp.array([0.5, -0.4, 0.3, -0.2])  # 0.05 lower, standard error 0.21
    assert noisy.mean() < values.mean() and choose(noisy) == 0
    assert choose(values - jnp.array([0.05, 0.04, 0.06, 0.05])) == 2
    assert choose(values - 0.05 * jnp.array([1.0, 1.0, jnp.nan, 1.0])) == 0
    assert choose(jnp.full(4, jnp.nan)) == 0 and choose(jnp.full(4, -jnp.inf)) == 0
    # each is compared with magnitude, and then the lowest mean counts
    clear, lower = values - jnp.array([0.05, 0.04, 0.06, 0.05]), values - 0.06
    lower += jnp.array([0.02, -0.02, 0.02, -0.02])  # below magnitude for certain, not below `clear`
    assert choose(clear, lower) == 4 and choose(lower, clear) == 2
    assert choose(clear, noisy - 0.1) == 2


def test_a_candidate_whose_numbers_are_not_finite_never_wins():
    broken = DIAGONAL._replace(
        diagonal=lambda state, params, mask=None: jax.tree.map(lambda w: w * jnp.nan, params)
    )
    _, params, state = one_step("auto", estimator=broken)
    assert all(int(n) == 0 for name, n in state.chosen.items() if "obs" in name)
    assert sum(map(int, state.chosen.values())) == 1
    assert int((params["w"] == 0).sum()) == 6 and int(state.failures) == 0


def test_a_batch_that_is_not_finite_extends_no_masks():
    tx = flj.gradual_prune(DIAGONAL, 0.5, model=MODEL, saliency="auto", mask_every=1)
    params, bad = initial(), (BATCH[0], BATCH[1].at[0, 0].set(jnp.nan))
    zero = jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(tx.update)
    state = tx.init(params)
    estimate = update(zero, state, params, batch=BATCH)[1].estimate
    out, state = update(zero, state._replace(estimate=estimate, assimilated=1), params, batch=bad)
    assert int(state.pruned.sum()) == 0 and bool(state.masks["w"].all())
    assert not flj.check(state).ok and not any(map(int, state.chosen.values()))
    _, state = update(out, state, params, batch=BATCH)
    assert int(state.pruned.sum()) == 6 and sum(map(int, state.chosen.values())) == 1


def test_unlabelled_batches_fall_back_to_obs_scores():
    sampled = flj.inverse.diagonal(MODEL, 0.1)
    batch = BATCH[0], None
    _, auto, state = one_step("auto", batch=batch, estimator=sampled)
    _, obs, _ = one_step("obs", batch=batch, estimator=sampled)
    np.testing.assert_array_equal(auto["w"], obs["w"])
    assert not any(map(int, state.chosen.values()))


def test_auto_compiles_once_and_prunes_as_a_scan_does():
    tx = optax.chain(
        optax.sgd(0.02),
        flj.gradual_prune(
            *(DIAGONAL, CUBIC), model=MODEL, aux_every=3, mask_every=4, saliency="auto"
        ),
    )
    traces = []

    @jax.jit
    def step(carry, batch):
        traces.append(1)
        return make_step(tx)(carry, batch)

    carry = initial(), tx.init(initial())
    for i in range(STEPS):
        carry, _ = step(carry, at(i, DATA))
    assert len(traces) == 1
    params, state, (path, masks) = train(tx)
    assert (zeros(masks)[29:] == ZEROS).all() and flj.check(state).ok
    assert not (masks["w"][1:] & ~masks["w"][:-1]).any()
    assert (np.asarray(path["w"])[~np.asarray(masks["w"])] == 0.0).all()
    np.testing.assert_array_equal(flj.masks(carry[1])["w"], flj.masks(state)["w"])
    rises = int((np.diff(np.asarray(zeros(masks)), prepend=0) > 0).sum())
    assert sum(map(int, state[1].chosen.values())) == rises
    np.testing.assert_array_equal(carry[0]["w"] == 0, params["w"] == 0)


@pytest.mark.parametrize("saliency", ["auto", "obd", "magnitude"])
@pytest.mark.parametrize("estimator", [MAGNITUDE, DIAGONAL], ids=["identity", "diagonal"])
def test_regrowth_and_bfloat16(saliency, estimator):
    if estimator is MAGNITUDE and saliency == "obd":
        pytest.skip("the identity has no Fisher diagonal")
    tx = optax.chain(
        optax.sgd(0.02),
        flj.gradual_prune(
            estimator, CUBIC, model=MODEL, aux_every=3, mask_every=4, regrow=0.3, saliency=saliency
        ),
    )
    params, state, (_, masks) = train(tx, initial(jnp.bfloat16))
    assert (zeros(masks)[29:] == ZEROS).all() and flj.check(state).ok
    assert params["w"].dtype == jnp.bfloat16


def test_auto_over_an_axis_is_auto_on_the_whole_batch():
    def run(axis_name, data):
        tx = optax.chain(
            optax.sgd(0.02),
            flj.gradual_prune(
                *(DIAGONAL, CUBIC),
                model=MODEL,
                aux_every=3,
                mask_every=4,
                saliency="auto",
                axis_name=axis_name,
            ),
        )

        def step(carry, batch):
            params, state = carry
            grads = gradient(params, batch)
            grads = grads if axis_name is None else jax.lax.pmean(grads, axis_name)
            updates, state = tx.update(grads, state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (initial(), tx.init(initial())), data)[0]

    whole = jax.jit(lambda d: run(None, d))(DATA)
    halves = jax.tree.map(lambda x: x.reshape(STEPS, 2, -1, x.shape[-1]).swapaxes(0, 1), DATA)
    both = jax.jit(jax.vmap(lambda d: run("devices", d), axis_name="devices"))(halves)
    np.testing.assert_array_equal(both[1][1].masks["w"][0], both[1][1].masks["w"][1])
    np.testing.assert_array_equal(both[1][1].masks["w"][0], whole[1][1].masks["w"])
    np.testing.assert_allclose(both[0]["w"][0], whole[0]["w"], rtol=2e-4, atol=1e-5)
    for name, number in whole[1][1].chosen.items():
        assert int(both[1][1].chosen[name][0]) == int(number)


@pytest.mark.parametrize("saliency", ["fisher", 3, None, lambda params: params])
def test_an_invalid_saliency_is_refused_at_the_door(saliency):
    with pytest.raises(ValueError, match="saliency"):
        flj.gradual_prune(DIAGONAL, 0.5, saliency=saliency)
    with pytest.raises(ValueError, match="saliency"):
        flj.fishleg_prune(MODEL, 0.5, saliency=saliency)


def test_an_estimator_without_a_fisher_diagonal_is_refused():
    with pytest.raises(ValueError, match="fisher_diagonal"):
        flj.gradual_prune(MAGNITUDE, 0.5, saliency="obd")
