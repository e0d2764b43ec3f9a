"""WoodFisher and M-FAC against dense algebra, and against each other: one estimate, two ways."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fishleg_jax as flj
from fishleg_jax._jit import jitted
from fishleg_jax.inverse import _memory
from fishleg_jax.inverse._woodbury import basis, groups, square_root
from fishleg_jax.inverse._woodbury import window as _window
from fishleg_jax.inverse._woodbury.groups import make_groups
from tests import dense

MODEL = dense.categorical_mlp()
DAMPING = 0.02
SIZES = (3, 6, 3)  # 45 weights


def problem(key, examples=30, dtype=jnp.float64):
    params = dense.mlp_params(key, SIZES, dtype)
    return params, dense.classification_batch(key, examples, dtype=dtype)


def cut(batch, size):
    return [tuple(x[i : i + size] for x in batch) for i in range(0, len(batch[0]), size)]


def fitted(estimator, params, batches, mask=None):
    return flj.fit(estimator, params, batches, key=jax.random.key(0), masks=mask)


def blocks_of(params, block_size):
    """Where the blocks of each leaf begin and end in the flat vector of weights."""
    edges, begin = [], 0
    for leaf in jax.tree.leaves(params):
        blocks = 1 if block_size == "leaf" else -(-leaf.size // block_size)
        size = -(-leaf.size // blocks)
        edges += [
            (begin + i, min(begin + i + size, begin + leaf.size)) for i in range(0, leaf.size, size)
        ]
        begin += leaf.size
    return edges


def exact_inverse(gradients, params, block_size, damping=DAMPING):
    fisher = dense.gram(gradients)
    kept = np.ones_like(fisher)
    if block_size is not None:
        kept[...] = 0
        for begin, end in blocks_of(params, block_size):
            kept[begin:end, begin:end] = 1
    return np.linalg.inv(fisher * kept + damping * np.eye(len(fisher)))


# equal calls give one estimator, which is compiled once
ESTIMATORS = {
    "woodfisher": functools.cache(
        lambda n, **kw: flj.inverse.woodfisher(MODEL, DAMPING, gradients=n, **kw)
    ),
    "mfac": functools.cache(lambda n, **kw: flj.inverse.mfac(MODEL, DAMPING, window=n, **kw)),
}
methods = pytest.mark.parametrize("method", ESTIMATORS)


@methods
@pytest.mark.parametrize(
    "examples, block_size",
    # fewer and more gradients than weights, and than those of a block
    [(10, None), (60, None), (10, "leaf"), (10, 4)],
)
def test_inverse_product_and_diagonal(x64, key, method, block_size, examples):
    params, batch = problem(key, examples)
    estimator = ESTIMATORS[method](examples, block_size=block_size)
    state = fitted(estimator, params, cut(batch, 5))
    expected = exact_inverse(dense.gradients(MODEL, params, batch), params, block_size)
    found = dense.inverse_matrix(estimator, state, params)
    np.testing.assert_allclose(found, expected, atol=1e-9 * np.abs(expected).max())
    diagonal = dense.inverse_diagonal(estimator, state, params)
    np.testing.assert_allclose(diagonal, np.diag(expected), rtol=1e-9)


@pytest.mark.parametrize("method, block_size", [("woodfisher", None), ("mfac", 4)])
def test_streaming_equals_batch(x64, key, method, block_size):
    """However the gradients are cut into batches."""
    params, batch = problem(key, 10)
    estimator = ESTIMATORS[method](10, block_size=block_size)
    states = [fitted(estimator, params, cut(batch, size)) for size in (10, 5)]
    diagonals = [dense.inverse_diagonal(estimator, state, params) for state in states]
    for diagonal in diagonals[1:]:
        np.testing.assert_allclose(diagonal, diagonals[0], rtol=1e-9)


def test_one_block_is_the_full_form(x64, key):
    """A leaf alone in the tree, in one block of its size, in one as a leaf, and without blocks."""
    model = flj.Model(lambda w, x: x @ w, flj.likelihoods.categorical())
    params = jax.random.normal(key, (4, 3))
    batch = dense.classification_batch(key, 20, inputs=4)
    found = []
    woodfisher = functools.partial(flj.inverse.woodfisher, gradients=20)
    mfac = functools.partial(flj.inverse.mfac, window=20)
    for make, block_size in (
        *((woodfisher, x) for x in (None, "leaf", 12)),
        *((mfac, x) for x in (None, "leaf", 500)),
    ):
        estimator = make(model, DAMPING, block_size=block_size)
        state = fitted(estimator, params, cut(batch, 10))
        found.append(dense.inverse_matrix(estimator, state, params))
    for matrix in found[1:]:
        np.testing.assert_allclose(matrix, found[0], atol=1e-9 * np.abs(found[0]).max())


@pytest.mark.parametrize("damping", [0.1, 1e-15], ids=["system", "basis"])
def test_a_block_in_parts_is_as_one_vector(x64, key, damping):
    """Leaves of one size share a part; an empty one has none."""
    params = {"a": jnp.zeros((4, 3)), "b": jnp.zeros((3, 4)), "c": jnp.zeros(5), "d": jnp.zeros(0)}
    rows = jax.random.normal(key, (6, 29))
    to_tree = jax.flatten_util.ravel_pytree(params)[1]

    def both(params, to_tree):
        (group,) = make_groups(params, None)
        parts = group.parts(6)

        @jax.jit
        def results(rows, damping):
            leaves = jax.tree.leaves(jax.vmap(to_tree)(rows))
            window = _window.empty(group, 6, rows.dtype)
            window = _window.push(window, [p.pack_rows(leaves) for p in parts], jnp.arange(6))
            x = groups.pack(parts, jax.tree.leaves(to_tree(jnp.arange(29.0))))
            args = window, jnp.asarray(6), damping
            out = []
            for blocks in (
                _window.multiply(*args, x),
                _window.diagonal(*args),
                _window.product(*args[:2], x),
            ):
                new = jax.tree.leaves(params)
                groups.unpack(parts, blocks, new)
                out.append(jnp.concatenate([y.reshape(-1) for y in new]))
            return jnp.stack(out)

        return len(parts), results(rows, jnp.asarray(damping))

    whole = both(jnp.zeros(29), lambda x: x)
    parts = both(params, to_tree)
    assert (whole[0], parts[0]) == (1, 2)
    for one, other in zip(whole[1], parts[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6 * jnp.abs(one).max())


@methods
def test_means_of_examples(x64, key, method):
    params, (inputs, labels) = problem(key, 20)
    estimator = ESTIMATORS[method](5, examples_per_gradient=4)
    state = fitted(estimator, params, [(inputs, labels)])
    means = dense.gradients(MODEL, params, (inputs, labels)).reshape(5, 4, -1).mean(axis=1)
    expected = exact_inverse(means, params, None)
    np.testing.assert_allclose(dense.inverse_matrix(estimator, state, params), expected, atol=1e-7)


def test_of_many_sampled_labels_it_is_the_true_fisher(x64, key):
    params, (inputs, labels) = problem(key, 20)
    estimator = ESTIMATORS["woodfisher"](20 * 300, labels="sampled")
    state = fitted(estimator, params, [(inputs, None)] * 300)
    found = np.linalg.inv(dense.inverse_matrix(estimator, state, params))
    exact = dense.exact_fisher(MODEL, params, (inputs, labels)) + DAMPING * np.eye(45)
    assert np.linalg.norm(found - exact) < 0.1 * np.linalg.norm(exact)


@methods
@pytest.mark.parametrize("block_size", [None, 4])
def test_masked_weights_are_left_out(x64, key, method, block_size):
    """`multiply` under a mask inverts the Fisher of the weights that are kept."""
    params, batch = problem(key, 10)
    mask = jax.tree.map(lambda p: jax.random.bernoulli(key, 0.6, p.shape), params)
    estimator = ESTIMATORS[method](10, block_size=block_size)
    state = fitted(estimator, params, cut(batch, 5), mask)
    kept = dense.ravel(mask).astype(bool)
    gradients = dense.gradients(MODEL, params, batch) * kept
    expected = exact_inverse(gradients, params, block_size) * np.outer(kept, kept)
    found = dense.inverse_matrix(estimator, state, params, mask)
    np.testing.assert_allclose(found, expected, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("window", [12, 60])
def test_dynamic_equals_static_on_the_same_window(x64, key, window):
    """After some replacements, a part of a turn of the ring; and with a mask that came later."""
    params, batch = problem(key, 3 * window)
    estimator = ESTIMATORS["mfac"](window)
    batches = cut(batch, window // 4)
    dynamic = fitted(estimator, params, batches[:7])
    static = fitted(estimator, params, batches[3:7])
    matrices = [dense.inverse_matrix(estimator, s, params) for s in (dynamic, static)]
    np.testing.assert_allclose(*matrices, atol=1e-9 * np.abs(matrices[1]).max())
    assert int(dynamic.count) == 7 * (window // 4)

    mask = jax.tree.map(lambda p: jax.random.bernoulli(key, 0.6, p.shape), params)
    later = jitted(estimator.update, donate=0)(dynamic, params, batches[7], key, mask)
    masked = fitted(estimator, params, batches[4:8], mask)
    matrices = [dense.inverse_matrix(estimator, s, params, mask) for s in (later, masked)]
    np.testing.assert_allclose(*matrices, atol=1e-9 * np.abs(matrices[1]).max())


def test_fewer_gradients_than_were_announced(x64, key):
    """M-FAC divides by what came; WoodFisher by what was announced, as its recursion does."""
    params, batch = problem(key, 10)
    gradients = dense.gradients(MODEL, params, batch)
    for method, share in (("mfac", 1.0), ("woodfisher", 10 / 60)):
        estimator = ESTIMATORS[method](60, block_size=None)
        state = fitted(estimator, params, cut(batch, 5))
        expected = np.linalg.inv(share * dense.gram(gradients) + DAMPING * np.eye(45))
        found = dense.inverse_matrix(estimator, state, params)
        np.testing.assert_allclose(found, expected, atol=1e-8)


@pytest.mark.parametrize("block_size", [None, 4])
def test_gradients_after_the_last_are_left_out(x64, key, block_size):
    """Also those of a batch that the last is amid."""
    params, batch = problem(key, 20)
    estimator = ESTIMATORS["woodfisher"](12, block_size=block_size)
    state = fitted(estimator, params, cut(batch, 5))
    expected = exact_inverse(dense.gradients(MODEL, params, batch)[:12], params, block_size)
    found = dense.inverse_diagonal(estimator, state, params)
    np.testing.assert_allclose(found, np.diag(expected), rtol=1e-9)


def graded(seed, number, size, largest):
    """Gradients whose second moment has eigenvalues over eight decades; some twice, one zero."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.normal(size=(number, number)))[0]
    right = np.linalg.qr(rng.normal(size=(max(size, number), number)))[0][:size]
    scales = np.sqrt(number * largest * 10.0 ** (-8 * np.arange(number) / number))
    rows = ((left * scales) @ right.T).astype(np.float32)
    rows[number // 2 : number // 2 + 3] = rows[:3]
    rows[3] = 0
    return rows


@jax.jit
def both_ways(rows, damping, x):
    """The inverse's diagonal and its product with x, from a window and as a square root."""
    number, size = rows.shape
    gamma, count = jnp.float32(damping), jnp.asarray(number)
    (group,) = make_groups(x, None)
    window = _window.empty(group, number, jnp.float32)
    window = _window.push(window, [rows[None]], jnp.arange(number))
    root = square_root.start(1, size, gamma)
    root = square_root.extend(root, rows[None] / number**0.5)
    return (
        (
            _window.diagonal(window, count, gamma)[0][0],
            _window.multiply(window, count, gamma, [x[None]])[0][0],
        ),
        (square_root.diagonal(root)[0], square_root.multiply(root, x[None])[0]),
    )


@pytest.mark.parametrize("size", [20, 70, 300])
@pytest.mark.parametrize("largest", [1.0, 100.0])
def test_float32_is_sound_at_a_damping_of_1e_7(size, largest):
    """Where the m×m system as it stands, and the textbook recursion, give NaN or less than zero."""
    rows, damping = graded(0, 60, size, largest), 1e-7
    exact = np.linalg.inv(dense.gram(rows.astype(np.float64)) + damping * np.eye(size))
    x = np.random.default_rng(1).normal(size=size).astype(np.float32)

    def check(diagonal, product, tolerance):
        assert (np.asarray(diagonal) > 0).all()
        np.testing.assert_allclose(np.asarray(diagonal, np.float64), np.diag(exact), rtol=tolerance)
        error = np.linalg.norm(np.asarray(product) - exact @ x)
        assert error < tolerance * np.linalg.norm(exact @ x)

    for diagonal, product in both_ways(rows, damping, x):
        check(diagonal, product, 2e-3)


HARD = {
    "equal": lambda rng, n, d: np.repeat(rng.normal(size=(1, d)), n, axis=0),
    "dependent": lambda rng, n, d: rng.normal(size=(n, 5)) @ rng.normal(size=(5, d)),
    "few, the rest zero": lambda rng, n, d: rng.normal(size=(n, d)) * (np.arange(n) < 7)[:, None],
    "all scales": lambda rng, n, d: rng.normal(size=(n, d)) * rng.normal(size=(n, 1)) ** 5,
}


@pytest.mark.parametrize("kind", HARD)
def test_hard_gradients_in_float32(kind):
    """With the largest eigenvalue up to 1e10 dampings; blocks below and above the window."""
    for size, seed, ratio in [(20, 0, 1e5), (20, 1, 1e10), (300, 2, 1e5), (300, 3, 1e10)]:
        rows = HARD[kind](np.random.default_rng(seed), 60, size).astype(np.float32)
        fisher = dense.gram(rows.astype(np.float64))
        damping = np.float32(np.linalg.norm(fisher, 2) / ratio)
        exact = np.linalg.inv(fisher + float(damping) * np.eye(size))
        x = np.random.default_rng(99).normal(size=size).astype(np.float32)
        (diagonal, product), _ = both_ways(rows, damping, x)
        diagonal = np.asarray(diagonal, np.float64)
        # weights that are all curvature are right to eps / γ only; the bound keeps them positive
        assert (diagonal >= 0.999 / (np.diag(fisher) + damping)).all()
        assert np.linalg.norm(diagonal - np.diag(exact)) < 2e-3 * np.linalg.norm(np.diag(exact))
        assert np.linalg.norm(product - exact @ x) < 2e-3 * np.linalg.norm(exact @ x)


@pytest.mark.parametrize("kind", ["normal", "graded", *HARD])
def test_the_error_of_a_cholesky_factor_is_known(kind):
    """It is eps times the scaled condition number, which decides on the passes that refine it."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        if kind in HARD:
            rows = HARD[kind](rng, 40, 200)
        else:
            rows = rng.normal(size=(40, 200)) if kind == "normal" else graded(seed, 40, 200, 1.0)
        rows = rows.astype(np.float32)
        gram = rows @ rows.T + 1e-6 * np.linalg.norm(rows) ** 2 * np.eye(40, dtype=np.float32)
        (inverse,), (error,) = jax.jit(basis._by_cholesky)(gram[None])
        scale = 1 / np.sqrt(np.diag(gram).astype(np.float64))
        condition = np.linalg.cond(scale[:, None] * gram * scale)
        assert 0.4 < error / (np.finfo(np.float32).eps * condition) < 1.3
        exact = rows.astype(np.float64) @ rows.T + (gram - rows @ rows.T).astype(np.float64)
        product = np.asarray(inverse, np.float64) @ exact @ np.asarray(inverse, np.float64).T
        assert np.linalg.norm(product - np.eye(40), 2) < 3 * float(error) + 1e-5
    _, error = jax.jit(basis._by_cholesky)(-gram[None])
    assert not error[0] <= basis.TRUSTED_ERROR


@pytest.mark.parametrize(
    "method, block_size",
    [("woodfisher", None), ("mfac", None), pytest.param("mfac", 4, marks=pytest.mark.slow)],
)
def test_a_prepared_state(x64, key, method, block_size):
    """The same inverse; of another damping or other gradients nothing stale is told."""
    params, batch = problem(key, 10)
    estimator = ESTIMATORS[method](10, block_size=block_size)
    first, second = cut(batch, 5)
    state = fitted(estimator, params, [first, second])
    ready = jitted(estimator.prepare)(state, params)

    def check(one, other):
        for function in (dense.inverse_matrix, dense.inverse_diagonal):
            pair = [function(estimator, s, params) for s in (one, other)]
            np.testing.assert_allclose(*pair, atol=1e-12 * np.abs(pair[0]).max())

    check(ready, state)
    check(ready._replace(damping=ready.damping * 3), state._replace(damping=state.damping * 3))
    again = jitted(estimator.prepare)(ready, params)
    assert jax.tree.structure(again) == jax.tree.structure(ready)
    early = fitted(estimator, params, [first])
    updated = jitted(estimator.update)(
        jitted(estimator.prepare)(early, params), params, second, key
    )
    assert updated.roots is None
    check(updated, state)
    if method == "mfac":
        mask = jax.tree.map(lambda p: jax.random.bernoulli(key, 0.6, p.shape), params)
        check(*(estimator.restrict(s, mask) for s in (ready, state)))


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 1000),
    damping=st.floats(-7, 3).map(lambda e: 10.0**e),
    size=st.sampled_from([4, 25]),
)
def test_laws_of_the_diagonal(seed, damping, size):
    """`1 / (F_ii + γ) ≤ [F_γ⁻¹]_ii ≤ 1 / γ`, whatever the gradients are."""
    rows = graded(seed, 12, size, 1.0)
    lowest = 1 / (np.mean(rows.astype(np.float64) ** 2, axis=0) + damping)
    for diagonal, _ in both_ways(rows, damping, np.ones(size, np.float32)):
        diagonal = np.asarray(diagonal, np.float64)
        assert (diagonal >= lowest * 0.98).all()
        assert (diagonal <= 1.001 / damping).all()


@pytest.mark.parametrize("method, block_size", [("woodfisher", 4), ("mfac", None)])
def test_gradients_that_are_not_finite_count_for_nothing(key, method, block_size):
    """A NaN in one example: the estimate is that of the others, and the state says how many."""
    params, (inputs, labels) = problem(key, 12, jnp.float32)
    bad = inputs.at[4, 0].set(jnp.nan)
    estimator = ESTIMATORS[method](12, block_size=block_size)
    update = jitted(estimator.update, donate=0)
    state = update(jitted(estimator.init)(params), params, (bad, labels), key)
    assert int(state.skipped) == 1
    gradients = np.delete(dense.gradients(MODEL, params, (inputs, labels)), 4, axis=0)
    share = 1.0 if method == "mfac" else 11 / 12
    expected = exact_inverse(gradients * share**0.5, params, block_size)
    found = dense.inverse_matrix(estimator, state, params)
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


@methods
def test_no_curvature_at_all(key, method):
    """Gradients of zero give the inverse of the damping alone, by which nothing is pruned."""
    model = flj.Model(lambda w, x: 0 * (x @ w), flj.likelihoods.categorical())
    params = jax.random.normal(key, (4, 3))
    batch = dense.classification_batch(key, 8, inputs=4)
    make = {"woodfisher": flj.inverse.woodfisher, "mfac": flj.inverse.mfac}[method]
    estimator = make(model, 0.5)
    state = fitted(estimator, params, [batch])
    np.testing.assert_allclose(estimator.diagonal(state, params), jnp.full((4, 3), 2.0), rtol=1e-6)
    estimator = make(model, 0.5, **{"woodfisher": {"gradients": 8}, "mfac": {}}[method])
    with pytest.raises(ValueError, match="zero for every prunable weight"):
        flj.prune_one_shot(model, params, estimator, [batch], sparsity=0.5)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: flj.inverse.woodfisher(MODEL, 0.0), "damping must be a positive finite number"),
        (
            lambda: flj.inverse.woodfisher(MODEL, gradients=0),
            "gradients must be a whole number of at least 1, got 0",
        ),
        (lambda: flj.inverse.woodfisher(MODEL, block_size=0), "block_size must be at least 1"),
        (
            lambda: flj.inverse.woodfisher(MODEL, block_size="row"),
            "block_size must be .* got 'row'",
        ),
        (lambda: flj.inverse.woodfisher(MODEL, labels="true"), "labels must be one of empirical"),
        (
            lambda: flj.inverse.mfac(MODEL, examples_per_gradient=0),
            "examples_per_gradient must be a whole number of at least 1, got 0",
        ),
        (
            lambda: flj.inverse.mfac(MODEL, window=0),
            "window must be a whole number of at least 1, got 0",
        ),
        (lambda: flj.inverse.mfac(MODEL, float("nan")), "damping must be a positive"),
    ],
)
def test_bad_arguments_are_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@methods
def test_bad_batches_are_refused(key, method):
    params, (inputs, labels) = problem(key, 12, jnp.float32)
    with pytest.raises(ValueError, match="must have labels for 'empirical'"):
        fitted(ESTIMATORS[method](12), params, [(inputs, None)])
    with pytest.raises(ValueError, match="must .* divide the batch's 12 examples, got 5"):
        fitted(ESTIMATORS[method](12, examples_per_gradient=5), params, [(inputs, labels)])


def test_a_window_must_hold_a_batch(key):
    params, batch = problem(key, 12, jnp.float32)
    with pytest.raises(ValueError, match="window must be at least 12, .* got 7"):
        fitted(ESTIMATORS["mfac"](7), params, [batch])


def test_memory_is_said_before_it_is_used(monkeypatch):
    """ResNet-50 in blocks of 2000 needs 204 GB: refused, with the largest block that fits."""
    monkeypatch.setattr(_memory, "available", lambda: 24 * 10**9)
    params = {"kernel": jax.ShapeDtypeStruct((25_500_000,), jnp.float32)}
    with pytest.raises(ValueError, match="needs 204 GB.* largest block_size that fits is 141"):
        jax.eval_shape(flj.inverse.woodfisher(MODEL, block_size=2000).init, params)
    with pytest.raises(ValueError, match="window=1000 .* needs 102 GB.* window that fits is 141"):
        jax.eval_shape(flj.inverse.mfac(MODEL).init, params)
    with pytest.raises(ValueError, match="gradients=1000 .* needs 102 GB"):
        jax.eval_shape(flj.inverse.woodfisher(MODEL).init, params)
    fits = flj.inverse.woodfisher(MODEL, block_size=141)
    state = jax.eval_shape(fits.init, params)
    assert state.blocks["kernel"].shape == (180_852, 141, 141)
