"""One-shot pruning from end to end on small models, and what it says to bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj
from tests import dense

MODEL = dense.categorical_mlp()


def untouchable():
    """An estimator that fails the test when anything of it is used."""

    def fail(*args, **kwargs):
        raise AssertionError("the input should have been refused before")

    return flj.InverseFisher(fail, fail, fail, fail, updates=3)


def problem(key, dtype=None):
    params = dense.mlp_params(key, (3, 6, 3), dtype)
    return params, [dense.classification_batch(jax.random.fold_in(key, i), 10) for i in range(3)]


def prune(params, batches, estimator=None, **arguments):
    arguments = {"sparsity": 0.7} | arguments
    estimator = flj.inverse.identity() if estimator is None else estimator
    return flj.prune_one_shot(MODEL, params, estimator, batches, **arguments)


@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.7, 0.98])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_identity_prunes_by_magnitude(key, sparsity, scope):
    params, batches = problem(key)
    result = prune(params, batches, sparsity=sparsity, scope=scope)
    kernels = [np.asarray(params[f"Dense_{i}"]["kernel"]).copy() for i in range(2)]
    groups = [kernels] if scope == "global" else [[k] for k in kernels]
    for group in groups:
        flat = np.concatenate([k.reshape(-1) for k in group])
        order = np.argsort(np.abs(flat), kind="stable")
        threshold = order[: int(np.floor(np.round(sparsity * len(flat), 9)))]
        flat[threshold] = 0
        cuts = np.cumsum([k.size for k in group])[:-1]
        for kernel, part in zip(group, np.split(flat, cuts), strict=True):
            kernel[...] = part.reshape(kernel.shape)
    for i in range(2):
        np.testing.assert_array_equal(result.params[f"Dense_{i}"]["kernel"], kernels[i])
        bias = result.params[f"Dense_{i}"]["bias"]
        np.testing.assert_array_equal(bias, params[f"Dense_{i}"]["bias"])


@pytest.fixture(scope="module")
def fitted():
    key = jax.random.key(1)
    params, batches = problem(key)
    estimator = flj.inverse.fishleg(MODEL, start=8, updates=30)
    return params, batches, estimator, prune(params, batches, estimator, key=key, **PLAIN)


# formulas of Optimal Brain Surgeon by themselves, nothing chosen by a loss
PLAIN = {"saliency": "obs", "compensation": flj.compensation.independent(), "stages": 1}


def test_fishleg_prunes_as_much_as_was_asked_for(fitted):
    params, _, _, result = fitted
    assert flj.sparsity(result.params) == int(0.7 * 36) / 36
    for w, m in zip(jax.tree.leaves(result.params), jax.tree.leaves(result.masks), strict=True):
        assert (np.asarray(w)[~np.asarray(m)] == 0.0).all()
    changed = [
        (result.params[f"Dense_{i}"][leaf] != params[f"Dense_{i}"][leaf])
        & result.masks[f"Dense_{i}"][leaf]
        for i in range(2)
        for leaf in ("kernel", "bias")
    ]
    assert any(c.any() for c in changed)  # the kept ones were compensated
    assert jax.tree.structure(result.params) == jax.tree.structure(params)


def test_scores_masks_and_weights_belong_together(fitted):
    """What a user puts together by hand is what `prune_one_shot` does."""
    params, _, estimator, result = fitted
    scores = flj.obs_saliency(params, dense.jitted(estimator.diagonal)(result.state, params))
    masks = flj.make_masks(scores, 0.7)
    jax.tree.map(np.testing.assert_array_equal, masks, result.masks)
    everything = jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)
    correct = flj.compensation.independent()
    delta, _ = correct(params, everything, masks, None, estimator, result.state)
    by_hand = flj.apply_masks(jax.tree.map(jnp.add, params, delta), masks)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), by_hand, result.params
    )


def test_report_agrees_with_the_masks(fitted):
    params, _, estimator, result = fitted
    rows, total = result.report.rows, result.report.total
    assert [r.name for r in rows] == ["Dense_0/kernel", "Dense_1/kernel"]
    for row, i in zip(rows, range(2), strict=True):
        mask = result.masks[f"Dense_{i}"]["kernel"]
        assert row.shape == mask.shape and row.weights == mask.size
        assert row.kept == int(mask.sum()) and row.sparsity == 1 - row.kept / row.weights
    assert total.weights == 36 and total.weights - total.kept == 25
    assert sum(r.share for r in rows) == pytest.approx(1)
    scores = flj.obs_saliency(params, dense.jitted(estimator.diagonal)(result.state, params))
    removed = sum(
        float(jnp.where(m, 0, s).sum())
        for s, m in zip(jax.tree.leaves(scores), jax.tree.leaves(result.masks), strict=True)
    )
    assert total.predicted == pytest.approx(removed, rel=1e-5)


def test_a_fitted_state_can_be_used_again(fitted):
    params, batches, estimator, result = fitted
    refusing = estimator._replace(update=untouchable().update)
    options = {name: value for name, value in PLAIN.items() if name != "stages"}
    again = prune(params, batches, refusing, **options, stages=flj.Stages(state=result.state))
    jax.tree.map(np.testing.assert_array_equal, again.params, result.params)
    jax.tree.map(np.testing.assert_array_equal, again.masks, result.masks)
    sparser = prune(params, batches, refusing, sparsity=0.9, stages=flj.Stages(state=result.state))
    assert sparser.report.total.kept == 36 - 32


def test_the_same_key_gives_the_same_result_and_another_another(fitted):
    params, batches, estimator, result = fitted
    same = prune(params, batches, estimator, key=jax.random.key(1), **PLAIN)
    jax.tree.map(np.testing.assert_array_equal, same.params, result.params)
    other = prune(params, batches, estimator, key=jax.random.key(2))
    assert (dense.ravel(other.params) != dense.ravel(result.params)).any()


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_narrow_weights_keep_their_dtype_and_exact_zeros(key, dtype):
    params, batches = problem(key, jnp.dtype(dtype))
    estimator = flj.inverse.fishleg(MODEL, start=4, learn=False)
    result = prune(params, batches, estimator)
    assert {x.dtype for x in jax.tree.leaves(result.params)} == {jnp.dtype(dtype)}
    assert flj.sparsity(result.params) == 25 / 36


def test_progress_is_told(key):
    params, batches = problem(key)
    told = []
    estimator = flj.inverse.identity()._replace(updates=None)
    prune(
        params,
        batches,
        estimator,
        stages=flj.Stages(on_update=lambda i, n, state: told.append((i, n))),
    )
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_fit_goes_around_its_batches_with_a_new_key_each_time(key):
    params, batches = problem(key)
    seen = []

    def update(state, params, batch, key, mask=None):
        # the last row is the newest: a state of one shape, whose memory can be used again
        row = jnp.stack([batch[0][0, 0], jax.random.uniform(key)])
        return jnp.concatenate([state[1:], row[None]])

    estimator = flj.InverseFisher(lambda params: jnp.zeros((5, 2)), update, None, None, updates=5)
    state = flj.fit(estimator, params, batches, key=key, on_update=lambda *a: seen.append(a[0]))
    np.testing.assert_array_equal(state[:, 0], [batches[i % 3][0][0, 0] for i in range(5)])
    assert len(set(state[:, 1].tolist())) == 5 and seen == [1, 2, 3, 4, 5]


def test_a_broken_inverse_is_an_error_not_a_network(key):
    params, batches = problem(key)
    broken = flj.inverse.identity()._replace(
        diagonal=lambda state, params, mask=None: jax.tree.map(lambda x: x * jnp.nan, params)
    )
    with pytest.raises(FloatingPointError, match="the diagonal of the inverse Fisher.*Dense_0"):
        prune(params, batches, broken)
    broken = flj.inverse.identity()._replace(
        multiply=lambda state, v, mask=None: jax.tree.map(lambda x: x * jnp.inf + jnp.nan, v)
    )
    with pytest.raises(FloatingPointError, match="the compensated weights"):
        prune(params, batches, broken)


def changed(tree, leaf, change):
    layer, name = leaf.split("/")
    return tree | {layer: tree[layer] | {name: change(tree[layer][name])}}


PARAMS, BATCHES = problem(jax.random.key(0))
INPUTS, LABELS = BATCHES[0]
BAD_PARAMS = {
    "nan": (lambda x: x.at[0, 0].set(jnp.nan), "params: 'Dense_0/kernel' has NaN or infinite"),
    "inf": (lambda x: x.at[0, 0].set(jnp.inf), "params: 'Dense_0/kernel' has NaN or infinite"),
    "int": (lambda x: jnp.ones(x.shape, int), "params: 'Dense_0/kernel' must be a floating-point"),
    "list": (lambda x: 1.0, "params: 'Dense_0/kernel' must be a floating-point"),
    "complex": (lambda x: x + 0j, "params: 'Dense_0/kernel' must be a floating-point"),
}


@pytest.mark.parametrize("name", BAD_PARAMS)
def test_bad_weights_are_refused_before_any_work(name):
    change, message = BAD_PARAMS[name]
    params = changed(PARAMS, "Dense_0/kernel", change)
    with pytest.raises(ValueError, match=message):
        prune(params, BATCHES, untouchable())


def test_no_weights_at_all():
    with pytest.raises(ValueError, match="params has no leaves"):
        prune({}, BATCHES, untouchable())


@pytest.mark.parametrize(
    "batches, message",
    [
        ([], "batches is empty"),
        ((INPUTS, LABELS), "batches must be a sequence of batches.*got a single batch"),
        ([INPUTS], "batches\\[0\\] must be a tuple"),
        ([BATCHES[0], (INPUTS,)], "batches\\[1\\] must be a tuple .* of length 1"),
        ([(INPUTS, LABELS[:-1])], "batches\\[0\\]: inputs and targets must have the same number"),
        ([(INPUTS[:0], LABELS[:0])], "batches\\[0\\] is empty"),
        ([(None, LABELS)], "batches\\[0\\] must have an array in its inputs"),
        ([BATCHES[0], (INPUTS.at[3, 1].set(jnp.nan), LABELS)], "batches\\[1\\]: leaf .* NaN"),
        ([(INPUTS, LABELS * jnp.inf)], "batches\\[0\\]: leaf .* NaN or infinite"),
        ([(INPUTS, LABELS, jnp.array(jnp.nan))], "batches\\[0\\]: leaf .* NaN"),
        ([(INPUTS, jnp.array(1))], "batches\\[0\\]: .* must have a leading axis of examples"),
    ],
)
def test_bad_batches_are_refused_before_any_work(batches, message):
    with pytest.raises(ValueError, match=message):
        prune(PARAMS, batches, untouchable())


def no(*_):
    raise AssertionError("the input should have been refused before")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sparsity": np.str_("a")}, "sparsity must be"),
        ({"stages": flj.Stages(0, schedule=[])}, "stages must be an integer of at least 1, got 0"),
        ({"stages": flj.Stages(schedule=None)}, "schedule must be one of geometric, .*, got None"),
        ({"stages": flj.Stages(schedule=3)}, "schedule must be one of geometric, .*, got 3"),
        (
            {"stages": flj.Stages(schedule=[])},
            "schedule must be a name, or 1 increasing .*, got \\[\\]",
        ),
        (
            {"stages": flj.Stages(schedule=["a"])},
            "schedule must contain numbers in \\[0, 1\\), got 'a'",
        ),
        (
            {"stages": flj.Stages(batches_per_stage=1.0)},
            "batches_per_stage must be a whole number from 1 to 3",
        ),
        ({"stages": flj.Stages(batches_per_stage=4)}, "batches_per_stage must be .*, got 4"),
        ({"compensation": "group"}, "compensation must be one of flj.compensation"),
        ({"compensation": flj.compensation.group}, "compensation must be one of"),
        ({"selection": flj.selection.swaps}, "selection must be one of flj.selection"),
        (
            {"stages": flj.Stages(recalibrate=3)},
            "recalibrate must be a function \\(params, batches\\) or None",
        ),
        (
            {"stages": flj.Stages(on_update=no, on_stage=3)},
            "on_stage must be a function \\(result\\) or None",
        ),
        ({"stages": flj.Stages(on_update=lambda: None)}, "on_update must be a function"),
        ({"estimator": flj.inverse.kfac}, "estimator must be an InverseFisher"),
        ({"key": 3}, "key must be a random key, such as jax.random.key\\(0\\), got 3"),
        (
            {"prunable": flj.Leaves(costs=jax.tree.map(str, PARAMS))},
            "costs: .* must be a number or an array of numbers",
        ),
        ({"sparsity": -0.1}, "sparsity must be"),
        ({"sparsity": 1.0}, "sparsity must be"),
        ({"sparsity": float("nan")}, "sparsity must be"),
        ({"sparsity": "a"}, "sparsity must be"),
        ({"scope": "leaf"}, "scope must be one of"),
        ({"prunable": "convolution"}, "prunable: 'convolution' matches no leaf"),
        ({"prunable": lambda name, leaf: False}, "prunable selects no leaf"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        prune(PARAMS, BATCHES, **{"estimator": untouchable()} | arguments)


def test_labels_that_are_needed_are_asked_for_before_any_work():
    unlabelled = [(inputs, None) for inputs, _ in BATCHES]
    with pytest.raises(ValueError, match="batches must have labels for first_order=True"):
        prune(
            PARAMS,
            unlabelled,
            untouchable(),
            compensation=flj.compensation.independent(first_order=True),
        )
    with pytest.raises(ValueError, match="held_out must have labels"):
        prune(PARAMS, unlabelled, untouchable(), held_out=unlabelled)


def test_it_runs_on_the_host():
    for function, argument in (
        (lambda params: prune(params, BATCHES, untouchable()), PARAMS),
        (lambda _: prune(PARAMS, BATCHES, untouchable()), 1.0),  # constants become tracers there
    ):
        with pytest.raises(ValueError, match="got tracers: one-shot pruning runs on the host"):
            jax.jit(function)(argument)


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_a_key_of_either_kind_is_one(make):
    prune(PARAMS, BATCHES, key=make(3), stages=flj.Stages(batches_per_stage=np.int64(2)))


def test_nothing_prunable():
    with pytest.raises(ValueError, match="prunable selects no leaf"):
        prune({"bias": jnp.ones(3)}, BATCHES, untouchable())


def test_fit_checks_masks():
    with pytest.raises(ValueError, match="masks must have the structure"):
        flj.fit(untouchable(), PARAMS, BATCHES, key=jax.random.key(0), masks={})


def test_a_state_of_other_parameters_is_refused():
    model = flj.Model(lambda w, x: x @ w, flj.likelihoods.gaussian())
    estimator = flj.inverse.fishleg(model)
    state = estimator.init(jnp.ones((3, 2)))
    batch = (jnp.ones((4, 5)), None)
    with pytest.raises(ValueError, match="state must be a fitted state of this estimator"):
        flj.prune_one_shot(
            model,
            jnp.ones((5, 2)),
            estimator,
            [batch],
            sparsity=0.5,
            stages=flj.Stages(state=state),
        )
