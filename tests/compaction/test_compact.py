"""Which units go, what makes up for them, and what goes along."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fishleg_jax as flj
from tests.compaction import networks

S = np.s_
X3 = jnp.ones((4, 3))
X = jax.random.normal(jax.random.key(0), (7, 5))
PARAMS = networks.mlp_params()
MASKS = networks.masks_without(PARAMS, w1=S[:, :3], w2=S[:, 4:], w3=S[0])
MASKS["w2"][6, 1:] = False  # gives to unit 0 alone, which goes
MASKS["w1"][2, 4] = False  # a single weight, which has to stay pruned
FIRST, SECOND = [("w1", 1), ("b1", 0), ("w2", 0)], [("w2", 1), ("b2", 0), ("w3", 0)]


@pytest.fixture(scope="module")
def small():
    return flj.compact(networks.mlp, PARAMS, MASKS, X)


def test_what_goes_and_what_stays(small):
    masked = flj.apply_masks(PARAMS, MASKS)
    np.testing.assert_allclose(
        networks.mlp(small.params, X), networks.mlp(masked, X), rtol=1e-5, atol=1e-5
    )
    stays = {tuple(x.coupling[0]): x.indices.tolist() for x in small.kept}
    assert stays == {("b1", 0): [3, 4, 5, 7], ("b2", 0): [1, 2, 3]}
    assert jax.tree.map(jnp.shape, small.params)["w2"] == (4, 3)
    assert small.params["w1"][2, 1] == 0 and not small.masks["w1"][2, 1]
    assert small.report.folded == ("b2", "b3")
    # tanh(relu(b1) w2 + b2) of the units that went, in the bias behind them
    gone = jax.nn.relu(PARAMS["b1"][:3]) @ masked["w2"][:3]
    np.testing.assert_allclose(
        small.params["b2"], (PARAMS["b2"] + gone)[jnp.array([1, 2, 3])], rtol=1e-5
    )


def test_the_report_counts(small):
    report = small.report
    after = sum(x.size for x in jax.tree.leaves(small.params))
    assert report.weights == (sum(x.size for x in jax.tree.leaves(PARAMS)), after)
    assert report.bytes[1] == 4 * after and report.flops[1] == 2 * after - (4 + 3 + 3)
    assert "b1 axis 0       8      4" in str(report) and repr(small).startswith("Compact(")


def test_units_that_see_constants_alone_go_as_well():
    """All of the first layer is pruned: what follows is a constant, folded to the end."""
    masks = networks.masks_without(PARAMS, w1=S[:])
    small = flj.compact(networks.mlp, PARAMS, masks, X)
    assert [(x.before, x.after) for x in small.report.units] == [(8, 1), (6, 1)]
    assert all("an axis needs one unit" in x.stay for x in small.report.units)


def test_sizes_are_rounded_up():
    small = flj.compact(networks.mlp, PARAMS, MASKS, X, multiple_of=8)
    assert [(x.before, x.after) for x in small.report.units] == [(8, 8), (6, 6)]
    small = flj.compact(networks.mlp, PARAMS, MASKS, X, multiple_of=3)
    assert [(x.before, x.after) for x in small.report.units] == [(8, 6), (6, 3)]
    assert small.report.units[0].stay == {"the size is rounded up": (0, 1)}


def test_couplings_of_the_user_and_found_ones_agree(small):
    given = flj.compact(networks.mlp, PARAMS, MASKS, X, couplings=[FIRST, SECOND])
    for one, two in zip(*map(jax.tree.leaves, (small.params, given.params)), strict=True):
        np.testing.assert_array_equal(one, two)
    alone = flj.compact(networks.mlp, PARAMS, MASKS, X, couplings=[FIRST])
    assert alone.params["w2"].shape == (5, 6)  # unit 6 gives to units that stay


def test_a_constant_without_a_bias_behind_it_stays():
    def f(params, x):
        return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"]

    params = {k: PARAMS[k] for k in ("w1", "b1", "w2")}
    params["b1"] = params["b1"].at[1].set(0)
    masks = networks.masks_without(params, w1=S[:, :2])
    small = flj.compact(f, params, masks, X)
    (units,) = small.report.units
    assert (units.before, units.after) == (8, 7)
    ((reason, which),) = units.stay.items()
    assert which == (0,) and "no bias makes up for it before the outputs" in reason


def test_a_bias_in_two_places_takes_up_nothing():
    def f(params, x):
        h = jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
        return h + jnp.sin(params["b2"])

    masks = networks.masks_without({k: PARAMS[k] for k in ("w1", "b1", "w2", "b2")}, w1=S[:, 0])
    small = flj.compact(f, {k: PARAMS[k] for k in masks}, masks, X)
    (units,) = small.report.units
    assert units.after == 8 and "used elsewhere" in next(iter(units.stay))


def test_a_head_that_lost_its_values_but_not_their_bias_is_reported():
    """It gives out a mean of equal values, which the rules do not know to be constant."""

    def f(p, x):
        q, k, v = (jnp.einsum("ble,ehd->blhd", x, p[name]) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("blhd,bmhd->bhlm", q, k))
        mixed = jnp.einsum("bhlm,bmhd->blhd", weights, v + p["bias"])
        return jnp.einsum("blhd,hde->ble", mixed, p["out"])

    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        name: jax.random.normal(key, (4, 3, 2)) for name, key in zip("qkv", keys, strict=False)
    }
    params |= {"out": jax.random.normal(keys[3], (3, 2, 4)), "bias": jnp.ones((3, 2))}
    masks = networks.masks_without(params, v=S[:, 1])
    small = flj.compact(f, params, masks, jax.random.normal(keys[4], (2, 5, 4)))
    assert small.params["out"].shape == (3, 2, 4)
    assert "unit 1 stays: all its weights in v are zero" in str(small.report)


def test_mixed_precision():
    """The coarsest precision inside decides how far outputs may differ."""

    def mixed(params, x):
        low = jax.tree.map(lambda w: w.astype(jnp.bfloat16), (params, x))
        return networks.mlp(*low).astype(jnp.float32)

    small = flj.compact(mixed, PARAMS, MASKS, X)
    assert [(x.before, x.after) for x in small.report.units] == [(8, 4), (6, 3)]
    assert small.params["w1"].dtype == jnp.float32
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)
    small = flj.compact(networks.mlp, half, MASKS, X.astype(jnp.bfloat16))
    assert small.params["w1"].shape == (5, 4) and small.params["w1"].dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype, limit", [("float32", 1e-5), ("bfloat16", 4 * 2.0**-7)])
def test_differences_beyond_rounding_are_refused_in_every_precision(dtype, limit):
    """Of couplings that were given; those that were found stay whole, and the report says so."""

    def f(params, x, slope):
        low = jax.tree.map(lambda w: w.astype(dtype), params)
        width = params["b1"].size
        return networks.mlp(low, x.astype(dtype)).astype(jnp.float32) * (1 + slope * (8 - width))

    # Four units of the first layer go, and the outputs grow by four slopes.
    within, beyond = limit / 16, limit / 2
    small = flj.compact(lambda p, x: f(p, x, within), PARAMS, MASKS, X)
    assert small.params["w1"].shape == (5, 4)
    message = f"more than the tolerance {limit:g}: .*pass a larger tolerance="
    with pytest.raises(ValueError, match=message):
        flj.compact(lambda p, x: f(p, x, beyond), PARAMS, MASKS, X)
    flj.compact(lambda p, x: f(p, x, beyond), PARAMS, MASKS, X, tolerance=4 * limit)


@pytest.mark.parametrize(
    "inside, given", list(itertools.product(["float32", "bfloat16"], repeat=2))
)
def test_units_on_whose_number_the_outputs_depend_stay(inside, given):
    """By half of them it shows in any precision: one of them would change less than rounding."""

    def f(params, x):
        low = jax.tree.map(lambda w: w.astype(inside), (params, x))
        return networks.mlp(*low) / params["b1"].size ** 0.5

    params, x = jax.tree.map(lambda w: w.astype(given), (PARAMS, X))
    masks = networks.masks_without(PARAMS, w1=S[:, :1], w2=S[:, 4:])
    small = flj.compact(f, params, masks, x)
    assert [(x.before, x.after) for x in small.report.units] == [(8, 8), (6, 4)]
    assert "unit 0 stays: the outputs depend on the number" in str(small.report)
    with pytest.raises(ValueError, match=r"couplings\[0\]: the outputs depend .*leave it out"):
        flj.compact(f, params, masks, x, couplings=[FIRST, SECOND])
    # nor are they chosen for what they cost
    squares = jax.tree.map(jnp.square, PARAMS)
    chosen = flj.choose_units(f, params, squares, flj.targets.weights(90), x)
    assert chosen["b1"].all() and not chosen["b2"].all()
    with pytest.raises(ValueError, match=r"couplings\[0\]: the outputs depend"):
        flj.choose_units(f, params, squares, flj.targets.weights(90), x, couplings=[FIRST])


def test_units_whose_number_is_fixed_stay_beside_others():
    """A reshape to a number of heads of its own, and a layer that is cut."""

    def f(params, x):
        heads = (x @ params["v"]).reshape(len(x), 3, -1)
        hidden = jax.nn.relu(jnp.tanh(heads).reshape(len(x), -1) @ params["o"])
        return jnp.tanh(hidden) @ params["out"]

    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"v": (5, 12), "o": (12, 8), "out": (8, 2)}
    params = {
        name: jax.random.normal(key, shape)
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }
    masks = networks.masks_without(params, o=S[:4], out=S[:3])
    small = flj.compact(f, params, masks, X)
    assert jax.tree.map(jnp.shape, small.params) == {"v": (5, 12), "o": (12, 5), "out": (5, 2)}
    assert "stays: f does not run with fewer" in str(small.report)
    squares = jax.tree.map(jnp.square, params)
    chosen = flj.choose_units(f, params, squares, flj.targets.flops(240), X)
    assert flj.compact(f, params, chosen, X).report.flops[1] <= 240


def test_layers_that_begin_at_zero_are_not_pruned():
    """Masks say what is pruned; without masks zeros do."""
    f = lambda p, x: x + jax.nn.gelu(x @ p["w1"] + p["b1"]) @ p["w2"]
    params = {
        "w1": jax.random.normal(jax.random.key(0), (5, 8)),
        "b1": jnp.ones(8),
        "w2": jnp.zeros((8, 5)),
    }
    masks = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
    small = flj.compact(f, params, masks, X)
    assert small.params["w1"].shape == (5, 8)
    masks["w2"] = masks["w2"].at[:3].set(False)
    assert flj.compact(f, params, masks, X).params["w1"].shape == (5, 5)
    assert flj.compact(f, params, None, X).params["w1"].shape == (5, 1)


def test_a_cast_of_the_inputs_alone_does_not_widen_the_tolerance():
    """The products of the parameters are in float32, and have its rounding."""
    coarse = lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)
    f = lambda p, x: networks.mlp(p, coarse(x)) / (1 + 1e-5 * p["b1"].size)
    with pytest.raises(ValueError, match="more than the tolerance 1e-05"):
        flj.compact(f, PARAMS, MASKS, X)


def test_small_outputs_are_compared_in_their_own_size():
    f = lambda p, x: 1e-6 * networks.mlp(p, x) / (1 + 1e-5 * p["b1"].size)
    with pytest.raises(ValueError, match="depends on the number of units"):
        flj.compact(f, PARAMS, MASKS, X)


def step(params, masks, tx, state):
    """A training step that holds what is pruned."""
    loss = lambda params: jnp.mean(networks.mlp(params, X) ** 2)
    gradient = flj.apply_masks(jax.grad(loss)(flj.apply_masks(params, masks)), masks)
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, updates


quick_step = jax.jit(step, static_argnums=2)


def test_training_goes_on(small):
    """The compact network's step is the masked network's, on the weights that stay."""
    tx = optax.chain(
        optax.trace(0.9), optax.scale_by_adam(), optax.scale_by_schedule(lambda n: -0.1)
    )
    masked, state, _ = quick_step(PARAMS, MASKS, tx, tx.init(PARAMS))
    before = flj.compact(networks.mlp, masked, MASKS, X)
    cut = before.opt_state(state)
    assert jax.tree.structure(cut) == jax.tree.structure(state)
    assert jax.tree.map(jnp.shape, cut) == jax.tree.map(jnp.shape, tx.init(before.params))
    _, after, expected = quick_step(masked, MASKS, tx, state)
    _, compact, found = quick_step(before.params, before.masks, tx, cut)
    for one, two in ((found, before.like(expected)), (compact, before.opt_state(after))):
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-6)


def test_states_that_can_not_go_along(small):
    model = flj.Model(networks.mlp, flj.likelihoods.gaussian())
    tx = flj.prune(optax.adam(0.1), model, 0.5, estimator=flj.inverse.identity())
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="start the pruning anew"):
        small.opt_state(state)
    assert small.opt_state(state.inner)[0].mu["w1"].shape == (5, 4)


LARGE = {"w1": jnp.ones((200, 300)), "w2": jnp.ones((300, 200))}


@pytest.fixture(scope="module")
def large():
    """A compact network whose kernels are large enough for factored moments."""
    masks = networks.masks_without(LARGE, w1=S[:, :10])
    f = lambda params, x: jnp.tanh(x @ params["w1"]) @ params["w2"]
    return flj.compact(f, LARGE, masks, jnp.ones((2, 200)))


@pytest.mark.parametrize(
    "tx",
    [
        optax.adam(0.1),
        optax.sgd(0.1, momentum=0.9),
        optax.masked(optax.adam(0.1), {"w1": True, "w2": False}),
        optax.multi_transform(
            {"a": optax.adam(0.1), "b": optax.sgd(0.1, 0.9)}, {"w1": "a", "w2": "b"}
        ),
        optax.contrib.muon(0.1),
        optax.MultiSteps(optax.adam(0.1), 2),
        optax.inject_hyperparams(optax.adam)(0.1),
    ],
    ids=["adam", "sgd", "masked", "multi_transform", "muon", "MultiSteps", "inject_hyperparams"],
)
def test_states_that_go_along(large, tx):
    """Those that the page names."""
    found, wanted = large.opt_state(tx.init(LARGE)), tx.init(large.params)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, wanted)


@pytest.mark.parametrize("name", ["adafactor", "lbfgs", "sm3"])
def test_states_of_other_shapes_are_refused(large, name):
    """Those that the page names."""
    tx = {"adafactor": optax.adafactor(0.1), "lbfgs": optax.lbfgs(), "sm3": optax.sm3(0.1)}[name]
    with pytest.raises(ValueError, match="start this optimiser anew"):
        large.opt_state(tx.init(LARGE))


def test_other_trees_are_refused(small):
    with pytest.raises(ValueError, match="'w3' must have the shape before"):
        small.like({**PARAMS, "w3": PARAMS["w1"]})
    with pytest.raises(ValueError, match="'b1' differs"):
        small.like({"w1": PARAMS["w1"]})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"f": 3}, r"f must be a function \(params, inputs\), or a Model"),
        ({"constants": {"a": X}}, r"f must be a function \(params, inputs, constants\)"),
        ({"masks": {"w1": MASKS["w1"]}}, "masks must have the structure"),
        ({"masks": PARAMS}, "masks must be booleans, True for weights that are kept, but 'b1'"),
        ({"multiple_of": 0}, "multiple_of must be a whole number"),
        ({"tolerance": -1}, "tolerance must be"),
        ({"couplings": "w1"}, "couplings must be a list"),
        ({"couplings": [["w1"]]}, r"couplings\[0\]\[0\] must be \(key path, axis\)"),
        ({"couplings": [[("w9", 0)]]}, "'w9' is not a leaf; the leaves are: b1, b2"),
        ({"couplings": [[("w1", 2)]]}, r"has no axis 2, its shape is \(5, 8\)"),
        ({"couplings": [[("w1", 1, 3)]]}, "can't be divided into blocks of 3"),
        ({"couplings": [[("w1", 1), ("w2", 1)]]}, "needs the same number of units"),
        ({"couplings": [[*FIRST, ("b1", 0)]]}, r"has \('b1', 0\) twice"),
        ({"couplings": [FIRST, FIRST]}, "put both into one"),
    ],
)
def test_bad_input(changes, message):
    arguments = {"f": networks.mlp, "params": PARAMS, "masks": MASKS, "inputs": X, **changes}
    with pytest.raises(ValueError, match=message):
        flj.compact(**arguments)


def test_functions_of_fixed_sizes_are_refused():
    def scaled(params, x):
        return networks.mlp(params, x) / params["b1"].size

    def padded(params, x):
        return networks.mlp({**params, "b1": params["b1"] + jnp.zeros(8)}, x)

    def numbered(params, x):
        return networks.mlp({**params, "b1": params["b1"] * jnp.arange(8)}, x)

    with pytest.raises(ValueError, match=r"couplings\[0\]: the outputs depend on the number"):
        flj.compact(scaled, PARAMS, MASKS, X, couplings=[FIRST])
    with pytest.raises(ValueError, match="does not run with the smaller arrays"):
        flj.compact(padded, PARAMS, networks.masks_without(PARAMS, w1=S[:, :3]), X)
    small = flj.compact(padded, PARAMS, MASKS, X)
    assert [(x.before, x.after) for x in small.report.units] == [(8, 8), (6, 3)]
    with pytest.raises(ValueError, match=r"couplings\[0\]: permuting its 8 units"):
        flj.compact(numbered, PARAMS, MASKS, X, couplings=[FIRST])
    small = flj.compact(numbered, PARAMS, MASKS, X)
    assert [x.name for x in small.report.units] == ["b2 axis 0"]


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "masks"])
def test_masks_keep_what_took_up_a_constant(given):
    """Also a bias that was zero, or pruned: masks applied once more change nothing."""
    f = lambda p, x: jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "w1": jax.random.normal(keys[0], (3, 8)).at[:, 2:].set(0),
        "b1": jnp.ones(8),
        "w2": jax.random.normal(keys[1], (8, 2)).at[1, 0].set(0),
        "b2": jnp.zeros(2),
    }
    x = jax.random.normal(keys[2], (4, 3))
    masks = jax.tree.map(lambda p: p != 0, params) if given else None
    small = flj.compact(f, params, masks, x)
    assert small.params["w1"].shape == (3, 2)
    again = flj.apply_masks(small.params, small.masks)
    np.testing.assert_allclose(f(again, x), f(params, x), atol=1e-5)
    assert small.masks["b2"].all() and not small.masks["w2"][1, 0]


def test_constants_of_an_optimiser_stay_as_they_are():
    """Such as the coefficients of muon's iteration."""
    f = lambda p, x: jnp.tanh(x @ p["w1"]) @ p["w2"]
    params = {"w1": jnp.ones((3, 8)).at[:, 2:].set(0), "w2": jnp.ones((8, 2))}
    small = flj.compact(f, params, None, jnp.ones((4, 3)))
    tx = optax.contrib.muon(1e-2)
    state = small.opt_state(tx.init(params))
    gradient = jax.tree.map(jnp.ones_like, small.params)
    assert jax.tree.map(jnp.shape, tx.update(gradient, state, small.params)[0]) == jax.tree.map(
        jnp.shape, small.params
    )
    with pytest.raises(ValueError, match="is not like one parameter"):
        small.opt_state({"rows": jnp.ones(8)})


@pytest.mark.parametrize(
    "run, message",
    [
        (lambda f, p: flj.compact(f, p, None, jnp.ones((0, 3))), "at least one example"),
        (lambda f, p: flj.compact(f, p, None, jnp.ones((4, 5))), r"not run on inputs of shapes"),
        (lambda f, p: jax.jit(lambda p: flj.compact(f, p, None, X3).params)(p), "under jit"),
        (lambda f, p: flj.compact(lambda p, x: f(p, x).argmax(-1), p, None, X3), "logits"),
    ],
    ids=["empty", "width", "traced", "labels"],
)
def test_what_can_not_be_compared_is_refused(run, message):
    f = lambda p, x: jnp.tanh(x @ p["w1"]) @ p["w2"]
    with pytest.raises(ValueError, match=message):
        run(f, {"w1": jnp.ones((3, 8)), "w2": jnp.ones((8, 2))})


def test_imaginary_parts_of_outputs_are_compared():
    """The real part does not depend on the order of the units, the imaginary part does."""

    def f(params, x):
        hidden = jax.nn.relu(x @ params["w1"])
        return jax.lax.complex(hidden @ params["w2"], hidden @ jnp.arange(4.0)[:, None])

    params = {"w1": jnp.ones((3, 4)), "w2": jnp.ones((4, 1))}
    with pytest.raises(ValueError, match="permuting its 4 units"):
        flj.compact(f, params, None, jnp.ones((2, 3)), couplings=[[("w1", 1), ("w2", 0)]])
