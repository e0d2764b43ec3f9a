"""Which leaves are pruned: decided once, of the weights, by any of the forms that users write."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fishleg_jax as flj
from fishleg_jax import _prunable

MAGNITUDE = flj.inverse.identity()
MODEL = flj.Model(lambda p, x: x @ p["a"] + x @ p["b"], flj.likelihoods.gaussian())
BATCHES = [(jnp.ones((1, 2)), None)]
# the second leaf has scores far above its weights' magnitudes, and is of half precision
PARAMS = {
    "a": jnp.array([[1.0, 2.0], [3.0, 4.0]]),
    "b": jnp.array([[5.0, 6.0], [7.0, 8.0]], jnp.bfloat16),
}


def prune(prunable, params=PARAMS, **options):
    return flj.prune_one_shot(
        MODEL, params, MAGNITUDE, BATCHES, sparsity=0.5, prunable=prunable, **options
    )


def gradually(prunable, params=PARAMS, scope="global"):
    tx = flj.gradual_prune(MAGNITUDE, 0.5, prunable=prunable, scope=scope)
    state = tx.init(params)
    updates, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), state, params)
    return optax.apply_updates(params, updates), state


PREDICATES = [
    (lambda name, w: jnp.max(abs(w)) <= 8, 4),
    (lambda name, w: float(jnp.max(abs(w))) <= 4, 2),
    (lambda name, w: w.dtype == jnp.bfloat16, 2),
]


@pytest.mark.parametrize("predicate, pruned", PREDICATES, ids=["values", "float", "dtype"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_predicate_is_asked_of_the_weights_alone(predicate, pruned, scope):
    """Not of their scores, nor of the tracers of a compiled step."""
    seen = []

    def watched(name, w):
        seen.append((name, w.dtype, w.shape, isinstance(w, jax.core.Tracer)))
        return predicate(name, w)

    result = prune(flj.Leaves(watched, costs={"a": 1e-3, "b": 1e3}), scope=scope)
    assert sum(int(jnp.sum(~m)) for m in jax.tree.leaves(result.masks)) == pruned
    assert result.report.total.sparsity == 0.5
    params, state = gradually(watched, scope=scope)
    assert sum(int(jnp.sum(p == 0)) for p in params.values()) == pruned
    assert flj.check(state).sparsity == 0.5
    once = [(n, w.dtype, w.shape, False) for n, w in PARAMS.items()]
    assert seen == 2 * once


@pytest.mark.parametrize(
    "target", [flj.targets.weights(2), flj.targets.bytes(4), flj.targets.loss_increase(1e9)]
)
def test_targets_and_selections_carry_the_decision(target):
    by_dtype = lambda name, w: w.dtype == jnp.bfloat16
    batches = [(jnp.ones((1, 2)), MODEL.predict(PARAMS, jnp.ones((1, 2))))]
    options = {"stages": 2} if isinstance(target.at_most, int) else {}
    result = flj.prune_one_shot(
        MODEL, PARAMS, MAGNITUDE, batches, sparsity=target, prunable=by_dtype, **options
    )
    assert bool(result.masks["a"].all()) and int(jnp.sum(~result.masks["b"])) >= 2


def test_a_predicate_of_values_under_jit_is_refused_in_one_sentence():
    tx = flj.gradual_prune(MAGNITUDE, 0.5, prunable=lambda name, w: jnp.max(w) < 5)
    with pytest.raises(ValueError, match="prunable reads the values of 'a', .* under jit"):
        jax.jit(tx.init)(PARAMS)


TREE = {
    "hidden": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
    "out": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)},
}
HIDDEN = ["hidden/bias", "hidden/kernel"]


@pytest.mark.parametrize(
    "selection, chosen",
    [
        ({"hidden": True, "out": False}, HIDDEN),
        ({"hidden/kernel": True}, ["hidden/kernel"]),
        ({"bias": False, "hidden": True}, ["hidden/kernel"]),
        ({"^out": False}, ["hidden/kernel"]),  # the rest as by default
        ({"hidden": {"kernel": True, "bias": False}, "out": False}, ["hidden/kernel"]),
        (jax.tree.map(lambda w: w.shape[0] == 3, TREE), ["hidden/bias", "out/kernel"]),
        (jax.tree.map(lambda w: np.bool_(w.ndim == 2), TREE), ["hidden/kernel", "out/kernel"]),
        (["hidden"], HIDDEN),
        (("kernel", "out"), ["hidden/kernel", "out/bias", "out/kernel"]),
        ("k.*l$", ["hidden/kernel", "out/kernel"]),
        (None, ["hidden/kernel", "out/kernel"]),
    ],
)
def test_forms_of_a_selection(selection, chosen):
    found = _prunable.select(TREE, selection, "prunable")
    names = ["hidden/bias", "hidden/kernel", "out/bias", "out/kernel"]
    assert [n for n, yes in zip(names, found, strict=True) if yes] == chosen
    masks = flj.make_masks(jax.tree.map(jnp.ones_like, TREE), 0.99, prunable=selection)
    pruned = [n for n, m in zip(names, jax.tree.leaves(masks), strict=True) if not bool(m.all())]
    assert pruned == chosen
    state = flj.gradual_prune(MAGNITUDE, 0.5, prunable=selection).init(TREE)
    assert sorted(state.weights) == chosen


REFUSED = [
    (lambda name: True, "prunable must be a predicate .name, leaf., got"),
    (lambda name, w: "yes", "prunable must return True or False, got 'yes' for 'hidden/bias'"),
    ({"hidden": 1.0}, "a mapping must map regular expressions to True or False, got 'hidden': 1"),
    ({"hidden": "yes"}, "a mapping must map regular expressions to True or False"),
    ({"convolution": True}, "prunable: 'convolution' matches no leaf"),
    ({"hidden": False, "out": False}, "prunable selects no leaf: every boolean is False"),
    (True, "must choose among the leaves, got a single True"),
    (5, "prunable must be regular expressions over key paths, .* got 5"),
    ([True, False], "prunable must be regular expressions over key paths, .*True, False"),
    (["hidden", 3], "prunable must be regular expressions over key paths"),
    (jax.tree.map(lambda w: w > 0, TREE), "a mapping must map regular expressions"),
]


@pytest.mark.parametrize("selection, message", REFUSED)
def test_other_selections_are_refused(selection, message):
    with pytest.raises(ValueError, match=message) as one:
        flj.make_masks(TREE, 0.5, prunable=selection)
    with pytest.raises(ValueError):
        flj.gradual_prune(MAGNITUDE, 0.5, prunable=selection).init(TREE)
    assert len(str(one.value)) < 400


# what is left out by default


def by_default(tree, stacked=None):
    shapes = jax.tree.map(jnp.ones, tree, is_leaf=lambda x: isinstance(x, tuple))
    layered = flj._tree.stacked_leaves(shapes, stacked, "stacked")
    reasons = _prunable.reasons(shapes, None, "prunable", layered)
    names = [name for name, _ in flj._tree.named_leaves(shapes)]
    return dict(zip(names, reasons, strict=True))


def test_norms_biases_embeddings_and_vectors_are_left_out_by_default():
    """Stacked ones too, by their names: a scanned transformer's, and those of other frameworks."""
    layer = {
        "attention": {"kernel": (4, 8, 24), "bias": (4, 24)},
        "LayerNorm_0": {"scale": (4, 8), "bias": (4, 8)},
        "rms_norm": {"weight": (4, 8)},
        "ln_1": {"g": (4, 8)},
        "mlp": {"w": (4, 8, 32), "b": (4, 32)},
        "up": (4, 8, 32),
        "up_b": (4, 32),
        "b2": (4, 32),
        "w_b": (4, 7),
    }
    tree = {
        "layers": layer,
        "wte": {"embedding": (64, 8)},
        "pos_embedding": (1, 16, 8),
        "token_embedder": {"weight": (64, 8)},
        "conv": {"weight": (16, 3, 3, 3), "bias": (16, 1, 1)},
        "eqx_conv": {"weight": (16, 3, 3, 3), "shift_of_it": (16, 1, 1)},
        "patch_embed": {"kernel": (4, 4, 3, 8)},
        "head": {"kernel": (8, 10), "bias": (10,)},
        "a": (4, 4),
        "b": (4, 4),
    }
    found = by_default(tree)
    assert sorted(name for name, reason in found.items() if reason is None) == [
        "a",
        "b",
        "conv/weight",
        "eqx_conv/weight",
        "head/kernel",
        "layers/attention/kernel",
        "layers/mlp/w",
        "layers/up",
        "layers/w_b",
        "patch_embed/kernel",
    ]
    assert found["layers/mlp/b"] == found["conv/bias"] == found["head/bias"] == "bias"
    assert found["layers/up_b"] == found["layers/b2"] == "bias"
    assert found["layers/ln_1/g"] == found["layers/rms_norm/weight"] == "normalisation"
    assert found["wte/embedding"] == found["pos_embedding"] == "embedding or position"
    assert found["eqx_conv/shift_of_it"] == "vector"


def test_a_stacked_leaf_is_judged_without_its_layers():
    tree = {"layers": {"one": (4, 8), "two": (4, 8, 8)}}
    assert by_default(tree) == {"layers/one": None, "layers/two": None}
    assert by_default(tree, "layers") == {"layers/one": "vector", "layers/two": None}
    with pytest.raises(ValueError, match="stacked: 'head' matches no leaf"):
        by_default(tree, "head")
    with pytest.raises(ValueError, match="stacked must be a predicate of a name and a jax.Shape"):
        by_default(tree, lambda name, w: abs(w) > 1)
    with pytest.raises(ValueError, match="'one' must have at least two dimensions"):
        by_default({"one": (4,)}, "one")
    # a kernel that is no stack is read as vectors: the error says why there is nothing to prune
    with pytest.raises(ValueError, match="vectors.* left out .* judged without their leading axis"):
        flj.make_masks({"kernel": jnp.ones((4, 8))}, 0.5, stacked="kernel")


def test_leaves_are_only_for_prunings():
    params = {"kernel": jnp.ones((4, 8))}
    leaves = flj.Leaves("kernel")
    for function in (
        lambda: flj.make_masks(params, 0.5, prunable=leaves),
        lambda: flj.sparsity(params, leaves),
    ):
        with pytest.raises(ValueError, match="got flj.Leaves, .* prunable=leaves.prunable"):
            function()


def test_every_layer_of_a_stack_has_a_threshold_of_its_own(key):
    """As in an unrolled copy of the network, one shot and gradual."""
    scales = jnp.array([0.1, 1.0, 10.0])
    stack = jax.random.normal(key, (3, 4, 5)) * scales[:, None, None]
    params = {"layers": stack, "head": jax.random.normal(key, (5, 5))}
    unrolled = {"head": params["head"], **{f"layer{i}": stack[i] for i in range(3)}}
    masks = functools.partial(flj.make_masks, scope="layer")
    expected = masks(jax.tree.map(abs, unrolled), 0.55)
    found = masks(jax.tree.map(abs, params), 0.55, stacked="layers")
    together = masks(jax.tree.map(abs, params), 0.55)
    for i in range(3):
        np.testing.assert_array_equal(found["layers"][i], expected[f"layer{i}"])
        assert int(jnp.sum(~found["layers"][i])) == 11
    assert int(jnp.sum(~together["layers"][0])) > 11

    tx = flj.gradual_prune(MAGNITUDE, 0.55, scope="layer", prunable=flj.Leaves(stacked="layers"))
    updates, state = jax.jit(tx.update)(
        jax.tree.map(jnp.zeros_like, params), tx.init(params), params
    )
    jax.tree.map(np.testing.assert_array_equal, flj.masks(state), found)
    assert state.pruned.tolist() == [13, 11, 11, 11] and flj.check(state).ok
    moved = optax.apply_updates(params, updates)
    _, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), state, moved)
    assert flj.check(state).ok

    result = flj.prune_one_shot(
        MODEL,
        params,
        MAGNITUDE,
        BATCHES,
        sparsity=0.55,
        scope="layer",
        stages=2,
        prunable=flj.Leaves(stacked=["layers"]),
    )
    jax.tree.map(np.testing.assert_array_equal, result.masks, found)
