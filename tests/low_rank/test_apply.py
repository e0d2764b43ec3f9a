"""Functions of factors by dense algebra: however they use a kernel, right or refused."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import fishleg_jax as flj
from fishleg_jax.low_rank import forms
from fishleg_jax.low_rank.factors import in_place
from fishleg_jax.low_rank.uses import Use
from tests.low_rank.test_forms import product

apply, decompose = flj.low_rank.apply, flj.low_rank.decompose
REFUSED = r"params: 'kernel' has factors, but the function does not multiply its inputs with it"


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def like(shape):
    return {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}


def check(function, kernel, factors, x, must_be_right):
    """Whether a function of factors is that of the kernel, or a ValueError that names the leaf."""
    wanted = function({"kernel": jnp.asarray(kernel, jnp.float32)}, x)
    factors = {key: jnp.asarray(value, jnp.float32) for key, value in factors.items()}
    try:
        found = apply(function, like(kernel.shape))({"kernel": factors}, x)
    except ValueError as error:
        assert str(error).startswith("params: 'kernel' has factors")
        assert not must_be_right
        return False
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    return True


@st.composite
def products(draw):
    """A kernel of equal or unequal sizes, the factors' axes, and dimension numbers of a product."""
    axes = draw(st.integers(2, 4))
    shape = tuple(draw(st.lists(st.integers(1, 3), min_size=axes, max_size=axes)))
    rows = draw(st.integers(1, axes - 1))  # axes of the left factor
    order = draw(st.permutations(range(axes)))
    mixed = draw(st.permutations(range(axes)))
    inside = {
        "any": mixed[: draw(st.integers(0, axes))],
        "left": [k for k in mixed if order[k] < rows],
        "right": [k for k in mixed if order[k] >= rows],
    }[draw(st.sampled_from(("any", "left", "right")))]
    batched = draw(st.sampled_from((0, 0, 1)))  # if an axis is left
    return shape, rows, draw(st.integers(1, 3)), order, inside, batched, draw(st.booleans())


@given(products())
@example(((3, 3), 1, 2, [1, 0], [0], 0, False))  # x @ kernel.T of a square kernel
@example(((2, 3, 2), 1, 2, [2, 1, 0], [2], 0, False))  # outputs in another order
@example(((2, 3, 2), 2, 2, [1, 0, 2], [2], 0, True))
@example(((3, 3, 2), 2, 2, [0, 1, 2], [1, 0], 0, False))  # inputs in another order
@settings(max_examples=80, deadline=None)
def test_products_along_any_axes(drawn):
    shape, rows, rank, order, contracted, batched, first = drawn
    left, right = normal(*shape[:rows], rank, seed=1), normal(rank, *shape[rows:], seed=2)
    kernel = np.tensordot(left, right, 1)
    free = [k for k in range(len(shape)) if k not in contracted]
    batch = free[:batched]
    sizes = [shape[order[k]] for k in (*contracted, *batch)]
    x = normal(2, *sizes, seed=3)
    own = list(range(1, len(contracted) + 1)), list(range(len(contracted) + 1, x.ndim))

    def function(p, x):
        value = p["kernel"].transpose(order)
        if first:
            return jax.lax.dot_general(value, x, ((contracted, own[0]), (batch, own[1])))
        return jax.lax.dot_general(x, value, ((own[0], contracted), (own[1], batch)))

    inside = {order[k] for k in contracted}
    fits = inside in ({*range(rows)}, {*range(rows, len(shape))}) and not batch
    right_or_not = check(function, kernel, {"left": left, "right": right}, x, fits)
    assert right_or_not == fits


ORDERS = list(itertools.permutations(range(4)))


@st.composite
def convolutions(draw):
    """Factors of a kernel in any layout, and any layout and options of a convolution with it."""
    form = draw(st.sampled_from(forms.CONVOLUTIONS))
    sizes = draw(st.lists(st.sampled_from((1, 2, 3, 3)), min_size=4, max_size=4))
    two = st.integers(1, 2)
    pads = st.tuples(st.integers(0, 2), st.integers(0, 2))
    options = {
        "window_strides": draw(st.tuples(two, two)),
        "padding": draw(st.tuples(pads, pads)),
        "lhs_dilation": draw(st.tuples(two, two)),
        "rhs_dilation": draw(st.tuples(two, two)),
        "feature_group_count": draw(st.sampled_from((1, 1, 1, 2))),
        "batch_group_count": draw(st.sampled_from((1, 1, 1, 2))),
    }
    ranks = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    order, layout = (draw(st.sampled_from(ORDERS)) for _ in range(2))
    return form, tuple(sizes), ranks, order, layout, options


@given(convolutions())
@settings(max_examples=60, deadline=None)
def test_convolutions_in_any_layout(drawn):
    _, sizes, _, order, layout, options = drawn
    groups = options["feature_group_count"], options["batch_group_count"]
    assume(2 not in groups or 1 in groups)  # one kind of groups, of as many channels each
    assume(sizes[order.index(layout[0])] % max(groups) == 0)
    _check_convolution(*drawn)


@pytest.mark.parametrize("form", forms.CONVOLUTIONS)
@pytest.mark.parametrize("layout", ORDERS)
def test_convolutions_of_a_kernel_with_equal_sizes(form, layout):
    """Every reinterpretation of 3 x 3 x 3 x 3 fits its shape."""
    options = {"window_strides": (2, 1), "padding": ((1, 2), (0, 1)), "rhs_dilation": (1, 2)}
    sizes = (3, 3, 3, 3)
    done = _check_convolution(form, sizes, (2, 3), (0, 1, 2, 3), layout, options)
    assert done == (set(layout[:2]) == {2, 3})


def _check_convolution(form, sizes, ranks, order, layout, options):
    """Factors for the axes `order` (spatial, in, out), used as `layout` (out, in, spatial)."""
    use = Use(order, 1, (5, 6), (4, 3), 1.0)
    arranged = np.asarray(normal(*sizes), float)
    made = forms.options_of(form, arranged, use, None, 1e-3)
    ranks = tuple(np.minimum(ranks[: made.ranks.shape[1]], made.ranks.max(axis=0)))
    factors = made.factors(ranks)
    back = np.argsort(order)
    kernel = product(form, factors).transpose(back)
    placed = in_place(factors, use, kernel.shape)
    groups, batches = options.get("feature_group_count", 1), options.get("batch_group_count", 1)
    x = normal(2, kernel.shape[layout[1]] * groups, 7, 8)
    numbers = jax.lax.ConvDimensionNumbers((0, 1, 2, 3), layout, (0, 1, 2, 3))

    def function(p, x):
        return jax.lax.conv_general_dilated(x, p["kernel"], dimension_numbers=numbers, **options)

    fits = set(layout[:2]) == set(order[2:]) and groups == batches == 1
    return check(function, kernel, placed, x, fits)


def test_transposed_and_tied_kernels():
    kernel = normal(6, 6)
    x = normal(5, 6, seed=1)
    model = flj.Model(lambda p, x: x @ p["kernel"], flj.likelihoods.gaussian())
    params = {"kernel": kernel}
    small = decompose(model, params, [(x, None)], ranks={"kernel": 6})
    for f in (
        lambda p, x: x @ p["kernel"].T,
        lambda p, x: (x @ p["kernel"]) @ p["kernel"].T,
        lambda p, x: p["kernel"] @ x.T,
    ):
        np.testing.assert_allclose(apply(f, params)(small.params, x), f(params, x), atol=1e-4)
    # the other layout decomposes to factors of the same kernel
    model = flj.Model(lambda p, x: x @ p["kernel"].T, flj.likelihoods.gaussian())
    small = decompose(model, params, [(x, None)], ranks={"kernel": 6})
    left, right = (small.params["kernel"][key] for key in ("left", "right"))
    np.testing.assert_allclose(left @ right, kernel, atol=1e-5)


@pytest.mark.parametrize(
    ("f", "use"),
    [
        (lambda k, x: x @ k.reshape(3, 2), "is an operand of reshape"),
        (lambda k, x: x[:, :2] @ (2 * k), "is an operand of mul"),
        (lambda k, x: x[:, :2] @ k[:, 0], "is an operand of"),
        (lambda k, x: jnp.einsum("io,io", x[:2], k), "is an operand of dot_general"),
        (lambda k, x: k.T @ k, "is an operand of dot_general"),
        (lambda k, x: jax.vmap(jnp.dot)(k, x[:2]), "is an operand of dot_general"),
        (lambda k, x: (x, k.T), "is an output"),
    ],
)
def test_other_uses_are_refused(f, use):
    factors = {"left": jnp.ones((2, 1)), "right": jnp.ones((1, 3))}
    x = jnp.ones((4, 3))
    f(jnp.ones((2, 3)), x)  # without factors it runs
    with pytest.raises(ValueError, match=f"{REFUSED}.*{use}"):
        apply(lambda p, x: f(p["kernel"], x), like((2, 3)))({"kernel": factors}, x)


@pytest.mark.parametrize(
    ("left", "right", "shape"),
    [
        ((2, 1), (1, 4), (2, 3)),
        ((2, 2), (1, 3), (2, 3)),
        ((1, 2), (3, 1), (2, 3)),
        ((3, 3, 2, 4), (3, 1, 4, 2), (3, 3, 2, 2)),
    ],
)
def test_factors_of_other_shapes_are_refused(left, right, shape):
    factors = {"kernel": {"left": jnp.ones(left), "right": jnp.ones(right)}}
    message = r"params: 'kernel' needs factors that multiply to the shape .*got factors of shapes"
    with pytest.raises(ValueError, match=message):
        apply(lambda p, x: x, like(shape))(factors, jnp.ones(3))


def dense(k, x):
    return x @ k


def stopped():
    """A dense layer whose own rule gives no gradient to its inputs, and twice the kernel's."""
    f = jax.custom_vjp(dense)
    f.defvjp(lambda k, x: (x @ k, (k, x)), lambda r, g: (2 * r[1].T @ g, 0 * r[1]))
    return f


def doubled():
    """A dense layer with twice its derivative."""
    f = jax.custom_jvp(dense)
    f.defjvp(lambda given, moved: (dense(*given), 2 * (moved[1] @ given[0] + given[1] @ moved[0])))
    return f


@pytest.mark.parametrize("layer", [stopped(), doubled(), lambda k, x: x @ jax.lax.stop_gradient(k)])
def test_rules_of_differentiation_are_kept(layer):
    left, right, x = normal(4, 2, seed=1), normal(2, 3, seed=2), normal(5, 4)
    f = lambda p, x: jnp.tanh(layer(p["kernel"].T, x)).sum()
    factors = {"left": right.T, "right": left.T}
    found = jax.grad(apply(f, like((3, 4))), (0, 1))({"kernel": factors}, x)
    wanted = jax.grad(lambda p, x: f({"kernel": p["left"] @ p["right"]}, x), (0, 1))(factors, x)
    for key in factors:
        np.testing.assert_allclose(found[0]["kernel"][key], wanted[0][key], atol=1e-5)
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-5)


def test_kernels_of_convolutions_with_own_rules_are_multiplied_out():
    use = Use((2, 3, 1, 0), 1, (5, 6), (4, 3), 1.0)
    made = forms.options_of("spatial", np.asarray(normal(3, 2, 4, 5), float), use, None, 1e-3)
    factors = made.factors((3,))
    kernel = product("spatial", factors).transpose(3, 2, 0, 1)
    placed = {k: jnp.asarray(v) for k, v in in_place(factors, use, kernel.shape).items()}
    layer = lambda p, x: jax.lax.conv(x, p["kernel"], (1, 1), "SAME")
    f = jax.custom_jvp(layer)
    f.defjvp(lambda given, moved: jax.jvp(layer, given, moved))
    x = normal(2, 4, 6, 6)
    found = apply(f, like(kernel.shape))({"kernel": placed}, x)
    np.testing.assert_allclose(found, f({"kernel": jnp.asarray(kernel)}, x), atol=1e-4)


def test_kernels_with_own_rules_stay_whole():
    layer = stopped()
    model = flj.Model(lambda p, x: layer(p["kernel"], x) @ p["out"], flj.likelihoods.gaussian())
    params = {"kernel": normal(6, 8), "out": normal(8, 6)}
    small = decompose(model, params, [(normal(5, 6), None)], 0.5, metric="identity")
    rows = {row.name: row for row in small.report.rows}
    assert rows["kernel"].reason == "an operand of custom_vjp_call" and rows["out"].form == "svd"


def test_arguments_that_are_not_arrays():
    factors = {"kernel": {"left": normal(3, 1), "right": normal(1, 4)}}
    kernel = {"kernel": factors["kernel"]["left"] @ factors["kernel"]["right"]}

    def f(p, x, train, options, scale=2):
        y = x @ p["kernel"]
        y = y + 1 if train else y
        y = jnp.tanh(y) if options["name"] == "tanh" else y
        return y * scale + options["shift"]

    x, shift = normal(2, 3), np.arange(4.0, dtype=np.float32)
    for train in (False, True):
        for name in ("tanh", None):
            options = {"name": name, "shift": shift}
            found = apply(f, kernel)(factors, x, train, options)
            np.testing.assert_allclose(found, f(kernel, x, train, options), atol=1e-5)
    run = jax.jit(apply(f, kernel), static_argnums=2)
    found = run(factors, x, False, {"name": None, "shift": shift})
    np.testing.assert_allclose(
        found, f(kernel, x, False, {"name": None, "shift": shift}), atol=1e-5
    )


def test_decompose_under_jit_is_refused():
    model = flj.Model(lambda p, x: x @ p["kernel"], flj.likelihoods.gaussian())
    params, x = {"kernel": normal(4, 5)}, normal(3, 4)
    run = lambda p, x: decompose(model, p, [(x, None)], 0.9).params
    for f, data, name in (
        (run, (params, x), "params"),
        (lambda x: run(params, x), (x,), "batches"),
        (lambda: run(params, x), (), "decompose"),
    ):
        with pytest.raises(ValueError, match=rf"{name} must be .*outside of jax.jit"):
            jax.jit(f)(*data)
    with pytest.raises(ValueError, match=r"params must be .*outside of jax.jit"):
        jax.grad(lambda p: jax.tree.leaves(run(p, x))[0].sum())(params)
