"""A batch as a NamedTuple and as a bare tuple: the same to all that takes one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fishleg_jax as flj
from fishleg_jax import _batch
from tests import dense

MODEL = dense.categorical_mlp()
WITH_CONSTANTS = flj.Model(
    lambda params, x, scale: dense.mlp(params, scale * x), flj.likelihoods.categorical()
)
KEY = jax.random.key(0)
PARAMS = dense.mlp_params(KEY)
BARE = dense.classification_batch(KEY)


def results(model, batch):
    """Everything that takes a batch, of one."""
    return [
        flj.loss(model, PARAMS, batch),
        flj.losses(model, PARAMS, batch, examples_per_chunk=5),
        flj.fisher_vector_product(model, PARAMS, batch, PARAMS),
        flj.per_example_gradients(model, PARAMS, batch),
        flj.curvature(model, [batch, batch]).gradient(PARAMS),
    ]


def prunings(model, batch):
    """Weights that are pruned by a batch, at once and in a chain."""
    pruned = flj.prune_one_shot(model, PARAMS, flj.inverse.diagonal(model), [batch], sparsity=0.5)
    tx = flj.gradual_prune(flj.inverse.diagonal(model), 0.5, model=model)
    updates = jax.tree.map(jnp.zeros_like, PARAMS)
    return [pruned.params, tx.update(updates, tx.init(PARAMS), PARAMS, batch=batch)[0]]


@pytest.mark.parametrize(
    "model, bare, named",
    [
        (MODEL, BARE, flj.Batch(*BARE)),
        (WITH_CONSTANTS, (*BARE, jnp.float32(2)), flj.Batch(*BARE, jnp.float32(2))),
    ],
    ids=["plain", "constants"],
)
def test_a_named_batch_is_a_bare_one(model, bare, named):
    pairs = zip(results(model, bare), results(model, named), strict=True)
    for one, other in pairs:
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_named_batch_prunes_as_a_bare_one():
    constants = (*BARE, jnp.float32(2))
    one, other = (
        prunings(WITH_CONSTANTS, constants),
        prunings(WITH_CONSTANTS, flj.Batch(*constants)),
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_batch_without_targets_has_none():
    unlabelled = flj.Batch(BARE[0])
    assert unlabelled.targets is None and unlabelled.constants is None
    product = flj.fisher_vector_product(MODEL, PARAMS, unlabelled, PARAMS)
    expected = flj.fisher_vector_product(MODEL, PARAMS, (BARE[0], None), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, product, expected)


def test_constants_are_replaced_in_both_kinds():
    named, bare = flj.Batch(*BARE, 1.0), (*BARE, 1.0)
    changed = _batch.with_constants([named, bare], 2.0)
    assert isinstance(changed[0], flj.Batch) and changed[0].constants == 2.0
    assert type(changed[1]) is tuple and changed[1][2] == 2.0


def test_one_batch_in_place_of_a_list_is_refused():
    with pytest.raises(ValueError, match="batches must be a sequence of batches"):
        flj.prune_one_shot(MODEL, PARAMS, flj.inverse.identity(), flj.Batch(*BARE), sparsity=0.5)
