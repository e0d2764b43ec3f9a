"""Patterns of sparsity: which weights go together, how many, and by which scores."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import fishleg_jax as flj
from fishleg_jax import _tiles
from fishleg_jax.inverse._blocks import Pieces
from fishleg_jax.pruning.masks.groups import make_groups
from fishleg_jax.pruning.update import Surgeon, score
from tests import dense

N_M = flj.patterns.n_m(2, 4)
SHAPES = {"a": (9, 6), "c": (3, 8, 5)}
COUPLED = flj.patterns.units([[("a", 1), ("b", 0)]])


def scores_of(seed, shapes, ties=False):
    leaves = dense.random_like(
        jax.random.key(seed),
        {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()},
    )
    return {n: jnp.round(jnp.abs(x)) if ties else jnp.abs(x) for n, x in leaves.items()}


def zeros(masks):
    return sum(int((~m).sum()) for m in jax.tree.leaves(masks))


# laws


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31 - 1), st.booleans())
def test_every_group_has_n_of_m_and_the_remainder_stays_dense(seed, ties):
    masks = flj.make_masks(scores_of(seed, SHAPES, ties), pattern=N_M)
    for name, axis in (("a", 0), ("c", 1)):
        mask = np.moveaxis(np.asarray(masks[name]), axis, 0)
        whole = len(mask) // 4 * 4
        kept = mask[:whole].reshape(-1, 4, mask[0].size).sum(axis=1)
        assert (kept == 2).all() and mask[whole:].all()


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31 - 1), st.sampled_from([0.0, 0.1, 0.25, 0.37, 0.5]), st.booleans())
def test_the_lowest_groups_go_first_and_exactly_as_many_as_fit(seed, sparsity, ties):
    scores = scores_of(seed, SHAPES, ties)
    masks = flj.make_masks(scores, sparsity, pattern=N_M)
    groups = 6 * 2 + 3 * 2 * 5
    expected = groups if sparsity == 0.5 else min(int(sparsity * 174) // 2, groups)
    assert zeros(masks) == 2 * expected
    means, gone = [], []
    for name, tile in (("a", (4, 1)), ("c", (1, 4, 1))):
        own = np.sort(_tiles.split(np.asarray(scores[name]), tile).reshape(-1, 4), axis=1)
        kept = _tiles.split(np.asarray(masks[name]), tile).reshape(-1, 4).sum(axis=1)
        assert set(kept) <= {2, 4}
        means += list(own[:, :2].mean(axis=1))
        gone += list(kept == 2)
    means, gone = np.array(means), np.array(gone)
    if 0 < expected < groups:
        assert means[gone].max() <= means[~gone].min()


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31 - 1), st.sampled_from([0.2, 0.5, 0.8]), st.booleans())
def test_masks_never_shrink_and_groups_stay_whole(seed, sparsity, ties):
    scores, again = (scores_of(seed + k, {"a": (8, 6), "b": (6, 4)}, ties) for k in (0, 1))
    for pattern, tiles in (
        (flj.patterns.blocks((2, 3)), {"a": (2, 3), "b": (2, 3)}),
        (flj.patterns.units(), {"a": (8, 1), "b": (6, 1)}),
    ):
        first = flj.make_masks(scores, sparsity / 2, pattern=pattern)
        masks = flj.make_masks(again, sparsity, pattern=pattern, masks=first)
        for name, tile in tiles.items():
            assert not np.any(np.asarray(masks[name] & ~first[name]))
            whole = _tiles.split(np.asarray(masks[name]), tile)
            assert (whole.all(axis=-1) == whole.any(axis=-1))[..., None].all()
        largest = max(np.prod(tile) for tile in tiles.values())
        assert 0 <= int(sparsity * 72) - zeros(masks) < largest


def test_coupled_units_go_together_and_are_ranked_by_all_of_their_weights():
    scores = scores_of(0, {"a": (3, 4), "b": (8, 2), "other": (3, 3)})
    pattern = flj.patterns.units([[("a", 1), ("b", 0, 2)]])
    masks = flj.make_masks(scores, 0.5, pattern=pattern)
    total = np.asarray(scores["a"].sum(0) + scores["b"].reshape(4, -1).sum(1))
    lost = set(np.argsort(total)[:2])
    assert {j for j in range(4) if not masks["a"][:, j].any()} == lost
    assert {j for j in range(4) if not masks["b"][2 * j : 2 * j + 2].any()} == lost
    assert zeros(masks) == 2 * 7 and masks["other"].all()


def test_units_that_cross_in_a_leaf_are_counted_once():
    shapes = {"a": (5, 4), "b": (4, 6), "c": (6, 5)}
    pattern = flj.patterns.units([[("a", 1), ("b", 0)], [("b", 1), ("c", 0)]])
    for seed in range(5):
        masks = flj.make_masks(scores_of(seed, shapes), 0.6, pattern=pattern)
        first, second = (np.asarray(masks[k]) for k in "ac")
        expected = first.any(axis=0)[:, None] & second.any(axis=1)[None]
        assert (np.asarray(masks["b"]) == expected).all()
        assert 0 <= int(0.6 * 74) - zeros(masks) < 11


@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_a_leaf_smaller_than_a_group_stays_dense(scope):
    scores = scores_of(0, {"a": (8, 4), "small": (3, 3)})
    masks = flj.make_masks(scores, 0.25, pattern=flj.patterns.blocks((4, 2)), scope=scope)
    assert masks["small"].all() and zeros(masks) == 8
    with pytest.raises(ValueError, match="as large as one group"):
        flj.make_masks({"small": scores["small"]}, 0.25, pattern=flj.patterns.blocks((4, 4)))


def test_stacked_layers_are_patterned_one_by_one():
    scores = scores_of(3, {"a": (2, 8, 3), "b": (8, 3)})
    masks = flj.make_masks(scores, pattern=N_M, stacked="a", scope="layer")
    for layer in range(2):
        own = flj.make_masks({"b": scores["a"][layer]}, pattern=N_M)
        assert (masks["a"][layer] == own["b"]).all()
    pattern = flj.patterns.units()
    half = flj.make_masks(scores, 0.4, pattern=pattern, stacked="a", scope="layer")
    assert [int((~half["a"][k]).sum()) for k in range(2)] == [8, 8]
    everywhere = flj.make_masks(scores, 0.4, pattern=pattern, stacked="a")
    kept = np.asarray(everywhere["a"])
    assert (kept.all(axis=1) == kept.any(axis=1)).all() and zeros(everywhere) == 24


def test_masks_that_prune_more_than_the_pattern_are_completed():
    first = {"a": jnp.arange(72).reshape(8, 9) % 8 == 0}
    masks = flj.make_masks(scores_of(0, {"a": (8, 9)}), pattern=N_M, masks=first)
    kept = _tiles.split(np.asarray(masks["a"]), (4, 1)).sum(axis=-1)
    assert (kept <= 2).all() and not np.any(np.asarray(masks["a"] & ~first["a"]))


# densities


@settings(deadline=None, max_examples=10)
@given(st.sampled_from([0.1, 0.5, 0.83, 0.97]), st.integers(0, 2**31 - 1))
def test_erk_has_an_exact_total_and_densities_in_proportion(sparsity, seed):
    shapes = {"a": (30, 4), "c": (3, 3, 4, 8), "d": (8, 2)}
    masks = flj.make_masks(scores_of(seed, shapes), sparsity, scope="erk")
    sizes = {name: int(np.prod(s)) for name, s in shapes.items()}
    assert zeros(masks) == int(sparsity * sum(sizes.values()) + 1e-9)
    factor = {
        name: float(masks[name].sum()) / sum(shape)
        for name, shape in shapes.items()
        if masks[name].sum() < sizes[name]
    }
    each = list(factor.values())
    assert max(each) - min(each) < 3 / 10  # a weight or two of the smallest sum of dimensions
    for name in shapes.keys() - factor.keys():  # full at this factor
        assert max(each) * sum(shapes[name]) > sizes[name] - 3


def test_densities_by_name_are_exact():
    scores = scores_of(0, {"a": (10, 10), "b": (10, 4), "c": (5, 5)})
    masks = flj.make_masks(scores, scope={"^a": 0.29, "b": 0.5})
    assert [int(masks[k].sum()) for k in "abc"] == [29, 20, 25]
    masks = flj.make_masks(scores, pattern=N_M, scope={"^a": 0.5, ".*": 1.0})
    assert [int((~masks[k]).sum()) for k in "abc"] == [40, 0, 0]


# scores


def estimator_of(inverse, fisher):
    """An estimator of dense matrices with dense blocks."""

    def diagonal(matrix):
        return lambda state, params, mask=None: ravel_pytree(params)[1](jnp.diag(matrix))

    def blocks(state, tangent, tiles, undamped):
        matrix = fisher if undamped else inverse
        flat, unravel = ravel_pytree(tangent)
        places = jax.tree.leaves(unravel(jnp.arange(flat.size, dtype=flat.dtype)))
        found = []
        for x, place, tile in zip(jax.tree.leaves(tangent), places, tiles, strict=True):
            own = _tiles.split(place, tile).astype(int)
            pairs = matrix[own[..., :, None], own[..., None, :]]
            found.append(Pieces(_tiles.split(x, tile)[..., None, :], pairs[..., None, :, :]))
        return found

    return dense.estimator_of(inverse)._replace(
        diagonal=diagonal(inverse), fisher_diagonal=diagonal(fisher), blocks=blocks
    )


@functools.cache
def curved():
    keys = jax.random.split(jax.random.key(5), 3)  # curvature mostly along six directions
    root = jax.random.normal(keys[0], (40, 6)) @ jax.random.normal(keys[1], (6, 32))
    root += 0.3 * jax.random.normal(keys[2], (40, 32))
    fisher = root.T @ root / 40
    inverse = jnp.linalg.inv(fisher + 0.1 * jnp.eye(32))
    params = {"a": jax.random.normal(jax.random.key(6), (8, 4))}
    return params, estimator_of(inverse, fisher), np.asarray(inverse), np.asarray(fisher)


def block_score(saliency, w, own, inverse, fisher):
    w, block = np.asarray(w).reshape(-1)[own], np.ix_(own, own)
    obs = w @ np.linalg.solve(inverse[block], w) / 2
    obd = w @ fisher[block] @ w / 2
    return {"obs": obs, "obd": obd, "mixture": np.sqrt(obs * obd)}[saliency]


def scored(pattern, saliency, masks=None):
    params, estimator, *_ = curved()
    groups = make_groups(params, None, "global", None, pattern)
    surgeon = Surgeon(estimator, None, groups, None, saliency)
    masks = jax.tree.map(lambda x: jnp.ones(x.shape, bool), params) if masks is None else masks
    return score(surgeon, (), params, masks)


@pytest.mark.parametrize("saliency", ["obs", "obd", "mixture"])
def test_the_best_of_all_subsets_is_found(saliency):
    params, _, inverse, fisher = curved()
    found = scored(N_M, saliency)
    masks = flj.make_masks(found, pattern=N_M)
    singles = 0
    for group, column in itertools.product(range(2), range(4)):
        places = [(4 * group + i) * 4 + column for i in range(4)]
        sets = {
            pair: block_score(saliency, params["a"], list(pair), inverse, fisher)
            for pair in itertools.combinations(places, 2)
        }
        best = min(sets, key=sets.get)
        lost = tuple(p for p in places if not masks["a"].reshape(-1)[p])
        assert lost == best
        share = np.asarray(found["a"]).reshape(-1)[list(best)]
        np.testing.assert_allclose(share, sets[best] / 2, rtol=1e-4)
        each = [block_score(saliency, params["a"], [p], inverse, fisher) for p in places]
        singles += set(best) != {places[i] for i in np.argsort(each)[:2]}
    if saliency == "obs":
        assert singles  # or single scores would do


@pytest.mark.parametrize("saliency", ["obs", "obd"])
@pytest.mark.parametrize("pattern", [flj.patterns.blocks((2, 2)), flj.patterns.units()])
def test_whole_groups_have_the_score_of_their_block(saliency, pattern):
    params, _, inverse, fisher = curved()
    tile = (2, 2) if pattern.kind == "blocks" else (8, 1)
    places = _tiles.split(np.arange(32).reshape(8, 4), tile)
    found = _tiles.split(np.asarray(scored(pattern, saliency)["a"]), tile)
    for index in np.ndindex(places.shape[:-1]):
        expected = block_score(saliency, params["a"], places[index], inverse, fisher)
        np.testing.assert_allclose(found[index].sum(), expected, rtol=1e-4)


def test_pruned_weights_have_no_part_in_a_block():
    params, estimator, inverse, fisher = curved()
    masks = {"a": jnp.ones((8, 4), bool).at[1, 0].set(False).at[4:7, 2].set(False)}
    found = scored(N_M, "obs", masks)
    new = flj.make_masks(found, pattern=N_M, masks=masks)
    # one of four is gone: the best second one, with the block of a single weight
    each = [block_score("obs", params["a"], [4 * i], inverse, fisher) for i in (0, 2, 3)]
    assert [i for i in (0, 2, 3) if not new["a"][i, 0]] == [(0, 2, 3)[np.argmin(each)]]
    assert int(new["a"][4:, 2].sum()) == 1 and bool(new["a"][7, 2])


# refusals


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: flj.patterns.n_m(4, 4), "1 <= n < m"),
        (lambda: flj.patterns.n_m(10, 20), "at most 1000 sets"),
        (lambda: flj.patterns.n_m(2, 4, axis="in"), "axis must be"),
        (lambda: flj.patterns.blocks((4,)), "two whole numbers"),
        (lambda: flj.patterns.units([["a"]]), "must consist of"),
        (lambda: flj.patterns.units([[("a", 0)], [("a", 0)]]), "every axis once"),
    ],
)
def test_patterns_refuse(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    "sparsity, options, words",
    [
        (0.6, {"pattern": N_M}, "at most 0.4"),
        (None, {"pattern": flj.patterns.units()}, "None, which only"),
        (None, {}, "None, which only"),
        (0.99, {"pattern": flj.patterns.blocks((3, 3))}, "leaves the other weights dense"),
        (0.5, {"pattern": "2:4"}, "one of flj.patterns"),
        (None, {"pattern": flj.patterns.n_m(2, 4, axis=5)}, "has axis 5"),
        (None, {"pattern": flj.patterns.n_m(2, 4, axis={"no": 0})}, "matches no leaf"),
        (0.5, {"pattern": flj.patterns.units(size=4)}, "must divide axis 1"),
        (0.5, {"pattern": COUPLED}, "as many units each"),
        (0.5, {"pattern": flj.patterns.units([[("x", 0)]])}, "which is no leaf"),
        (0.5, {"pattern": flj.patterns.units([[("a", 1)]]), "scope": "layer"}, "must be 'global'"),
        (0.5, {"scope": "uniform"}, "scope must be one of"),
        (0.9, {"scope": {"a": 0.5}}, "must be None or"),
        (None, {"scope": {"a": 1.5}}, "a density must be in"),
        (None, {"scope": {"a": 0.3}, "pattern": N_M}, "can't have a density of 0.3"),
    ],
)
def test_masks_refuse(sparsity, options, words):
    scores = scores_of(0, {"a": (8, 6), "b": (5, 4)})
    with pytest.raises(ValueError, match=words):
        flj.make_masks(scores, sparsity, **options)


LINEAR = flj.Model(lambda w, x: x @ w["a"], flj.likelihoods.gaussian())


def pruned(sparsity=None, **options):
    params, *_ = curved()
    x = jax.random.normal(jax.random.key(7), (40, 8))
    return flj.prune_one_shot(
        LINEAR,
        params,
        options.pop("estimator", flj.inverse.identity()),
        [(x, x @ params["a"])],
        sparsity=sparsity,
        **options,
    )


def test_a_number_of_weights_is_kept_by_whole_units():
    result = pruned(flj.targets.weights(19), pattern=flj.patterns.units())
    assert result.report.total.kept == 16 and result.stopped is None
    result = pruned(flj.targets.weights(16), pattern=flj.patterns.blocks((3, 1)))
    assert result.report.total.kept == 14  # six blocks of three
    assert result.report.remainders == (("a", 8),)
    assert "Left dense (not divided by the pattern): 8 weights: a (8)" in str(result.report)


def test_stages_bring_more_and_more_groups_to_n_of_m():
    result = pruned(pattern=N_M, stages=4)
    assert [stage["sparsity"] for stage in result.stages][-1] == 0.5
    assert result.report.total.kept == 16
    assert (_tiles.split(np.asarray(result.masks["a"]), (4, 1)).sum(axis=-1) == 2).all()


@pytest.mark.parametrize("scope", ["global", "erk"])
def test_stages_go_as_far_as_groups_that_do_not_divide(scope):
    """7 rows make one group of four: of 9 columns 9 groups, 18 of 63 weights; none in 3 rows."""
    keys = jax.random.split(jax.random.key(0))
    params = {"a": jax.random.normal(keys[0], (7, 9)), "b": jax.random.normal(keys[1], (3, 5))}
    model = flj.Model(lambda p, x: (x @ p["a"]).sum() + p["b"].sum(), flj.likelihoods.gaussian())
    batches = [(jnp.ones((2, 7)), None)]

    def prune(sparsity, stages=1):
        options = {"pattern": N_M, "scope": scope, "sparsity": sparsity, "stages": stages}
        return flj.prune_one_shot(model, params, flj.inverse.identity(), batches, **options)

    found = [stage["sparsity"] for stage in prune(None, 3).stages]
    assert found == sorted(set(found)) and found[-1] == 18 / 78
    assert prune(0.5).report.total.kept == 60  # all groups, as with None
    with pytest.raises(ValueError, match="at most 0.230769 for .* do not divide, got 0.4"):
        prune(0.4)


def priced(params, costs, pattern, sparsity, scope="global", **leaves):
    """Masks by magnitude for its cost."""
    model = flj.Model(lambda p, x: x @ jax.tree.leaves(p)[0], flj.likelihoods.gaussian())
    return flj.prune_one_shot(
        model,
        params,
        flj.inverse.identity(),
        [(jnp.ones((2, 3)), None)],
        sparsity=sparsity,
        pattern=pattern,
        scope=scope,
        prunable=flj.Leaves(costs=costs, **leaves),
    ).masks


def test_units_are_ranked_by_their_scores_over_their_costs():
    """Sums over sums: in a mean of ratios the cheap weights of a unit would decide alone."""
    rng = np.random.default_rng(0)
    params = {"a": rng.uniform(1, 2, (3, 4)), "b": rng.uniform(1, 2, (4, 2))}
    costs = {"a": rng.uniform(0.01, 3, (3, 4)), "b": 5.0}
    pattern = flj.patterns.units([[("a", 1), ("b", 0)]])
    halves = {name: x**2 / 2 for name, x in params.items()}
    ratio = (halves["a"].sum(0) + halves["b"].sum(1)) / (costs["a"].sum(0) + 2 * 5.0)
    means = (halves["a"] / costs["a"]).sum(0) + (halves["b"] / 5).sum(1)
    order = np.argsort(ratio)
    assert list(order) != list(np.argsort(means))
    params, costs = (jax.tree.map(jnp.float32, x) for x in (params, costs))
    for gone in range(1, 4):
        masks = priced(params, costs, pattern, gone / 4)
        assert set(np.flatnonzero(~np.asarray(masks["a"][0]))) == set(order[:gone])


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_costs_do_not_choose_within_a_group_of_n_of_m(scope):
    """The best set of weights goes, and groups go by its score over its cost, layer by layer."""
    params = {"a": jnp.array([[[1.0], [2.0], [3.0], [1.5], [4.0], [2.5]]] * 2)}
    costs = {"a": jnp.array([[9.0], [1.0], [9.0], [1.0], [1.0], [1.0]]) * jnp.ones((2, 1, 1))}
    pattern = flj.patterns.n_m(1, 3)
    masks = priced(params, costs, pattern, 0.4, scope, prunable="a", stacked="a")
    # (1² + 2²) over 10 against (1.5² + 2.5²) over 2
    assert masks["a"][:, :, 0].tolist() == [[False, False, True, True, True, True]] * 2


@pytest.mark.parametrize(
    "sparsity, options, expected",
    [
        (0.6, {"pattern": flj.patterns.units(), "stages": 1}, [0.5]),
        (0.8, {"pattern": flj.patterns.units(), "stages": 2}, [0.5, 0.75]),  # asked: 0.553, 0.8
        (
            None,
            {"pattern": flj.patterns.n_m(1, 3), "stages": 1},
            [0.5],
        ),  # of 2/3: two rows are left
        (flj.targets.weights(19), {"pattern": flj.patterns.units(), "stages": 1}, [0.5]),
        (0.6, {"stages": 1}, [0.6]),  # single weights as ever
    ],
)
def test_stages_report_the_sparsity_that_whole_groups_reach(sparsity, options, expected):
    result = pruned(sparsity, **options)
    assert [stage["sparsity"] for stage in result.stages] == expected
    if "pattern" in options:
        assert result.report.total.kept == 32 * (1 - expected[-1])


@pytest.mark.parametrize(
    "sparsity, options, words",
    [
        (flj.targets.weights(9), {"pattern": N_M}, "must be None or a number, not a target"),
        (flj.targets.weights(9), {"scope": {"a": 0.5}}, "must be None or a number, not a target"),
        (flj.targets.loss_increase(0.1), {"pattern": N_M}, "`highest` must be at most 0.5"),
        (None, {"pattern": N_M, "selection": flj.selection.swaps()}, "single weights"),
        (0.6, {"pattern": N_M}, "at most 0.5"),
        (None, {}, "None, which only"),
    ],
)
def test_one_shot_refuses(sparsity, options, words):
    with pytest.raises(ValueError, match=words):
        pruned(sparsity, **options)


def test_units_repeat_along_an_axis_and_constants_are_passed_over():
    """As `find_couplings` writes them, for fused queries, keys and values and for batch norm."""
    rng = np.random.default_rng(0)
    scores = {"out": rng.uniform(size=(8, 3)), "qkv": rng.uniform(size=(5, 24))}
    pattern = flj.patterns.units([[("constants/norm/mean", 0, 2), ("out", 0, 2), ("qkv", 1, 2)]])
    masks = flj.make_masks(jax.tree.map(jnp.asarray, scores), 0.5, pattern=pattern, prunable=".*")
    # four units of two rows of `out` and of two columns in each third of `qkv`
    rows = scores["out"].reshape(4, 2 * 3).sum(1)
    columns = scores["qkv"].reshape(5, 3, 4, 2).sum((0, 1, 3))
    gone = np.argsort(rows + columns)[:2]
    kept = ~np.isin(np.arange(4), gone)
    np.testing.assert_array_equal(masks["out"], np.repeat(kept, 2)[:, None] & np.ones((8, 3), bool))
    expected = np.tile(np.repeat(kept, 2), 3) & np.ones((5, 24), bool)
    np.testing.assert_array_equal(masks["qkv"], expected)


def test_couplings_are_found_and_their_units_pruned_and_removed(key):
    """Of a network with batch norm and a flattened axis."""
    keys = jax.random.split(key, 3)
    params = {
        "a": jax.random.normal(keys[0], (6, 8)),
        "norm": {"scale": jnp.ones(8), "bias": jnp.zeros(8)},
        "c": jax.random.normal(keys[1], (2 * 8, 3)),
    }
    stats = {"mean": jnp.full(8, 0.1), "var": jnp.ones(8)}

    def f(params, x, stats):
        x = (x @ params["a"] - stats["mean"]) * jax.lax.rsqrt(stats["var"] + 1e-5)
        x = jnp.tanh(x * params["norm"]["scale"] + params["norm"]["bias"])
        return x.reshape(len(x), -1) @ params["c"]

    x = jax.random.normal(keys[2], (40, 2, 6))
    model = flj.Model(f, flj.likelihoods.categorical())
    pattern = flj.patterns.units(flj.find_couplings(f, params, x, constants=stats))
    batches = [(x[i : i + 20], jnp.arange(20) % 3, stats) for i in (0, 20)]
    estimator = flj.inverse.diagonal(model)
    result = flj.prune_one_shot(
        model, params, estimator, batches, sparsity=0.5, pattern=pattern, stages=1, saliency="obs"
    )
    small = flj.compact(f, result.params, result.masks, x, constants=stats)
    assert small.params["a"].shape == (6, 4) and small.params["c"].shape == (8, 3)
    np.testing.assert_allclose(
        f(small.params, x, small.constants), f(result.params, x, stats), atol=1e-5
    )
