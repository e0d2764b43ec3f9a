"""Masks against a stable sort, on scores with many ties."""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fishleg_jax as flj
from fishleg_jax.pruning.masks.build import number_to_prune

# few shapes, so that there are few compilations
SHAPES = [((3, 4), (5, 7)), ((2, 2), (2, 3)), ((6, 4), (4, 4)), ((0, 3), (2, 2))]
sparsities = st.one_of(
    st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 0.29, 0.5, 0.7, 0.9, 0.98, 1 - 1e-9])
)


@st.composite
def trees(draw):
    """Scores of two prunable leaves and a bias, with values that repeat, zeros and infinities."""
    shapes = draw(st.sampled_from(SHAPES))
    values = st.sampled_from([0.0, -0.0, 1e-42, 0.1, 0.5, 0.5, 2.0, 3e38, float("inf")])
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    if draw(st.booleans()):
        kernels = [rng.choice(draw(st.lists(values, min_size=1, max_size=4)), s) for s in shapes]
    else:
        kernels = [rng.exponential(size=s) for s in shapes]
    return {
        "a": {"kernel": np.float32(kernels[0]), "bias": np.zeros(3, np.float32)},
        "b": {"kernel": np.float32(kernels[1])},
    }


def reference(scores, sparsity, old=None):
    """What a stable sort prunes of a flat array; what is pruned already goes before all."""
    keys = np.where(old, scores, -1) if old is not None else scores
    count = math.floor(Fraction(repr(sparsity)) * len(scores))
    kept = np.ones(len(scores), bool)
    kept[np.argsort(keys, kind="stable")[:count]] = False
    return kept


def kernels(tree):
    return [np.asarray(tree["a"]["kernel"]), np.asarray(tree["b"]["kernel"])]


def flat(tree):
    return np.concatenate([x.reshape(-1) for x in kernels(tree)])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(trees(), sparsities)
def test_global_masks_are_those_of_a_stable_sort(scores, sparsity):
    masks = flj.make_masks(scores, sparsity)
    np.testing.assert_array_equal(flat(masks), reference(flat(scores), sparsity))
    assert masks["a"]["bias"].all()
    assert [x.shape for x in kernels(masks)] == [x.shape for x in kernels(scores)]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(trees(), sparsities)
def test_layer_masks_are_those_of_a_stable_sort_in_each(scores, sparsity):
    masks = flj.make_masks(scores, sparsity, scope="layer")
    for mask, score in zip(kernels(masks), kernels(scores), strict=True):
        np.testing.assert_array_equal(mask.reshape(-1), reference(score.reshape(-1), sparsity))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(trees(), trees(), sparsities, sparsities, st.sampled_from(["global", "layer"]))
def test_what_is_pruned_stays_pruned(before, now, first, second, scope):
    """Under other scores too, and it counts."""
    first, second = sorted((first, second))
    now = jax.tree.map(lambda x, y: np.resize(y, x.shape), before, now)
    old = flj.make_masks(before, first, scope=scope)
    new = flj.make_masks(now, second, scope=scope, masks=old)
    assert not (flat(new) & ~flat(old)).any()
    if scope == "global":
        np.testing.assert_array_equal(flat(new), reference(flat(now), second, flat(old)))
    else:
        for kept, score, earlier in zip(*map(kernels, (new, now, old)), strict=True):
            expected = reference(score.reshape(-1), second, earlier.reshape(-1))
            np.testing.assert_array_equal(kept.reshape(-1), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_dtypes_of_scores(x64, dtype):
    scores = jnp.asarray(np.random.default_rng(0).exponential(size=(20, 5)), dtype)
    expected = reference(np.asarray(scores, np.float64).reshape(-1), 0.37)
    np.testing.assert_array_equal(flj.make_masks(scores, 0.37).reshape(-1), expected)


def test_double_precision_tells_close_scores_apart(x64):
    scores = 1 + jnp.arange(6.0)[::-1].reshape(2, 3) * 1e-15
    assert flj.make_masks(scores, 0.5).tolist() == [[True] * 3, [False] * 3]


def test_leaves_of_different_dtypes_are_compared_by_value(x64):
    scores = {"a": jnp.array([[1.0, 4.0]], jnp.float32), "b": jnp.array([[2.0, 3.0]], jnp.float64)}
    masks = flj.make_masks(scores, 0.5, prunable="a|b")
    assert masks["a"].tolist() == [[False, True]] and masks["b"].tolist() == [[False, True]]
    scores = dict(zip("ab", (scores["b"], scores["a"]), strict=True))
    masks = flj.make_masks(scores, 0.5, prunable="a|b")
    assert masks["a"].tolist() == [[False, True]] and masks["b"].tolist() == [[False, True]]


def test_selection_by_expression_and_predicate():
    scores = {"a": jnp.ones(10), "b": jnp.ones((2, 5)), "c": jnp.ones((2, 5))}

    def zeros(prunable):
        masks = flj.make_masks(scores, 0.5, prunable=prunable)
        return [int((~m).sum()) for m in masks.values()]

    assert zeros(None) == [0, 10, 0]  # ten of twenty, the first ones
    assert zeros("c") == [0, 0, 5]
    assert zeros(["^a", "c"]) == [10, 0, 0]
    assert zeros(lambda name, leaf: name == "b" and leaf.ndim == 2) == [0, 5, 0]


@pytest.mark.parametrize("n", [1, 3, 100, 266_200])
@pytest.mark.parametrize("sparsity", [0, 0.0, 0.07, 0.29, 0.58, 0.9, 0.95, 0.98, 1e-12])
def test_number_to_prune_is_the_floor_in_decimal(n, sparsity):
    """In binary 0.29 · 100 is less than 29."""
    assert number_to_prune(sparsity, n) == math.floor(Fraction(str(sparsity)) * n)


@pytest.mark.parametrize(
    "sparsity", [-0.1, 1.0, 1.5, float("nan"), float("inf"), "a", None, "0.5", [0.5]], ids=repr
)
def test_bad_sparsities(sparsity):
    with pytest.raises(ValueError, match="sparsity must be a number in \\[0, 1\\)"):
        flj.make_masks(jnp.ones((2, 2)), sparsity)


BAD = jnp.ones((2, 2)).at[1, 1].set(jnp.nan)


@pytest.mark.parametrize(
    "scores, arguments, message",
    [
        ({"w": BAD}, {}, "scores must be non-negative numbers, but 'w' has negative or NaN scores"),
        ({"w": -BAD}, {}, "scores must be non-negative numbers"),
        ({"w": jnp.ones((2, 2))}, {"scope": "leaf"}, "scope must be one of global, layer"),
        ({"w": jnp.ones(4)}, {}, "prunable selects no leaf.*the leaves are: w"),
        ({"w": jnp.ones(4)}, {"prunable": "v"}, "prunable: 'v' matches no leaf"),
        ({"w": jnp.ones(4)}, {"prunable": ["w", "v"]}, "prunable: 'v' matches no leaf"),
        ({"w": jnp.ones(4)}, {"prunable": []}, "no expression was given"),
        ({"w": jnp.ones(4)}, {"prunable": "("}, "prunable: '\\(' is not a regular expression"),
        ({"w": jnp.ones(4)}, {"prunable": lambda *_: False}, "the predicate was False"),
        ({}, {}, "prunable selects no leaf.*none"),
        (
            {"w": jnp.ones((2, 2))},
            {"masks": {"w": jnp.zeros((2, 2), bool)}},
            "masks already prune 4 weights, but the sparsity requests only 2",
        ),
        ({"w": jnp.ones((2, 2))}, {"masks": {"v": jnp.ones((2, 2), bool)}}, "masks must have"),
        ({"w": jnp.ones((2, 2))}, {"masks": {"w": jnp.ones((2, 1), bool)}}, "masks: 'w' must"),
    ],
)
def test_bad_arguments(scores, arguments, message):
    with pytest.raises(ValueError, match=message):
        flj.make_masks(scores, 0.5, **arguments)


def test_nan_in_a_leaf_that_is_not_pruned_does_not_matter():
    masks = flj.make_masks({"w": jnp.ones((2, 2)), "bias": BAD[0] * jnp.nan}, 0.5)
    assert masks["bias"].all() and int(masks["w"].sum()) == 2


LEAVES = {"a": (4, 5), "b": (6, 3)}


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_under_jit_and_vmap_masks_are_the_same(scope):
    rng = np.random.default_rng(0)
    # whole numbers, so that there are ties
    stack = {name: rng.integers(0, 5, (3, *s)).astype(np.float32) for name, s in LEAVES.items()}
    first = functools.partial(flj.make_masks, sparsity=0.3, scope=scope)
    second = functools.partial(flj.make_masks, sparsity=0.7, scope=scope)

    def both(scores):
        masks = first(scores)
        return masks, second({name: x[::-1] for name, x in scores.items()}, masks=masks)

    one = {name: x[0] for name, x in stack.items()}
    assert_equal(jax.jit(both)(one), both(one))
    together = jax.jit(jax.vmap(both))(stack)
    for i in range(3):
        alone = both({name: x[i] for name, x in stack.items()})
        assert_equal(jax.tree.map(lambda x: x[i], together), alone)  # noqa: B023


def test_under_jit_masks_never_shrink_and_nothing_is_refused():
    scores = {"w": jnp.arange(8.0).reshape(2, 4)}
    masks = flj.make_masks(scores, 0.75)
    found = jax.jit(lambda scores, masks: flj.make_masks(scores, 0.5, masks=masks))(scores, masks)
    assert_equal(found, masks)
    odd = {"w": jnp.array([[3.0, -1.0], [jnp.nan, 2.0]])}
    assert jax.jit(lambda s: flj.make_masks(s, 0.5))(odd)["w"].tolist() == [[True, False]] * 2
    with pytest.raises(ValueError, match="sparsity must be a number in \\[0, 1\\), got"):
        jax.jit(flj.make_masks)(scores, 0.5)


def test_apply_masks_puts_exact_zeros_and_keeps_the_dtype():
    params = {"w": jnp.array([[jnp.nan, -1.0], [jnp.inf, 2.0]], jnp.bfloat16)}
    out = flj.apply_masks(params, {"w": jnp.array([[False, True], [False, False]])})["w"]
    assert out.dtype == jnp.bfloat16 and out.tolist() == [[0, -1], [0, 0]]
    assert not np.signbit(np.asarray(out, np.float32))[[0, 1, 1], [0, 0, 1]].any()


def test_apply_masks_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="masks must have the structure"):
        flj.apply_masks({"w": jnp.ones(2)}, [jnp.ones(2, bool)])
    with pytest.raises(ValueError, match="masks: 'w' must have shape \\(2,\\), got \\(3,\\)"):
        flj.apply_masks({"w": jnp.ones(2)}, {"w": jnp.ones(3, bool)})


def test_the_sparsity_of_a_result_is_that_of_its_weights():
    params = {"w": jnp.arange(1.0, 5).reshape(2, 2)}
    model = flj.Model(lambda p, x: x @ p["w"], flj.likelihoods.gaussian())
    batch = (jnp.ones((1, 2)), None)
    result = flj.prune_one_shot(model, params, flj.inverse.identity(), [batch], sparsity=0.5)
    assert flj.sparsity(result.params) == 0.5
    with pytest.raises(ValueError, match="got a Result: use its params"):
        flj.sparsity(result)


def test_sparsity_counts_zeros_of_prunable_leaves():
    params = {"w": jnp.array([[0.0, 1.0], [-0.0, 1e-30]]), "bias": jnp.zeros(3)}
    assert flj.sparsity(params) == 0.5
    assert flj.sparsity(params, "bias") == 1.0
    assert flj.sparsity(params, ["w", "bias"]) == 5 / 7
