"""Laws of sparsities over stages."""

import itertools
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fishleg_jax.pruning.masks.build import number_to_prune
from fishleg_jax.pruning.schedules import stage_sparsities

SCHEDULES = ["geometric", "linear", "polynomial"]
schedules = st.sampled_from(SCHEDULES)
stage_numbers = st.integers(1, 30)
sparsities = st.one_of(
    st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1e-300, 0.29, 0.5, 0.9, 1 - 2**-53])
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(sparsities, sparsities, stage_numbers, schedules)
def test_stages_rise_from_the_initial_sparsity_to_exactly_the_final_one(a, b, stages, schedule):
    initial, final = sorted((a, b))
    made = stage_sparsities(final, stages, schedule=schedule, initial=initial)
    assert len(made) == stages and all(type(x) is float for x in made)
    assert made[-1] == final
    assert all(x <= y for x, y in itertools.pairwise([initial, *made]))
    if (final - initial) / stages > 1e-12:
        assert all(x < y for x, y in itertools.pairwise([initial, *made][: 3 + stages // 2]))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.floats(1e-300, 1, exclude_max=True), stage_numbers, schedules)
def test_the_first_stage_prunes_however_little_is_asked_for(final, stages, schedule):
    assert stage_sparsities(final, stages, schedule=schedule)[0] > 0


moderate = st.floats(0, 0.999)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(moderate, moderate, stage_numbers)
def test_geometric_stages_keep_equal_fractions(a, b, stages):
    initial, final = sorted((a, b))
    made = stage_sparsities(final, stages, initial=initial)
    densities = 1 - np.array([initial, *made])
    ratio = ((1 - final) / (1 - initial)) ** (1 / stages)
    np.testing.assert_allclose(densities[1:] / densities[:-1], ratio, rtol=1e-10)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(moderate, moderate, stage_numbers)
def test_linear_stages_prune_equal_amounts(a, b, stages):
    initial, final = sorted((a, b))
    made = stage_sparsities(final, stages, schedule="linear", initial=initial)
    expected = np.linspace(initial, final, stages + 1)[1:]
    np.testing.assert_allclose(made, expected, rtol=1e-13, atol=1e-300)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(moderate, moderate, stage_numbers)
def test_polynomial_stages_are_those_of_zhu_and_gupta(a, b, stages):
    initial, final = sorted((a, b))
    made = stage_sparsities(final, stages, schedule="polynomial", initial=initial)
    part = np.arange(1, stages + 1) / stages
    expected = final + (initial - final) * (1 - part) ** 3
    np.testing.assert_allclose(made, expected, rtol=1e-12, atol=1e-15)


def test_known_stages():
    assert stage_sparsities(0.9, 1) == [0.9]
    assert stage_sparsities(0.0, 3) == [0.0] * 3
    assert stage_sparsities(0.5, 2, initial=0.5) == [0.5, 0.5]
    assert stage_sparsities(0.9375, 4) == [0.5, 0.75, 0.875, 0.9375]
    assert stage_sparsities(0.9, 9, schedule="linear") == [x / 10 for x in range(1, 10)]
    assert stage_sparsities(0.8, 2, schedule="polynomial") == [0.7, 0.8]


def test_stages_prune_whole_numbers_of_weights_where_they_come_out_even():
    """0.5 less one bit would prune 7 of 16."""
    made = [number_to_prune(x, 16) for x in stage_sparsities(0.9375, 4)]
    assert made == [8, 12, 14, 15]


@pytest.mark.parametrize("number", [np.float32, np.float64, jnp.float32, np.float16], ids=repr)
def test_numbers_of_other_types_are_read_as_they_are_printed(number):
    made = stage_sparsities(number(0.9), np.int64(3), schedule="linear", initial=number(0.3))
    assert made == [0.5, 0.7, 0.9] and made[-1] == number(0.9)
    assert stage_sparsities(Fraction(1, 2), 1) == [0.5]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((1.0, 3), "sparsity must be a number in \\[0, 1\\), got 1.0"),
        ((-0.1, 3), "sparsity must be a number in \\[0, 1\\), got -0.1"),
        ((float("nan"), 3), "sparsity must be a number in \\[0, 1\\), got nan"),
        ((float("inf"), 3), "sparsity must be a number in \\[0, 1\\), got inf"),
        (("0.5", 3), "sparsity must be a number in \\[0, 1\\), got '0.5'"),
        ((jnp.array([0.5, 0.6]), 3), "sparsity must be a number in \\[0, 1\\), got float32"),
        ((None, 3), "sparsity must be a number in \\[0, 1\\), got None"),
        ((0.5, 0), "stages must be an integer of at least 1, got 0"),
        ((0.5, 2.0), "stages must be an integer of at least 1, got 2.0"),
        ((0.5, True), "stages must be an integer of at least 1, got True"),
        ((0.5, 3, ["linear"]), "schedule must be one of .* got \\['linear'\\]"),
        ((0.5, 3, "cubic"), "schedule must be one of geometric, linear, polynomial, got 'cubic'"),
        (
            (0.5, 3, "linear", 0.6),
            "initial must be a number from 0 to the final sparsity, 0.5, got",
        ),
        ((0.5, 3, "linear", -0.1), "initial must be a number from 0 .* got -0.1"),
        ((0.5, 3, "linear", float("nan")), "initial must be a number from 0 .* got nan"),
        ((0.5, 3, "linear", float("inf")), "initial must be a number from 0 .* got inf"),
        ((0.5, 3, "linear", "0"), "initial must be a number from 0 .* got '0'"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message):
    names = ("sparsity", "stages", "schedule", "initial")
    with pytest.raises(ValueError, match=message):
        stage_sparsities(**dict(zip(names, arguments, strict=False)))
