"""Sparse kernels: the same outputs, and only where a table says that they pay."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj

FAST, SLOW = flj.export.MatmulTimes(2e-6, 1e-6), flj.export.MatmulTimes(1e-6, 2e-6)


def sparse_kernel(shape, seed=0):
    kernel = jax.random.normal(jax.random.key(seed), shape)
    return jnp.where(jnp.arange(kernel.size).reshape(shape) % 5 == 0, kernel, 0)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="fc2")(nn.relu(nn.Dense(20, name="fc1")(x)))


X = jax.random.normal(jax.random.key(1), (4, 15))
PARAMS = {
    "fc1": {"kernel": sparse_kernel((15, 20)), "bias": jnp.ones(20)},
    "fc2": {"kernel": sparse_kernel((20, 3)), "bias": jnp.ones(3)},
}


def predict(params, x):
    return Net().apply({"params": params}, x)


def products(function, *inputs):
    return str(jax.make_jaxpr(function)(*inputs)).count("bcsr_dot_general")


@pytest.mark.parametrize("chosen", [(), ("fc1",), ("fc1", "fc2")])
def test_the_measurements_decide(chosen):
    asked = []

    def measure(shape, density, batch):
        asked.append((shape, round(density, 2), batch))
        return FAST if f"fc{len(asked)}" in chosen else SLOW

    apply = flj.export.sparse_apply(predict, PARAMS, X, measure=measure)
    assert asked == [((15, 20), 0.2, 4), ((20, 3), 0.2, 4)]
    assert [layer.sparse for layer in apply.layers] == [f"fc{i}" in chosen for i in (1, 2)]
    assert [layer.name for layer in apply.layers] == ["fc1/kernel", "fc2/kernel"]
    assert products(apply.function, X) == len(chosen)
    for x in (X, X[:1]):  # other batches work, too
        np.testing.assert_allclose(apply(x), predict(PARAMS, x), rtol=1e-5, atol=1e-6)
    assert "\n" not in repr(apply) and len(repr(apply)) < 400


def test_tokens_masks_and_a_table():
    """Rows are all axes but the last, and masks decide on the zeros."""
    weights, x = jnp.ones((6, 5)), jax.random.normal(jax.random.key(0), (2, 3, 6))
    masks = jnp.arange(30).reshape(6, 5) % 10 == 0
    project = lambda w, x: x @ w
    table = {((6, 5), 0.1, 6): FAST}
    apply = flj.export.sparse_apply(project, weights, x, masks, measure=table)
    assert apply.layers[0].sparse and products(apply.function, x) == 1
    np.testing.assert_allclose(apply(x), x @ jnp.where(masks, 1.0, 0), rtol=1e-5, atol=1e-6)
    missing = flj.export.sparse_apply(project, weights, x, masks, measure={})
    assert not missing.layers[0].sparse and products(missing.function, x) == 0


def test_what_stays_dense():
    """Transposed kernels, those in loops, of short floats, without zeros or all zero."""
    params = {name: sparse_kernel((4, 4), i) for i, name in enumerate("abcdef")}
    params |= {"d": params["d"].astype(jnp.bfloat16), "e": jnp.ones((4, 4)), "f": jnp.zeros((4, 4))}

    def mixed(p, x):
        y = x @ p["a"].T + x @ p["e"] + x @ p["f"] + (x.astype(jnp.bfloat16) @ p["d"])
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ p["b"]), None), y, None, 2)[0] @ p["c"]

    x = jax.random.normal(jax.random.key(3), (2, 4))
    apply = flj.export.sparse_apply(mixed, params, x, measure=lambda *_: FAST)
    assert [layer.name for layer in apply.layers] == ["c"]
    np.testing.assert_allclose(apply(x), jax.jit(mixed)(params, x), rtol=1e-4, atol=1e-4)


def test_kernels_inside_of_jit_and_checkpoint():
    """Of a function that is compiled, has compiled parts, or recomputes; one in a `cond` stays."""
    params = {name: sparse_kernel((4, 4), i) for i, name in enumerate("abcd")}
    inner = jax.jit(lambda w, x: jnp.tanh(x @ w))

    @jax.jit
    def compiled(p, x):
        y = inner(p["b"], inner(p["a"], x))
        y = jax.checkpoint(inner)(p["c"], y)
        return jax.lax.cond(x[0, 0] > 0, lambda y: y @ p["d"], lambda y: y, y)

    x = jax.random.normal(jax.random.key(3), (2, 4))
    apply = flj.export.sparse_apply(compiled, params, x, measure=lambda *_: FAST)
    assert [layer.name for layer in apply.layers] == ["a", "b", "c"]
    assert products(apply.function, x) == 3
    for own in (x, -x):
        np.testing.assert_allclose(apply(own), compiled(params, own), rtol=1e-5, atol=1e-6)


def test_measured_times_are_kept():
    measure = flj.export.measure_sparse_matmul
    first = measure((16, 8), 0.25, 3, seconds=0.001)
    assert first.dense > 0 and first.sparse > 0
    assert measure((16, 8), 0.2501, 3) is first
    assert measure((16, 8), 0.25, 4, seconds=0.001) is not first


@pytest.mark.parametrize(
    "arguments, message",
    [
        (((4,), 0.1, 1), "shape must be two sizes"),
        (((4, 0), 0.1, 1), "shape must be two sizes"),
        (((4, 4), 0, 1), r"density must be a number in \(0, 1\], got 0"),
        (((4, 4), 1.5, 1), "density must be a number in"),
        (((4, 4), 0.5, 0), "batch must be a whole number of at least 1"),
        ((4, 0.5, 1), "shape must be two sizes of at least 1, got 4"),
        (((4, True), 0.5, 1), "shape must be two sizes"),
        (((4, 4), "a", 1), "density must be a number in"),
        (((4, 4), 0.5, 1, float("nan")), "seconds must be a positive finite number"),
        (((4, 4), 0.5, 1, "a"), "seconds must be a positive finite number"),
        (((4, 4), 0.5, 1, 0.01, "foo"), "dtype must be .* numbers, got 'foo'"),
        (((4, 4), 0.5, 1, 0.01, int), "dtype must be .* floating-point numbers"),
    ],
)
def test_bad_measurements_get_one_sentence(arguments, message):
    shape, density, batch, *further = arguments
    options = dict(zip(("seconds", "dtype"), further, strict=False))
    with pytest.raises(ValueError, match=message):
        flj.export.measure_sparse_matmul(shape, density, batch, **options)


@pytest.mark.parametrize("measure", [lambda *_: 3, {((15, 20), 0.2, 4): (2e-6, 1e-6)}])
def test_something_else_than_times_gets_one_sentence(measure):
    message = r"measure must give MatmulTimes for shape=\(15, 20\), density=0.20, batch=4, got"
    with pytest.raises(ValueError, match=message):
        flj.export.sparse_apply(predict, PARAMS, X, measure=measure)


def test_nothing_is_measured_under_jit():
    with pytest.raises(ValueError, match="measure_sparse_matmul must be called outside of jax.jit"):
        jax.jit(lambda: flj.export.measure_sparse_matmul((4, 4), 0.5, 1))()


def test_bad_input_gets_one_sentence():
    with pytest.raises(ValueError, match="example_inputs must have at least one array"):
        flj.export.sparse_apply(predict, PARAMS, ())
    with pytest.raises(ValueError, match="masks must have the structure"):
        flj.export.sparse_apply(predict, PARAMS, X, {"fc1": True})
