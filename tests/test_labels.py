"""Padding that `categorical(ignore=...)` leaves out, and labels outside of the classes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fishleg_jax as flj
from tests import dense
from tests.marks import some_slow

EXAMPLES, TOKENS, CLASSES = 6, 3, 3
PAD = -100
PADDED = flj.Model(dense.mlp, flj.likelihoods.categorical(ignore=PAD))
KINDS = ("exact", "sampled", "empirical")


def silenced(params, inputs):
    """Logits that are constant at padding: what is left out, made a part of the network."""
    x, valid = inputs
    return jnp.where(valid[..., None], dense.mlp(params, x), 0)


SILENCED = flj.Model(silenced, flj.likelihoods.categorical())


@functools.cache
def sequences(seed):
    """Weights, sequences, labels and a mask of valid tokens; the first example is all padding."""
    keys = jax.random.split(jax.random.key(seed), 4)
    params = dense.mlp_params(keys[0], (2, 3, CLASSES), jnp.float32)
    inputs = jax.random.normal(keys[1], (EXAMPLES, TOKENS, 2), jnp.float32)
    labels = jax.random.randint(keys[2], (EXAMPLES, TOKENS), 0, CLASSES, jnp.int32)
    valid = jax.random.bernoulli(keys[3], 0.6, (EXAMPLES, TOKENS)).at[0].set(False)
    return params, inputs, labels, valid.at[1, 0].set(True)


def padded(seed):
    """Weights, the batch with its padding, and the same batch for `SILENCED`."""
    params, inputs, labels, valid = sequences(seed)
    batch = inputs, jnp.where(valid, labels, PAD)
    return params, batch, ((inputs, valid), labels)


def reference(seed, labels=None):
    """Loss, gradients of all examples and exact Fisher from the valid tokens alone, densely."""
    params, inputs, own, valid = sequences(seed)
    params, inputs = jax.tree.map(lambda x: x.astype(jnp.float64), (params, inputs))
    labels = np.asarray(own if labels is None else labels)
    outputs, jacobians = map(np.asarray, dense.jacobian(PADDED, params, (inputs, None)))
    losses, rows, fisher = np.zeros(EXAMPLES), [], 0
    for e in range(EXAMPLES):
        logits = outputs[e].reshape(TOKENS, CLASSES)
        jacobian = jacobians[e].reshape(TOKENS, CLASSES, -1)
        row = np.zeros(jacobian.shape[-1])
        for t in np.flatnonzero(valid[e]):
            p = dense.softmax(logits[t])
            losses[e] -= np.log(p[labels[e, t]])
            row += jacobian[t].T @ (p - np.eye(CLASSES)[labels[e, t]])
            fisher = fisher + jacobian[t].T @ dense.categorical_information(logits[t]) @ jacobian[t]
        rows.append(row)
    return losses, np.stack(rows), fisher / EXAMPLES


def in_double(tree):
    return jax.tree.map(
        lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def stacked(gradients):
    return np.stack([dense.ravel(jax.tree.map(lambda x: x[i], gradients)) for i in range(EXAMPLES)])  # noqa: B023


@functools.partial(jax.jit, static_argnums=0)
def losses_and_gradients(chunk, params, batch):
    """Losses, the gradient of their mean, and the gradients of all examples."""
    own = functools.partial(flj.per_example_gradients, PADDED, examples_per_chunk=chunk)
    mean = lambda p: flj.loss(PADDED, p, batch, examples_per_chunk=chunk)
    losses = flj.losses(PADDED, params, batch, examples_per_chunk=chunk)
    return losses, jax.grad(mean)(params), own(params, batch)


@pytest.mark.parametrize("seed", range(2))
def test_padding_is_left_out_of_losses_and_gradients(x64, seed):
    params, batch, _ = in_double(padded(seed))
    losses, rows, _ = reference(seed)
    assert losses[0] == 0 and not rows[0].any()
    for chunk in (None, 4):
        found, gradient, gradients = losses_and_gradients(chunk, params, batch)
        np.testing.assert_allclose(found, losses, atol=1e-12)
        np.testing.assert_allclose(dense.ravel(gradient), rows.mean(0), atol=1e-12)
        np.testing.assert_allclose(stacked(gradients), rows, atol=1e-12)


@pytest.mark.parametrize("seed, chunk", [(0, None), (1, 4)])
def test_padding_is_left_out_of_all_fishers(x64, seed, chunk, key):
    params, batch, _ = in_double(padded(seed))
    drawn = PADDED.likelihood.sample(key, PADDED.predict(params, batch[0]), batch[1])
    for kind in KINDS:
        _, rows, exact = reference(seed, drawn if kind == "sampled" else None)
        expected = exact if kind == "exact" else dense.gram(rows)
        product = functools.partial(
            flj.fisher_vector_product,
            PADDED,
            params,
            batch,
            kind=kind,
            key=key,
            examples_per_chunk=chunk,
        )
        np.testing.assert_allclose(dense.matrix_of(product, params), expected, atol=1e-12)
    found = flj.per_example_gradients(
        PADDED, params, batch, labels="sampled", key=key, examples_per_chunk=chunk
    )
    np.testing.assert_allclose(stacked(found), reference(seed, drawn)[1], atol=1e-12)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_padding_is_left_out_of_a_curvature(x64, kind):
    params, (inputs, labels), _ = in_double(padded(0))
    batches = [(inputs[:2], labels[:2]), (inputs[2:], labels[2:])]
    around = flj.curvature(PADDED, batches, kind=kind)
    losses, rows, exact = reference(0)
    assert float(around.loss(params)) == pytest.approx(losses.mean(), abs=1e-12)
    np.testing.assert_allclose(dense.ravel(around.gradient(params)), rows.mean(0), atol=1e-12)
    expected = exact if kind == "exact" else dense.gram(rows)
    found = dense.matrix_of(lambda v: around.product(params, v), params)  # under jit
    np.testing.assert_allclose(found, expected, atol=1e-12)
    one = jax.tree.map(jnp.ones_like, params)
    found = dense.ravel(around.product(params, one))  # batch by batch
    np.testing.assert_allclose(found, expected.sum(1), atol=1e-12)


def test_samples_keep_the_padding_and_nothing_is_left_out_without_targets(x64, key):
    params, batch, _ = in_double(padded(0))
    sample = PADDED.likelihood.sample
    logits = PADDED.predict(params, batch[0])
    drawn, free = sample(key, logits, batch[1]), sample(key, logits)
    pad = batch[1] == PAD
    np.testing.assert_array_equal(drawn == PAD, pad)
    np.testing.assert_array_equal(jnp.where(pad, free, drawn), free)
    assert ((free >= 0) & (free < CLASSES)).all()
    plain = flj.Model(dense.mlp, flj.likelihoods.categorical())
    v = dense.random_like(key, params)
    for kind in ("exact", "sampled"):
        found, expected = (
            flj.fisher_vector_product(model, params, (batch[0], None), v, kind=kind, key=key)
            for model in (PADDED, plain)
        )
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def fishleg(model, kind, chunk=None, **options):
    # Adam would make steps of the rounding of gradients that are zero
    options = {"optimizer": optax.sgd(1e-2)} | options
    return flj.inverse.fishleg(
        model,
        0.1,
        kind=kind,
        learn=True,
        start=4,
        updates=8,
        samples=2,
        examples_per_sample=3,
        examples_per_chunk=chunk,
        **options,
    )


ESTIMATORS = {
    "exact in chunks": lambda m: fishleg(m, "exact", 2),
    "sampled in chunks": lambda m: fishleg(m, "sampled", 2),
    "empirical": lambda m: fishleg(m, "empirical", probe="gradient"),
    "closed form": lambda m: flj.inverse.fishleg(m),
    "closed form in chunks": lambda m: flj.inverse.fishleg(m, examples_per_chunk=2),
    "closed form, empirical": lambda m: flj.inverse.fishleg(m, kind="empirical"),
    "kfac": lambda m: flj.inverse.kfac(m),
    "kfac in chunks": lambda m: flj.inverse.kfac(m, examples_per_chunk=2),
    "diagonal": lambda m: flj.inverse.diagonal(m),
    "woodfisher": lambda m: flj.inverse.woodfisher(m, gradients=6, labels="sampled"),
    "mfac": lambda m: flj.inverse.mfac(m, window=6),
}


# these learn, which takes long to compile, and the first of the estimates shows it by default
LONG = ("sampled in chunks", "empirical")


@pytest.mark.parametrize("name", some_slow(ESTIMATORS, lambda name: name in LONG))
def test_estimates_leave_padding_out(x64, name, key):
    """As of a network whose logits at padding are constants, in every phase of a fit."""
    params, *batches = in_double(padded(1))
    params = {"Dense_0": params["Dense_0"]}  # of one layer it compiles in half the time
    states = []
    for model, batch in zip((PADDED, SILENCED), batches, strict=True):
        estimator = ESTIMATORS[name](model)
        updates = estimator.updates or 1
        state = dense.run(estimator, params, batch, updates, key)
        if "closed form" in name:  # which measures neither
            state = state._replace(auxiliary_loss=0.0, relative_residual=0.0)
        states.append(state)
    numbers = [dense.ravel(jax.tree.map(jnp.asarray, state)) for state in states]
    np.testing.assert_allclose(*numbers, atol=1e-9)
    assert np.isfinite(numbers[0]).all()


def test_gradients_in_an_estimate_are_those_of_valid_tokens(x64, key):
    params, batch, _ = in_double(padded(2))
    estimator = flj.inverse.mfac(PADDED, 0.1, window=EXAMPLES)
    state = dense.run(estimator, params, batch, 1, key)
    rows = reference(2)[1]
    expected = np.linalg.inv(dense.gram(rows) + 0.1 * np.eye(rows.shape[1]))
    found = dense.inverse_matrix(estimator, state, params)
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_one_shot_leaves_padding_out(x64):
    params, *batches = in_double(padded(1))
    results = [
        flj.prune_one_shot(
            model,
            params,
            flj.inverse.diagonal(model, 0.1),
            [batch],
            sparsity=0.4,
            compensation=flj.compensation.group(),
        )
        for model, batch in zip((PADDED, SILENCED), batches, strict=True)
    ]
    np.testing.assert_allclose(*[dense.ravel(r.params) for r in results], atol=1e-9)


OUTSIDE = [-1, CLASSES, PAD, 2**20]


@pytest.mark.parametrize("ignore", [None, -7])
@pytest.mark.parametrize("label", OUTSIDE)
def test_a_label_outside_makes_its_example_nan_under_jit(label, ignore):
    model = flj.Model(dense.mlp, flj.likelihoods.categorical(ignore))
    params, inputs, labels, _ = sequences(0)
    labels = labels.at[2, 1].set(label)
    losses, gradients = jax.jit(
        lambda labels: (
            flj.losses(model, params, (inputs, labels)),
            flj.per_example_gradients(model, params, (inputs, labels)),
        )
    )(labels)
    bad = np.arange(EXAMPLES) == 2
    np.testing.assert_array_equal(np.isnan(losses), bad)
    rows = stacked(gradients)
    assert np.isnan(rows[2]).all() and np.isfinite(rows[~bad]).all()


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint32", "int64"])
def test_labels_of_any_whole_dtype(x64, dtype):
    """Also where `ignore` does not fit into it, or a label does not fit into int32."""
    logits = jnp.zeros((2, CLASSES))
    for ignore in (None, PAD, 255):
        loss = jax.jit(flj.likelihoods.categorical(ignore).negative_log_likelihood)
        top = min(np.iinfo(dtype).max, 2**32)  # whose lowest 32 bits are those of label 0
        found = loss(logits, jnp.array([1, top], dtype))
        assert float(found[0]) == pytest.approx(np.log(CLASSES))
        assert float(found[1]) == 0 if top == ignore else np.isnan(found[1])


def test_estimates_skip_and_report_examples_with_labels_outside(key):
    params, inputs, labels, _ = sequences(0)
    model = flj.Model(dense.mlp, flj.likelihoods.categorical())
    bad = inputs, labels.at[2, 1].set(-1)
    rest = jax.tree.map(lambda x: jnp.delete(x, 2, axis=0), bad)
    estimator = flj.inverse.diagonal(model, labels="empirical")
    state, expected = (dense.run(estimator, params, b, 1, key) for b in (bad, rest))
    assert int(state.skipped) == 1 and int(expected.skipped) == 0
    found, expected = (
        dense.ravel(dense.jitted(estimator.diagonal)(s, params)) for s in (state, expected)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    estimator = fishleg(model, "empirical")
    state = dense.run(estimator, params, bad, 3, key)
    assert int(state.guard.skipped) == 3 and int(state.count) == 0
    assert np.isfinite(dense.ravel(dense.jitted(estimator.diagonal)(state, params))).all()


PLAIN = flj.Model(dense.mlp, flj.likelihoods.categorical())


def one_shot(params, batch, held_out=None):
    good = sequences(0)[1:3]
    batches = [good, batch] if held_out is None else [good]
    flj.prune_one_shot(
        PLAIN,
        params,
        flj.inverse.diagonal(PLAIN),
        batches,
        sparsity=0.5,
        held_out=None if held_out is None else [good, held_out],
    )


def gradual(params, batch):
    tx = flj.fishleg_prune(PLAIN, 0.5)
    tx.update(params, tx.init(params), params, batch=batch)


def fit(make):
    return lambda p, b: flj.fit(make(PLAIN), p, [b], key=jax.random.key(0))


DOORS = {
    "losses": lambda p, b: flj.losses(PLAIN, p, b),
    "loss in chunks": lambda p, b: flj.loss(PLAIN, p, b, examples_per_chunk=2),
    "gradient": lambda p, b: jax.grad(lambda p: flj.loss(PLAIN, p, b))(p),
    "product": lambda p, b: flj.fisher_vector_product(PLAIN, p, b, p, kind="empirical"),
    "gradients": lambda p, b: flj.per_example_gradients(PLAIN, p, b),
    "curvature": lambda p, b: flj.curvature(PLAIN, [b]).loss(p),
    "curvature's product": lambda p, b: flj.curvature(PLAIN, [b], kind="empirical").product(p, p),
    "fit of kfac": fit(flj.inverse.kfac),
    "fit of fishleg": fit(flj.inverse.fishleg),
    "batches[1]": one_shot,
    "held_out[1]": lambda p, b: one_shot(p, b, b),
    "gradual": gradual,
}


@pytest.mark.parametrize("door", DOORS)
def test_labels_outside_are_refused_by_name(door):
    params, inputs, labels, _ = sequences(0)
    for label in (-1, CLASSES, PAD):
        message = rf"targets must be labels from 0 to 2, for the 3 classes.*got {label}(\n|$)"
        with pytest.raises(ValueError, match=message) as error:
            DOORS[door](params, (inputs, labels.at[2, 1].set(label)))
        assert "[" not in door or door in str(error.value)
    with pytest.raises(
        ValueError, match="targets must be class labels of an integer type, got dtype"
    ):
        DOORS[door](params, (inputs, labels.astype(jnp.float32)))
    if "[" not in door:  # the others have to be like the first batch
        with pytest.raises(ValueError, match="targets must have the shape of the outputs without"):
            DOORS[door](params, (inputs, labels[:, :2]))


@pytest.mark.parametrize(
    "likelihood, targets, message",
    [
        (flj.likelihoods.bernoulli(), 1.5, r"lie in \[0, 1\], got 1.5"),
        (flj.likelihoods.bernoulli(), -0.5, r"lie in \[0, 1\], got -0.5"),
        (flj.likelihoods.bernoulli(), jnp.nan, r"lie in \[0, 1\], got nan"),
        (flj.likelihoods.gaussian(), jnp.inf, "be finite, got inf"),
        (flj.likelihoods.gaussian(None), jnp.nan, "be finite, got nan"),
    ],
)
def test_targets_outside_of_other_supports(likelihood, targets, message):
    """Refused where they can be seen; under `jit` their example's loss and gradient are NaN."""
    predict = lambda p, x: (x @ p, x @ p) if likelihood.sample is LEARNED else x @ p
    model = flj.Model(predict, likelihood)
    params, inputs = jnp.ones((2, 3)), jnp.ones((4, 2))
    values = jnp.full((4, 3), 0.5).at[1, 2].set(targets)
    with pytest.raises(ValueError, match=f"targets must {message}$"):
        flj.losses(model, params, (inputs, values))
    losses, gradients = jax.jit(
        lambda values: (
            flj.losses(model, params, (inputs, values)),
            flj.per_example_gradients(model, params, (inputs, values)),
        )
    )(values)
    bad = np.arange(4) == 1
    np.testing.assert_array_equal(~np.isfinite(losses), bad)
    np.testing.assert_array_equal(~np.isfinite(gradients).all(axis=(1, 2)), bad)


LEARNED = flj.likelihoods.gaussian(None).sample


@pytest.mark.parametrize("ignore", [0.5, True, "pad", 2**31, jnp.array([1, 2])])
def test_an_ignored_label_that_is_none_is_refused(ignore):
    with pytest.raises(ValueError, match="ignore must be"):
        flj.likelihoods.categorical(ignore=ignore)


def test_an_ignored_label_among_the_classes_is_refused():
    """Samples of that class could not be told from padding."""
    params, inputs, labels, _ = sequences(0)
    model = flj.Model(dense.mlp, flj.likelihoods.categorical(ignore=0))
    with pytest.raises(ValueError, match="ignore must lie outside the 3 classes, got 0"):
        flj.loss(model, params, (inputs, labels))
    with pytest.raises(ValueError, match="ignore must lie outside the 3 classes, got 0"):
        flj.fit(flj.inverse.kfac(model), params, [(inputs, labels)], key=jax.random.key(0))


def test_labels_that_are_closed_over_are_checked_under_jit_as_well():
    params, inputs, labels, _ = sequences(0)
    bad = inputs, labels.at[0, 0].set(-1)
    with pytest.raises(ValueError, match="got -1"):
        jax.jit(lambda p: flj.loss(PLAIN, p, bad))(params)
    with pytest.raises(ValueError, match="got -1"):
        jax.jit(flj.curvature(PLAIN, [bad]).gradient)(params)
