"""Disagreement of two networks, against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fishleg_jax as flj
from fishleg_jax.mismatch.calibration import calibration_error
from fishleg_jax.mismatch.report import quantile_index

MODEL = flj.Model(lambda params, x: x @ params, flj.likelihoods.categorical())
LABELS = np.array([0, 1, 2, 2, 1, 0])
DENSE = np.array([0, 1, 2, 1, 1, 1])  # predicted classes
PRUNED = np.array([0, 2, 2, 2, 0, 2])  # one lost to 2, one gained, one lost to 0, one wrong twice
MARGINS = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])


def logits(classes):
    return MARGINS[:, None] * np.eye(3)[classes]


def look_up(classes):
    """Network whose inputs are the numbers of the examples."""
    return lambda rows: jnp.asarray(logits(classes))[rows]


def compared(targets=LABELS, **options):
    rows = np.arange(6)
    batches = [
        (rows[:4], None if targets is None else targets[:4]),
        (rows[4:], None if targets is None else targets[4:]),
    ]
    return flj.disagreement(look_up(DENSE), look_up(PRUNED), batches, **options)


def test_counts_are_those_by_hand():
    found = compared(groups=2, memorisation=[0.0, 0.5, 0.0, 0.25, 1.0, 0.75])
    assert (found.examples, found.mismatches, found.lost, found.gained) == (6, 4, 2, 1)
    assert found.accuracies == (4 / 6, 3 / 6) and found.rate == 4 / 6
    np.testing.assert_allclose(found.error, (4 / 6 * 2 / 6 / 6) ** 0.5)
    by_class = [(x.low, x.examples, x.mismatches, x.lost, x.gained) for x in found.classes]
    assert by_class == [(0, 2, 1, 0, 0), (1, 2, 2, 2, 0), (2, 2, 1, 0, 1)]
    assert [(x.low, x.high, x.mismatches) for x in found.margins] == [(1, 3, 1), (4, 6, 3)]
    assert [(x.low, x.high, x.mismatches) for x in found.memorised] == [(0, 0.25, 1), (0.5, 1, 3)]
    mean, error = found.memorised_excess
    differ, same = np.array([0.5, 0.25, 1.0, 0.75]), np.zeros(2)
    np.testing.assert_allclose(mean, differ.mean())
    np.testing.assert_allclose(error, (differ.var(ddof=1) / 4 + same.var(ddof=1) / 2) ** 0.5)


def test_positions_come_by_dense_margin():
    found = compared()
    assert found.where().tolist() == [5, 4, 3, 1]
    assert found.where("lost").tolist() == [4, 1] and found.where("gained").tolist() == [3]
    np.testing.assert_array_equal(found.dense_margins, MARGINS)


def test_the_calibration_error_is_that_of_the_formula():
    confidences = np.array(jax.nn.softmax(logits(DENSE)).max(axis=1))
    expected = 0.0
    for low in np.arange(4) / 4:  # Guo et al., eq. 3, bin by bin
        own = (confidences >= low) & (confidences < low + 0.25)
        if own.any():
            accuracy = (DENSE == LABELS)[own].mean()
            expected += own.mean() * abs(accuracy - confidences[own].mean())
    assert expected > 0.05
    np.testing.assert_allclose(compared(bins=4).calibration[0], expected, rtol=1e-6)
    assert calibration_error(np.ones(3), np.ones(3, bool), 15) == 0  # a confidence of 1 has a bin


def test_without_labels_flips_are_left_out():
    found = compared(None)
    assert found.mismatches == 4
    assert found.lost is found.gained is found.accuracies is found.calibration is None
    assert [(x.low, x.mismatches) for x in found.classes] == [(0, 0), (1, 4), (2, 0)]
    with pytest.raises(ValueError, match="kind must be 'mismatched'"):
        found.where("lost")


def test_the_report_can_be_read():
    found = compared(memorisation=np.arange(6.0), groups=2)
    text = str(found)
    first = "4 of 6 differ (66.67 %): 2 lost, 1 gained; accuracy 66.67 to 50.00 %"
    assert text.startswith(first) and repr(found) == f"Disagreement({first})"
    for title in ("class ", "margin, nats", "memorisation", "calibration error", "memorised by +"):
        assert title in text
    assert "lost" not in str(compared(None))


def test_pairs_functions_and_constants_agree(key):
    weights = jax.random.normal(key, (4, 3))
    inputs, other = jax.random.normal(jax.random.key(1), (2, 20, 4))
    labels = (inputs @ weights).argmax(axis=1)
    scaled = lambda params, x, constants: constants * (x @ params)
    batches = [(inputs, labels, jnp.float32(2)), (other, labels, jnp.float32(2))]
    half = weights.at[0].set(0)
    pair = flj.disagreement((scaled, weights), (scaled, half), batches)
    assert 0 < pair.mismatches < 40
    functions = [
        lambda x, constants: constants * (x @ weights),
        lambda x: x @ half,  # constants of its own
    ]
    again = flj.disagreement(*functions, batches)
    assert again.mismatches == pair.mismatches
    np.testing.assert_allclose(again.dense_margins, pair.dense_margins, rtol=1e-6)
    with_model = flj.Model(scaled, flj.likelihoods.categorical())
    assert flj.disagreement((with_model, weights), functions[1], batches).lost == pair.lost


def test_tokens_count_one_by_one(key):
    params = jax.random.normal(key, (4, 5))
    inputs = jax.random.normal(jax.random.key(1), (3, 7, 4))
    labels = (inputs @ params).argmax(axis=-1)
    found = flj.disagreement((MODEL, params), (MODEL, -params), [(inputs, labels)])
    assert found.examples == found.lost == 21 and found.accuracies == (1, 0)


def test_groups_are_equal_but_for_equal_values():
    sizes = lambda values, number: np.bincount(quantile_index(np.array(values), number)).tolist()
    assert sizes(range(20), 4) == [5, 5, 5, 5]
    assert sizes([0] * 14 + list(range(1, 7)), 4) == [14, 2, 2, 2]  # as scores that are mostly 0
    assert sizes([1, 1, 1], 4) == [3] and sizes([2, 1], 1) == [2]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(1, 4), st.booleans())
def test_a_network_agrees_with_itself(seed, groups, labelled):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(12, 4)).astype(np.float32)
    params = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    labels = rng.integers(0, 3, 12) if labelled else None
    found = flj.disagreement(
        (MODEL, params),
        (MODEL, params),
        [(inputs, labels)],
        memorisation=rng.normal(size=12),
        groups=groups,
    )
    assert found.mismatches == 0 and found.rate == 0 and len(found.where()) == 0
    assert not found.lost and not found.gained
    for part in (found.classes, found.margins, found.memorised):
        assert sum(x.examples for x in part) == 12 and not any(x.mismatches for x in part)
    if labelled:
        assert found.accuracies[0] == found.accuracies[1]
        assert found.calibration[0] == found.calibration[1]


PADDED = flj.Model(MODEL.predict, flj.likelihoods.categorical(ignore=-100))


def sequences(dtype=np.int32, padding=-100):
    """Sequences of three tokens with two of padding behind them, and the same without these."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(7, 5, 4)).astype(np.float32)
    labels = rng.integers(0, 3, (7, 5)).astype(dtype)
    labels[:, 3:] = padding
    weights = jnp.asarray(rng.normal(size=(2, 4, 3)), jnp.float32)
    return weights, inputs, labels, rng.normal(size=(7, 5))


def test_padding_that_the_likelihood_declares_is_not_counted():
    (dense, pruned), inputs, labels, scores = sequences()
    whole = [(inputs[:4], labels[:4]), (inputs[4:], labels[4:])]
    short = [(x[:, :3], y[:, :3]) for x, y in whole]
    function = lambda x: x @ pruned
    expected = flj.disagreement(
        (MODEL, dense), (MODEL, pruned), short, memorisation=scores[:, :3].ravel()
    )
    unknown = np.where(labels == -100, np.nan, scores)  # scores of padding are not read
    for pair in (
        ((PADDED, dense), (PADDED, pruned)),
        ((PADDED, dense), function),
        (lambda x: x @ dense, (PADDED, pruned)),
        ((MODEL, dense), (PADDED, pruned)),
    ):
        found = flj.disagreement(*pair, whole, memorisation=unknown.ravel())
        assert found.examples == 21 and found.mismatches > 3
        assert str(found) == str(expected)
        np.testing.assert_array_equal(found.where("lost"), expected.where("lost"))
        # places among all labels
        np.testing.assert_array_equal(found.positions, np.flatnonzero(labels.ravel() != -100))
        np.testing.assert_array_equal(labels.ravel()[found.positions], found.targets)
    np.testing.assert_array_equal(expected.positions, np.arange(21))
    # without labels nothing is known to be padding
    assert flj.disagreement((PADDED, dense), function, [(inputs, None)]).examples == 35


def test_padding_of_an_unsigned_type_and_outputs_that_are_not_finite_there():
    (dense, pruned), inputs, labels, _ = sequences(np.uint8, 255)
    model = flj.Model(MODEL.predict, flj.likelihoods.categorical(ignore=255))
    inputs = jnp.asarray(inputs)
    expected = flj.disagreement((model, dense), (model, pruned), [(inputs, labels)])
    broken = lambda x: (x @ pruned).at[:, 3:].set(jnp.nan)
    found = flj.disagreement((model, dense), broken, [(inputs, labels)])
    assert found.examples == 21 and str(found) == str(expected)
    with pytest.raises(FloatingPointError, match=r"pruned predicts NaN .* batches\[1\]"):
        labels = labels.copy()
        labels[5, 4] = 1
        batches = [(inputs[:4], labels[:4]), (inputs[4:], labels[4:])]
        flj.disagreement((model, dense), broken, batches)


def test_padding_that_is_a_class_or_all_there_is_is_refused():
    (dense, pruned), inputs, labels, _ = sequences()
    within = flj.Model(MODEL.predict, flj.likelihoods.categorical(ignore=2))
    with pytest.raises(ValueError, match="ignore must lie outside the 3 classes, got 2"):
        flj.disagreement((within, dense), (MODEL, pruned), [(inputs, np.abs(labels) % 3)])
    with pytest.raises(ValueError, match="a label other than padding, got -100 alone"):
        flj.disagreement((PADDED, dense), (PADDED, pruned), [(inputs[:, 3:], labels[:, 3:])])
    with pytest.raises(ValueError, match="0 to 2, .* or -100 for padding, got -1"):
        flj.disagreement((PADDED, dense), (PADDED, pruned), [(inputs, np.maximum(labels, -1))])
    with pytest.raises(ValueError, match=r"give a Model with .*ignore=-100\)\), got -100"):
        flj.disagreement((MODEL, dense), lambda x: x @ pruned, [(inputs, labels)])


def test_predictions_without_a_score_are_left_out_of_memorisation():
    scores = np.array([0.0, np.nan, 0.0, 0.25, 1.0, np.nan])
    found = compared(groups=2, memorisation=scores)
    assert found.mismatches == 4 and found.unscored == 2
    assert [(x.low, x.examples, x.mismatches) for x in found.memorised] == [(0, 2, 0), (0.25, 2, 2)]
    np.testing.assert_allclose(found.memorised_excess[0], (0.25 + 1) / 2)  # not with zeros
    assert "2 predictions without a score are left out" in str(found)
    assert compared(memorisation=np.zeros(6)).unscored == compared().unscored == 0


def with_label(label):
    return [(np.arange(6), np.where(np.arange(6) == 2, label, LABELS))]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: flj.disagreement(MODEL, look_up(PRUNED), with_label(0)), "pair .model, params"),
        (lambda: flj.disagreement(3, look_up(PRUNED), with_label(0)), "dense must be a function"),
        (lambda: flj.disagreement(look_up(DENSE), look_up(PRUNED), with_label(3)), "got 3"),
        (lambda: flj.disagreement(look_up(DENSE), look_up(PRUNED), []), "batches is empty"),
        (lambda: compared(LABELS.astype(float)), "of dtype float64"),
        (lambda: compared(memorisation=[0.0]), r"6 predictions, got shape \(1,\)"),
        (lambda: compared(memorisation=[np.nan] * 6), "memorisation must be finite, .* got 6 NaN"),
        (lambda: compared(memorisation=[np.inf] * 6), "0 NaN and 6 infinite of 6"),
        (lambda: compared(groups=0), "groups must be a whole number"),
        (lambda: compared().where("wrong"), "kind must be one of mismatched, lost, gained"),
        (
            lambda: flj.disagreement(look_up(DENSE), lambda x: jnp.ones((6, 4)), with_label(0)),
            "6 predictions of 3 classes and 6 of 4",
        ),
        (
            lambda: flj.disagreement(look_up(DENSE), lambda x: jnp.ones((6, 1)), with_label(0)),
            "2 or more classes",
        ),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_outputs_that_are_not_finite_are_refused():
    with pytest.raises(FloatingPointError, match=r"pruned predicts NaN .* batches\[0\]"):
        nan = lambda x: jnp.full((6, 3), jnp.nan)
        flj.disagreement(look_up(DENSE), nan, with_label(0))
