"""How many weights a schedule asks for, and that gradual pruning ends with exactly as many."""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fishleg_jax as flj
from fishleg_jax.pruning.gradual.counting import floor_share, request_at
from tests.pruning.training import MAGNITUDE

WEIGHTS = [1, 12, 100, 32_360, 269_824, 999_999, 1_000_000, 25_557_032, 2**31 - 1]
STEPS = 60


@functools.cache
def compiled_share(weights):
    return jax.jit(lambda s: floor_share(s, weights))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 999_999), st.sampled_from(WEIGHTS))
def test_traced_sparsities_of_six_decimals_are_floored_in_decimal(millionths, weights):
    """In float32, where the product itself has errors of hundreds."""
    found = compiled_share(weights)(jnp.float32(millionths / 1e6))
    assert int(found) == millionths * weights // 1_000_000


def test_a_traced_sparsity_never_prunes_all():
    assert int(compiled_share(100)(jnp.float32(0.9999999))) == 99


@pytest.mark.parametrize("final", [0.0, 0.29, 0.9, 0.95, 1 / 3])
def test_cubic_is_that_of_zhu_and_gupta(final):
    schedule = flj.schedules.cubic(final, begin=10, end=50, initial=final / 2)
    steps = np.arange(70)
    part = np.clip((steps - 10) / 40, 0, 1)
    expected = np.where(steps < 10, 0, final - final / 2 * (1 - part) ** 3)
    np.testing.assert_allclose(jax.vmap(schedule)(steps), expected, atol=1e-7)
    assert jnp.all(jax.vmap(schedule)(jnp.arange(50, 70)) == jnp.float32(final))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((1.0, 0, 10), "final must be a number in \\[0, 1\\), got 1.0"),
        ((0.5, -1, 10), "begin must be a step, an integer of at least 0, got -1"),
        ((0.5, 0, 10.0), "end must be a step"),
        ((0.5, 10, 10), "end must be after begin, 10, got 10"),
        ((0.5, 0, 10, 0.6), "initial must be a number from 0 to the final sparsity, 0.5, got 0.6"),
    ],
    ids=str,
)
def test_bad_schedules(arguments, message):
    with pytest.raises(ValueError, match=message):
        flj.schedules.cubic(*arguments)


class Traced:
    """A cubic schedule between steps that are traced."""

    def __init__(self, final, begin, end, known):
        self.begin, self.end, self.target = begin, end, final
        if known:
            self.final = final

    def __call__(self, step):
        part = jnp.clip((step - self.begin) / (self.end - self.begin), 0, 1)
        return jnp.where(step >= self.end, self.target, self.target * (1 - (1 - part) ** 3))


PARAMS = {"a": jnp.ones((10, 10)), "b": jnp.ones((3, 9))}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def pruned_at(final, known, scope, begin, end, mask_every):
    """How many weights of either leaf are pruned after every step."""
    schedule = Traced(final, begin, end, known)
    tx = flj.gradual_prune(MAGNITUDE, schedule, mask_every=mask_every, scope=scope)

    def step(state, key):
        updates = flj.likelihoods.gaussian().sample(key, PARAMS["a"])
        updates = {"a": updates, "b": PARAMS["b"]}
        _, state = tx.update(updates, state, PARAMS)
        return state, jnp.stack([(~m).sum() for m in flj.masks(state).values()])

    return jax.lax.scan(step, tx.init(PARAMS), jax.random.split(jax.random.key(0), STEPS))[1]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(
        [
            (0.29, True, "global"),
            (0.95, True, "layer"),
            (0.95, False, "global"),
            (0.29, False, "layer"),
        ]
    ),
    st.integers(0, STEPS - 2),
    st.integers(1, STEPS),
    st.integers(1, 2 * STEPS),
)
def test_at_the_end_of_the_schedule_it_is_exactly_the_target(kind, begin, length, every):
    """Whatever the intervals, and not a step later; before that at their multiples alone."""
    final, _, scope = kind
    end = min(begin + length, STEPS)
    pruned = np.asarray(pruned_at(*kind, begin, end, every))
    floors = [math.floor(Fraction(str(final)) * x.size) for x in PARAMS.values()]
    total = math.floor(Fraction(str(final)) * 127)
    if scope == "layer":
        assert (pruned[end - 1 :] == floors).all()
    else:
        assert (pruned[end - 1 :].sum(axis=1) == total).all()
    assert (np.diff(pruned, axis=0) >= 0).all()
    changes = 2 + np.flatnonzero(np.diff(pruned.sum(axis=1)))  # numbers of the steps
    allowed = (changes % every == 0) | (changes >= end - every)
    assert allowed.all()
    part = np.clip((np.arange(1, STEPS + 1) - begin) / (end - begin), 0, 1)
    assert (pruned.sum(axis=1) <= 127 * final * (1 - (1 - part) ** 3) + 1e-3).all()


@pytest.mark.parametrize(
    "schedule, zeros",
    [
        (0.58, 58),
        (np.float32(0.29), 29),
        (optax.linear_schedule(0.0, 0.95, 30), 95),
        (optax.polynomial_schedule(0.0, 0.29, 3, 20, 5), 29),
        (lambda step: jnp.where(step >= 33, 0.07, 0.0), 7),
        (optax.piecewise_constant_schedule(0.1, {11: 3.0, 37: 2.0}), 60),
        (flj.schedules.cubic(0.999999, begin=0, end=40), 99),
        (0.0, 0),
    ],
)
def test_other_schedules_reach_their_last_value(schedule, zeros):
    start = jnp.arange(100.0).reshape(10, 10)

    @jax.jit
    def run(every):
        tx = flj.gradual_prune(MAGNITUDE, schedule, mask_every=every, masks=None)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jnp.zeros_like(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (start, tx.init(start)), length=STEPS)[0]

    for every in (1, 7, 1000):
        params, state = run(every)
        assert flj.check(state).ok and flj.check(state).sparsity == zeros / 100
        np.testing.assert_array_equal(params.reshape(-1) > 0, np.arange(100) >= max(zeros, 1))


def test_an_array_that_rises_slowly_does_not_stand_still():
    """As a cubic schedule does at its end: by less than the millionths that are counted."""

    @jax.jit
    def step(before, value):
        request = request_at(value, [100], jnp.int32(1), jnp.int32(2), before)
        return request.sparsity, request.flat

    values = 0.9 + 4e-7 * jnp.arange(8)
    _, flat = jax.lax.scan(step, jnp.float32(jnp.nan), jnp.append(values, values[-1]))
    assert flat.tolist() == [True, *[False] * 7, True]


def test_masks_stay_as_they_are_where_a_schedule_falls():
    params = jnp.arange(1.0, 101).reshape(10, 10)
    tx = flj.gradual_prune(MAGNITUDE, optax.cosine_decay_schedule(0.9, 30), mask_every=1)
    step = jax.jit(lambda state, _: (tx.update(params, state, params)[1], state.pruned))
    state, pruned = jax.lax.scan(step, tx.init(params), length=STEPS)
    assert (pruned[1:] == int(100 * 0.9 * (1 + np.cos(np.pi / 30)) / 2)).all()
