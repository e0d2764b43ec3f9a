"""All-gathers in the compiled functions of an estimate."""

import functools
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import fishleg_jax as flj
from experiments.sharding.case import EXAMPLES, GRADIENTS, Case, make_estimator
from fishleg_jax import _curvature
from fishleg_jax._devices import mesh, placement
from fishleg_jax.pruning.masks.lowest import _keep

RUNS = 3  # of the model in an update, at most
GATHER = re.compile(r"= \(?(\w+)\[([\d,]*)\][^=]*? all-gather(?:-start)?\(")


def all_gathers(text: str) -> Counter:
    """Types and shapes of the results of all-gathers in a compiled text; masks are `pred`.

    They are sorted and without ones; of gradients of all examples they are those of one gradient.
    """
    without = {"", "1", str(EXAMPLES), str(GRADIENTS)}
    found = [
        (kind, *sorted(int(n) for n in dims.split(",") if n not in without))
        for kind, dims in GATHER.findall(text)
    ]
    return Counter(found)


def compiled(function: Callable, *args: Any) -> Counter:
    """The all-gathers of a function that is compiled for the devices on which arguments lie."""
    return all_gathers(jax.jit(function).lower(*args).compile().as_text())


def gathered(name: str, case: Case) -> dict[str, Counter]:
    """All-gathers of an estimate's functions and a Fisher product, beyond the model's own gradient.

    They are compiled as `fit` and `prune_one_shot` do.
    """
    return _gathered(name, case.params, case)


@mesh.in_mesh_of_params
def _gathered(name: str, params: Any, case: Case) -> dict[str, Counter]:
    batch, estimator = case.batch, make_estimator(name, case)
    state, key = estimator.init(params), jax.random.key(2)
    gradient = compiled(jax.grad(lambda p, b: flj.loss(case.model, p, b)), params, batch)
    masks = jax.tree.map(lambda p: p > -0.1, params)
    kernels = lambda tree: [tree["one"], tree["two"]]
    found = {
        "update": compiled(estimator.update, state, params, batch, key, masks),
        "multiply": compiled(estimator.multiply, state, params, masks),
        "diagonal": compiled(estimator.diagonal, state, params, masks),
        "masks": compiled(
            lambda s, m: _keep(jax.tree.map(jnp.abs, s), m, 3000),
            kernels(params),
            kernels(masks),
        ),
    }
    # the weights that a gradient gathers, for labels and for the gradient or a Fisher product, and
    # the vector that this takes in their place
    own = Counter({k: RUNS * n for k, n in gradient.items()})
    found["update"] -= own
    if "convolution" in params and name != "fishleg":
        # of per-example gradients each device makes its own, with all weights, see `of_examples`
        found["update"] -= Counter(
            {
                (str(x.dtype)[0] + str(8 * x.dtype.itemsize), *sorted(x.shape)): 1
                for x in jax.tree.leaves(params)
            }
        )
    found["product"] = product(case) - own
    return found


def product(case: Case) -> Counter:
    """The all-gathers of a Fisher product; every iteration of a group update makes one."""
    place = placement.placement_like(case.params)
    static = _curvature._product_sum, place, case.model, "exact", None
    run = functools.partial(placement.placed, *static)
    return compiled(run, case.batch, jax.random.key(2), case.params, case.params)


def largest(found: dict[str, Counter]) -> int:
    """The numbers in the largest all-gather."""
    return max((math.prod(shape) for c in found.values() for _, *shape in c), default=0)
