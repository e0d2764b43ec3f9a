"""Cells of analog and of digital storage, counted."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fishleg_jax import storage


def test_the_error_correction_is_that_of_the_binomial():
    cell = storage.gaussian(0.05)
    found = storage.digital(cell, failure=1e-12)
    assert found.levels == 4 and found.word_bits == 1023
    # three of four levels have a neighbour on either side, on average 1.5 tails; two bits a cell
    expected = 1.5 * stats.norm.sf((1 / 6) / 0.05) / 2
    np.testing.assert_allclose(found.bit_error, expected, rtol=1e-5)
    beyond = lambda t: stats.binom.sf(t, 1023, found.bit_error)
    assert beyond(found.corrected) <= 1e-12 < beyond(found.corrected - 1)
    assert found.data_bits == 1023 - 10 * found.corrected
    np.testing.assert_allclose(found.cells_per_bit, 1023 / (2 * found.data_bits))


def test_quieter_cells_have_more_levels():
    levels = [storage.digital(storage.gaussian(s)).levels for s in (0.15, 0.04, 0.015, 0.001)]
    assert levels == sorted(levels) and levels[0] == 2 and levels[-1] == 16
    with pytest.raises(ValueError, match="too noisy"):
        storage.digital(storage.gaussian(5.0))


def test_digital_weights_are_off_by_half_a_step():
    weights = jnp.array([[1.0, -0.3, 0.0], [0.77, 0.123, -0.9]])
    found = storage.quantise({"w": weights, "zero": jnp.zeros(2)})
    assert float(jnp.abs(found["w"] - weights).max()) <= 0.5 / 127 + 1e-7
    assert found["w"][0, 2] == 0 and found["zero"].tolist() == [0, 0]
    assert len(np.unique(storage.quantise(jnp.linspace(-1, 1, 100), bits=3))) == 7
    with pytest.raises(ValueError, match="bits must be"):
        storage.quantise(weights, bits=1)


def test_costs_add_up():
    params = {"w": jnp.array([1.0, 0.0, 2.0, 0.0, -3.0]), "b": jnp.ones(2)}
    per_bit = storage.digital().cells_per_bit
    positions = math.ceil(math.log2(math.comb(5, 3)))
    found = storage.cost(params, 2)
    expected = (10, 5 * per_bit, positions * per_bit, 64 * per_bit, 32 * per_bit)
    np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(found.total, sum(expected))
    plain = storage.Coding(signs=False, zeros=False, ranges="network")
    assert storage.cost(params, 2, coding=plain)[:3] == (14, 0, 0)
    own = storage.allot(
        {"w": jnp.arange(5.0), "b": jnp.ones(2)}, params, cells=20, cell=storage.pcm()
    )
    assert storage.cost(params, own).values == 20
    digital = storage.digital_cost(params)
    np.testing.assert_allclose(digital.values, 5 * 8 * per_bit)
    np.testing.assert_allclose(digital.positions, positions * per_bit)
    assert storage.digital_cost(params, zeros=False).values == pytest.approx(7 * 8 * per_bit)


def test_the_numbers_of_cells_are_counted():
    """Equal ones once; others by the number that occurs, and the ways to arrange them."""
    cell = storage.gaussian(0.0)
    bits = lambda params, cells: storage.cost(params, cells, cell=cell).numbers * 4
    params = {"w": jnp.ones((3, 4)), "b": jnp.ones(2)}
    assert bits(params, 5) == bits(params, storage.equal(params, 21)) == 32
    each = {"w": jnp.array([[1, 2, 1, 1], [1, 1, 1, 5], [1, 1, 1, 1]]), "b": jnp.array([1, 1])}
    ways = math.factorial(12) // math.factorial(10)
    assert bits(params, each) == 3 * 32 + math.ceil(math.log2(ways)) + 32
    rows = {"w": jnp.array([[1] * 4, [7] * 4, [1] * 4]), "b": jnp.array([1, 1])}
    assert bits(params, rows) == 2 * 32 + 2 + 32  # 3 ways for one row of three
    columns = {"w": rows["w"][:, :1].T + jnp.zeros((4, 1), int), "b": rows["b"]}
    assert bits({"w": jnp.ones((4, 3)), "b": jnp.ones(2)}, columns) == 2 * 32 + 2 + 32
    # a zero takes no cell, and says nothing of its row
    pruned = params | {"w": params["w"].at[0, 0].set(0)}
    assert bits(pruned, rows | {"w": rows["w"].at[0, 0].set(9)}) == bits(params, rows)
    assert bits(jax.tree.map(jnp.zeros_like, params), 3) == 0
    diagonal = storage.cost(jnp.eye(3), jnp.diag(jnp.array([1, 2, 3])), cell=cell)
    assert diagonal.numbers * 4 == 3 * 32 + math.ceil(math.log2(6))
