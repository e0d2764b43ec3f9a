"""A transformer as people write it: scanned layers, mixed precision, padded tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fishleg_jax as flj

LAYERS, WIDTH, HEADS, WORDS, LENGTH = 2, 8, 2, 12, 6
PADDING = -100
STACKED = "^layers/"


def norm(x, scale):
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def block(x, layer):
    """Attention and a feed-forward part, in bfloat16 with weights in float32."""
    half = lambda w: w.astype(jnp.bfloat16)
    heads = lambda y: y.reshape(*y.shape[:2], HEADS, -1)
    h = half(norm(x, layer["attention_norm"]["scale"]))
    q, k, v = jnp.split(h @ half(layer["qkv"]["kernel"]) + half(layer["qkv"]["bias"]), 3, axis=-1)
    y = jax.nn.dot_product_attention(heads(q), heads(k), heads(v), is_causal=True)
    x = x + y.reshape(x.shape) @ half(layer["project"]["kernel"])
    h = half(norm(x, layer["mlp_norm"]["scale"]))
    return x + jax.nn.gelu(h @ half(layer["up"]["kernel"])) @ half(layer["down"]["kernel"]), None


def predict(params, tokens):
    x = (params["embed"]["embedding"][tokens] + params["pos_embedding"]).astype(jnp.bfloat16)
    x, _ = jax.lax.scan(block, x, params["layers"])
    return x @ params["head"]["kernel"].astype(jnp.bfloat16)


def problem(key):
    """Weights drawn at a scale at which the network is not flat, and a batch with padding."""
    shapes = {
        "embed": {"embedding": (WORDS, WIDTH)},
        "pos_embedding": (1, LENGTH, WIDTH),
        "layers": {
            "attention_norm": {"scale": (LAYERS, WIDTH)},
            "qkv": {"kernel": (LAYERS, WIDTH, 3 * WIDTH), "bias": (LAYERS, 3 * WIDTH)},
            "project": {"kernel": (LAYERS, WIDTH, WIDTH)},
            "mlp_norm": {"scale": (LAYERS, WIDTH)},
            "up": {"kernel": (LAYERS, WIDTH, 2 * WIDTH)},
            "down": {"kernel": (LAYERS, 2 * WIDTH, WIDTH)},
        },
        "head": {"kernel": (WIDTH, WORDS)},
    }
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(leaves))
    pairs = zip(keys, leaves, strict=True)
    params = tree.unflatten(jax.random.normal(k, s) * s[-2] ** -0.5 for k, s in pairs)
    tokens = jax.random.randint(keys[0], (16, LENGTH), 0, WORDS)
    lengths = jax.random.randint(keys[1], (16, 1), 1, LENGTH + 1)
    labels = jnp.where(jnp.arange(LENGTH) < lengths, (tokens + 1) % WORDS, PADDING)
    return params, (tokens, labels)


MODEL = flj.Model(predict, flj.likelihoods.categorical(ignore=PADDING))
ESTIMATORS = {
    "fishleg": flj.inverse.fishleg(MODEL, stacked=STACKED, start=8, updates=12),
    "kfac": flj.inverse.kfac(MODEL, stacked=STACKED),
    "diagonal": flj.inverse.diagonal(MODEL),
}
WEIGHTS = LAYERS * WIDTH * (3 + 1 + 2 + 2) * WIDTH + WIDTH * WORDS


@pytest.mark.slow
@pytest.mark.parametrize("name", ESTIMATORS)
def test_one_shot_and_gradual(key, name):
    """The default prunes the kernels and nothing else, and the loss stays finite and sane."""
    params, batch = problem(key)
    dense = float(flj.loss(MODEL, params, batch))
    result = flj.prune_one_shot(
        MODEL,
        params,
        ESTIMATORS[name],
        [batch],
        sparsity=0.5,
        scope="layer",
        compensation=flj.compensation.group(),
        prunable=flj.Leaves(stacked=STACKED),
    )
    assert result.report.total.weights == WEIGHTS and result.report.total.sparsity == 0.5
    assert {row.name for row in result.report.rows} == {
        "head/kernel",
        *(f"layers/{n}/kernel" for n in ("qkv", "project", "up", "down")),
    }
    for row in result.report.rows[1:]:
        kept = jax.tree.leaves(
            [m for p, m in flj._tree.named_leaves(result.masks) if p == row.name]
        )[0]
        assert [int(jnp.sum(~layer)) for layer in kept] == [kept[0].size // 2] * LAYERS
    info = result.stages[0]
    assert np.isfinite(info["actual"]) and info["actual"] < dense
    magnitude = flj.prune_one_shot(
        MODEL,
        params,
        flj.inverse.identity(),
        [batch],
        sparsity=0.5,
        scope="layer",
        compensation=flj.compensation.none(),
        prunable=flj.Leaves(stacked=STACKED),
    )
    assert dense + info["actual"] < float(flj.loss(MODEL, magnitude.params, batch))

    pruning = flj.gradual_prune(
        ESTIMATORS[name],
        flj.schedules.cubic(0.5, begin=10, end=20),
        model=MODEL,
        aux_every=4,
        mask_every=5,
        scope="layer",
        prunable=flj.Leaves(stacked=STACKED),
    )
    tx = optax.chain(optax.adam(1e-2), pruning)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: flj.loss(MODEL, p, batch))(params)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(25):
        params, state = step(params, state)
    assert flj.check(state).ok and flj.check(state).sparsity == 0.5
    assert float(flj.loss(MODEL, params, batch)) < dense
    assert bool(jnp.all(params["layers"]["qkv"]["bias"] != 0))
