"""Changes of basis: exact for the identity, and dense algebra in any other one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.fft
from jax.flatten_util import ravel_pytree

import fishleg_jax as flj
from tests import dense

KEYS = jax.random.split(jax.random.key(0), 4)
X = jax.random.normal(KEYS[0], (12, 4, 4, 1))
LABELS = jnp.arange(12) % 3


def predict(params, x):
    size = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, params["conv"], (1, 1), "SAME", dimension_numbers=size)
    return jnp.tanh(y + params["bias"]).mean((1, 2)) @ params["fc"]


MODEL = flj.Model(predict, flj.likelihoods.categorical())
PARAMS = dense.random_like(
    KEYS[1],
    {
        "conv": jax.ShapeDtypeStruct((3, 3, 1, 2), jnp.float32),
        "bias": jax.ShapeDtypeStruct((2,), jnp.float32),
        "fc": jax.ShapeDtypeStruct((2, 3), jnp.float32),
    },
)
EYES = flj.bases.orthonormal({"conv": {0: np.eye(3), 1: np.eye(3)}, "fc": {0: np.eye(2)}})
DCT = flj.bases.dct()


def rotation(seed, size):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


MIXED = flj.bases.orthonormal({"conv": {-1: rotation(0, 2), 0: rotation(1, 3)}})


def assert_same(one, other):
    for x, y in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_dct_is_that_of_scipy():
    found = DCT.coefficients(PARAMS)
    wanted = scipy.fft.dctn(np.asarray(PARAMS["conv"]), axes=(0, 1), norm="ortho")
    np.testing.assert_allclose(found["conv"], wanted, atol=1e-6)
    assert_same(found["fc"], PARAMS["fc"])
    assert repr(DCT) == "Basis(dct)"
    turned = {"conv": jnp.transpose(PARAMS["conv"], (3, 2, 0, 1))}
    other = flj.bases.dct("conv", axes=(2, 3)).coefficients(turned)["conv"]
    np.testing.assert_allclose(jnp.transpose(other, (2, 3, 1, 0)), wanted, atol=1e-6)


def changed_by(basis, shapes):
    """Names of the leaves of random parameters that a basis changes."""
    params = {k: jax.random.normal(KEYS[3], shape) for k, shape in shapes.items()}
    found = basis.coefficients(params)
    return {name for name in params if not np.array_equal(found[name], params[name])}


SHAPES = {
    "Conv_0/kernel": (3, 3, 2, 4),
    "convs/0/kernel": (5, 2, 4),
    "res/conv2_d/w": (3, 3, 4, 4),
    "Dense_0/kernel": (8, 4),
    "conv_stem/query/kernel": (8, 2, 4),
    "attention/query/kernel": (8, 2, 4),  # (embed, heads, head_dim)
    "layers/attention/out/kernel": (6, 2, 4, 8),  # stacked: (layers, heads, head_dim, embed)
    "layers/mlp/kernel": (6, 8, 4),
    "layers/conv/kernel": (6, 3, 3, 2, 4),  # stacked, or a 3-D convolution
    "Conv_0/bias": (4,),
}
CONVOLUTIONS = {"Conv_0/kernel", "convs/0/kernel", "res/conv2_d/w"}


def test_by_default_the_dct_takes_convolutions():
    assert changed_by(DCT, SHAPES) == CONVOLUTIONS
    excluded = flj.bases.dct({"Conv_0": False})
    assert changed_by(excluded, SHAPES) == CONVOLUTIONS - {"Conv_0/kernel"}


def test_leaves_that_are_named_are_taken_whatever_they_are():
    query = {"attention/query/kernel"}
    assert changed_by(flj.bases.dct("attention/query"), SHAPES) == query
    stack = {"layers/conv/kernel": SHAPES["layers/conv/kernel"]}
    for basis in (flj.bases.dct(axes=(1, 2)), flj.bases.dct("layers/conv", axes=(1, 2))):
        assert changed_by(basis, stack) == set(stack)
    kernels = jax.random.normal(KEYS[3], stack["layers/conv/kernel"])
    found = flj.bases.dct(axes=(1, 2)).coefficients({"layers/conv/kernel": kernels})
    wanted = scipy.fft.dctn(np.asarray(kernels), axes=(1, 2), norm="ortho")
    np.testing.assert_allclose(found["layers/conv/kernel"], wanted, atol=1e-6)


@pytest.mark.parametrize("function", ["coefficients", "weights", "bands"])
def test_an_axis_that_is_named_from_both_ends_is_refused(function):
    twice = r"two are the same axis of 'conv', which has shape \(3, 3, 1, 2\)"
    bases = {
        "axes must name": flj.bases.dct(axes=(0, -4)),
        "matrices must name": flj.bases.orthonormal({"conv": {1: np.eye(3), -3: np.eye(3)}}),
    }
    for argument, basis in bases.items():
        with pytest.raises(ValueError, match=f"{argument}.*{twice}"):
            getattr(basis, function)(PARAMS)
    # where they are different axes they stay two
    kernels = {"conv": jnp.ones((3, 2, 2))}
    assert int(flj.bases.dct(axes=(0, -2)).bands(kernels)["conv"].max()) == 3


@pytest.mark.parametrize("basis", [DCT, MIXED, flj.bases.identity()], ids=repr)
def test_outputs_stay_and_the_inverse_inverts(basis):
    coefficients = basis.coefficients(PARAMS)
    assert jax.tree.map(jnp.shape, coefficients) == jax.tree.map(jnp.shape, PARAMS)
    for x, y in zip(*map(jax.tree.leaves, (basis.weights(coefficients), PARAMS)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    changed = flj.bases.in_basis(MODEL, basis)
    np.testing.assert_allclose(
        changed.predict(coefficients, X), MODEL.predict(PARAMS, X), atol=1e-5
    )


@pytest.mark.parametrize("basis", [EYES, flj.bases.identity()], ids=["eyes", "identity"])
def test_pruning_with_the_identity_is_pruning_in_space(basis):
    results = []
    for model, params in (
        (MODEL, PARAMS),
        (flj.bases.in_basis(MODEL, basis), basis.coefficients(PARAMS)),
    ):
        results.append(
            flj.prune_one_shot(
                model,
                params,
                flj.inverse.kfac(model),
                [(X, LABELS)],
                sparsity=0.5,
                stages=1,
                held_out=None,
                saliency="obs",
                compensation=flj.compensation.independent(),
            )
        )
    assert_same(results[0].masks, results[1].masks)
    assert_same(results[0].params, basis.weights(results[1].params))


def test_gradients_and_fisher_products_are_dense_algebra_in_the_new_basis(x64):
    params = jax.tree.map(lambda x: x.astype(float), PARAMS)
    batch = X.astype(float), LABELS
    turn = dense.matrix_of(MIXED.coefficients, params)
    np.testing.assert_allclose(turn @ turn.T, np.eye(len(turn)), atol=1e-12)
    changed, coefficients = flj.bases.in_basis(MODEL, MIXED), MIXED.coefficients(params)
    # one gradient an example, in both bases
    flat = lambda tree: np.concatenate(
        [np.asarray(x).reshape(len(X), -1) for x in jax.tree.leaves(tree)], axis=1
    )
    space = flat(flj.per_example_gradients(MODEL, params, batch))
    found = flat(flj.per_example_gradients(changed, coefficients, batch))
    np.testing.assert_allclose(found, space @ turn.T, atol=1e-12)
    # the Fisher
    of_space = dense.matrix_of(lambda v: flj.fisher_vector_product(MODEL, params, batch, v), params)
    of_basis = dense.matrix_of(
        lambda v: flj.fisher_vector_product(changed, coefficients, batch, v), params
    )
    np.testing.assert_allclose(of_basis, turn @ of_space @ turn.T, atol=1e-12)
    assert np.abs(of_basis - of_space).max() > 1e-3


def test_kfac_is_the_same_estimate_in_every_basis(x64):
    params = jax.tree.map(lambda x: x.astype(float), PARAMS)
    batch = X.astype(float), LABELS
    products = []
    tangent = dense.random_like(KEYS[2], params)
    for basis in (flj.bases.identity(), MIXED):
        model = flj.bases.in_basis(MODEL, basis)
        estimator = flj.inverse.kfac(model, labels="empirical")
        state = flj.fit(estimator, basis.coefficients(params), [batch], key=KEYS[3])
        products.append(basis.weights(estimator.multiply(state, basis.coefficients(tangent))))
    one, other = (ravel_pytree(x)[0] for x in products)
    np.testing.assert_allclose(one, other, atol=1e-10)


def test_every_estimate_prunes_coefficients():
    model, coefficients = flj.bases.in_basis(MODEL, DCT), DCT.coefficients(PARAMS)
    few = {"gradients": len(X)}
    for name, options in (("diagonal", {}), ("fishleg", {}), ("mfac", {}), ("woodfisher", few)):
        estimator = getattr(flj.inverse, name)(model, **options)
        result = flj.prune_one_shot(
            model,
            coefficients,
            estimator,
            [(X, LABELS)],
            sparsity=0.5,
            stages=1,
            held_out=None,
            saliency="obs",
            prunable="conv",
            compensation=flj.compensation.independent(),
        )
        assert int((result.params["conv"] == 0).sum()) == 9
        assert int((DCT.weights(result.params)["conv"] == 0).sum()) == 0


def masks_while_trained(model, basis, saliency, optimiser, steps):
    """The last weights, and the masks of every step, of which half are kept."""
    pruning = flj.gradual_prune(
        flj.inverse.diagonal(model, labels="empirical"),
        0.5,
        model=model,
        prunable="conv",
        aux_every=1,
        mask_every=2,
        regrow=lambda step: 0.5,
        saliency=saliency,
        compensation=flj.compensation.none(),
    )
    tx = optax.chain(optimiser, pruning)
    params = PARAMS if basis is None else basis.coefficients(PARAMS)
    state, seen = tx.init(params), []

    @jax.jit
    def step(params, state):
        gradient = jax.grad(lambda p: flj.loss(model, p, (X, LABELS)))(params)
        updates, state = tx.update(gradient, state, params, batch=(X, LABELS))
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
        seen.append(np.asarray(flj.masks(state)["conv"]))
        assert seen[-1].sum() == 9 and not np.asarray(params["conv"])[~seen[-1]].any()
    return params, np.stack(seen)


def test_coefficients_come_back_while_training_goes_on():
    model = flj.bases.in_basis(MODEL, DCT)
    _, masks = masks_while_trained(model, DCT, "obs", optax.sgd(0.5), 6)
    assert (masks[1:] & ~masks[:-1]).any()


@pytest.mark.parametrize("saliency", ["magnitude", "by band", "auto"])
def test_coefficients_come_back_by_magnitude_and_an_identity_changes_no_bit(saliency):
    def masks_of(model, basis):
        name = saliency
        if name == "by band":
            name = flj.bases.by_band(basis, lambda x: 2.0**x, "magnitude")
        return masks_while_trained(model, basis, name, optax.adam(0.2), 10)

    _, masks = masks_of(flj.bases.in_basis(MODEL, DCT), DCT)
    assert (masks[1:] & ~masks[:-1]).any()
    if saliency != "by band":
        plain = masks_of(MODEL, None)
        same = flj.bases.identity()
        assert_same(masks_of(flj.bases.in_basis(MODEL, same), same), plain)
        assert_same(masks_of(flj.bases.in_basis(MODEL, EYES), EYES), plain)


def test_bands_shape_the_scores():
    bands = DCT.bands(PARAMS)
    assert bands["conv"][:, :, 0, 1].tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]
    assert not bands["fc"].any()
    model, coefficients = flj.bases.in_basis(MODEL, DCT), DCT.coefficients(PARAMS)
    kept = {}
    for name, rate in (("flat", lambda x: 1 + 0 * x), ("steep", lambda x: jnp.exp(40 * x))):
        masks = flj.prune_one_shot(
            model,
            coefficients,
            flj.inverse.identity(),
            [(X, LABELS)],
            sparsity=0.5,
            prunable="conv",
            saliency=flj.bases.by_band(DCT, rate, "magnitude"),
        ).masks
        kept[name] = np.asarray(masks["conv"])
    plain = flj.make_masks(jax.tree.map(jnp.square, coefficients), 0.5, prunable="conv")
    assert_same(kept["flat"], plain["conv"])
    # nine of 18 stay: the six below the middle frequency, and three of its six
    assert kept["steep"][bands["conv"] < 2].all() and not kept["steep"][bands["conv"] > 2].any()


def test_constants_and_batches_pass_through():
    model = flj.Model(lambda w, x, c: (x * c) @ w, flj.likelihoods.gaussian())
    basis = flj.bases.orthonormal({"": {0: rotation(2, 3)}})
    changed = flj.bases.in_basis(model, basis)
    batch = jnp.ones((2, 3)), jnp.ones((2, 1)), jnp.array([1.0, 2, 3])
    w = jnp.array([[1.0], [2], [3]])
    np.testing.assert_allclose(
        flj.loss(changed, basis.coefficients(w), batch), flj.loss(model, w, batch), rtol=1e-5
    )
    with pytest.raises(ValueError, match="batch has no constants"):
        flj.loss(changed, w, batch[:2])


def test_whole_numbers_may_stay_in_their_basis():
    params = {**PARAMS, "steps": jnp.arange(3)}
    assert DCT.weights(DCT.coefficients(params))["steps"] is params["steps"]
    whole = {"conv": jnp.ones((3, 3, 1, 1), int)}
    assert DCT.bands(whole)["conv"].max() == 4  # shapes only


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: flj.bases.dct(axes=(0, 0)), "axes must be different whole numbers"),
        (lambda: DCT.coefficients({"fc": jnp.ones((2, 3))}), "longer than 1 along their axes"),
        (
            lambda: DCT.coefficients({"query/kernel": jnp.ones((8, 2, 4))}),
            "by default only convolutions change, so name the leaves",
        ),
        (lambda: flj.bases.orthonormal({}), "matrices must map regular expressions"),
        (lambda: flj.bases.orthonormal({"w": {0: 2 * np.eye(2)}}), "orthonormal to 1e-05, got"),
        (lambda: EYES.weights({"conv": jnp.ones((2, 3)), "fc": 1}), "must have size 3 along axis"),
        (lambda: EYES.weights({"conv": jnp.ones((3, 3))}), "'fc' matches no leaf"),
        (
            lambda: DCT.coefficients({"conv": np.ones((3, 3, 1, 1), np.int32)}),
            "'conv' must be a floating-point array to change basis, got int32",
        ),
        (
            lambda: EYES.weights({"conv": PARAMS["conv"], "fc": jnp.ones((2, 3), bool)}),
            "'fc' must be a floating-point array to change basis, got bool",
        ),
        (lambda: flj.bases.in_basis(MODEL, flj.bases.dct), r"call it: flj.bases.dct\(\)"),
        (lambda: flj.bases.by_band(DCT, lambda x: x, "auto"), "saliency must be one of obs"),
        (
            lambda: flj.bases.by_band(DCT, lambda x: x, "magnitude")(PARAMS, *4 * [None]),
            "rate must return a positive number",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
