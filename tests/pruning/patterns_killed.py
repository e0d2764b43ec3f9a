"""Ten thousand training steps to a pattern, kept on disk, for `test_patterns_killed.py`.

`python -m tests.pruning.patterns_killed FOLDER` trains in a chain of optax, once for each pattern
in a folder of its name, goes on from the newest checkpoint there, and ends with `final.npz`:
weights, masks and the whole state, and the number of zeros that came back.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fishleg_jax as flj
from experiments.running.checkpointing import Checkpoints
from tests import dense

STEPS, CHUNK = 10_000, 500  # a checkpoint after every chunk
SIZES, EXAMPLES = (9, 16, 4), 8
PATTERNS = {
    "n_m": (flj.patterns.n_m(2, 4), 0.5),
    "units": (flj.patterns.units([[("Dense_0/kernel", 1), ("Dense_1/kernel", 0)]]), 0.625),
}
MODEL = flj.Model(dense.mlp, flj.likelihoods.categorical())


def batch_at(step):
    """The batch of a step, which follows from its number alone."""
    x = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (EXAMPLES, SIZES[0]))
    return x, jnp.argmax(x[:, : SIZES[-1]] + x[:, 1 : SIZES[-1] + 1], axis=1)


def make_optimizer(name):
    """A chain with momenta and decay, which pull at pruned weights."""
    pattern, sparsity = PATTERNS[name]
    schedule = flj.schedules.cubic(sparsity, begin=500, end=9000)
    pruning = flj.fishleg_prune(MODEL, schedule, pattern=pattern, mask_every=100, aux_every=20)
    adam = optax.adamw(optax.cosine_decay_schedule(0.01, STEPS), weight_decay=1e-3)
    return optax.chain(optax.clip_by_global_norm(1.0), adam, pruning)


def make_chunk(tx):
    """Function `(carry, step) -> carry` of the next steps, compiled."""

    def step(carry, number):
        params, state, regrown, updates = carry
        before = flj.masks(state)
        batch = batch_at(number)
        grads = jax.grad(lambda p: flj.loss(MODEL, p, batch))(params)
        change, state = tx.update(grads, state, params, batch=batch)
        params = optax.apply_updates(params, change)
        # count zeros that came back, in masks and in weights
        masks = flj.masks(state)
        back = jax.tree.map(lambda w, old, new: ~old & (new | (w != 0)), params, before, masks)
        regrown += sum(x.sum() for x in jax.tree.leaves(back))
        more = jax.tree.map(lambda old, new: (old != new).any(), before, masks)
        updates += jnp.stack(jax.tree.leaves(more)).any()
        return (params, state, regrown, updates), None

    return jax.jit(lambda carry, start: jax.lax.scan(step, carry, start + jnp.arange(CHUNK))[0])


def main(folder):
    """Trains to all patterns, from wherever an earlier process was killed."""
    for name in PATTERNS:
        train(Path(folder) / name, name)


def train(folder, name):
    """Trains to the end."""
    params = dense.mlp_params(jax.random.key(0), SIZES, "float32")
    tx = make_optimizer(name)
    carry, done = (params, tx.init(params), jnp.int32(0), jnp.int32(0)), 0
    chunk = make_chunk(tx)
    with Checkpoints(folder / "checkpoints") as kept:
        found = kept.restore(carry)
        if found is not None:
            done, carry = found
        for start in range(done, STEPS, CHUNK):
            carry = chunk(carry, start)
            kept.save(start + CHUNK, carry)
    params, state, regrown, updates = carry
    report = flj.check(state)
    numbers = {"regrown": regrown, "updates": updates, "sparsity": report.sparsity, "ok": report.ok}
    trees = {"params": params, "masks": flj.masks(state), "state": state}
    np.savez(folder / "final.npz", **_named(trees), **numbers)


def _named(tree):
    """Arrays by key path, with random keys as numbers."""
    named = {
        jax.tree_util.keystr(path, simple=True, separator="."): x
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    is_key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    return {name: jax.random.key_data(x) if is_key(x) else x for name, x in named.items()}


if __name__ == "__main__":
    main(*sys.argv[1:])
