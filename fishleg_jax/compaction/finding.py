"""Couplings of a network, found or given by the user, and checked."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _prunable, _tree
from fishleg_jax._checks import arrays, numbers
from fishleg_jax._jit import is_traced
from fishleg_jax.compaction import verification
from fishleg_jax.compaction.analysis import Analysis, Network, analyse, couplings_of, first
from fishleg_jax.compaction.couplings import Member, read_all
from fishleg_jax.model import Model

EXAMPLES = 4  # of the inputs, for all but the last comparison


def find_couplings(
    f: Callable[..., Any], params: Any, inputs: Any, *, constants: Any | None = None
) -> list[list[tuple]]:
    """Finds which axes of a network's leaves index the same units: channels, neurons, heads.

    The network is traced, and axes that an operation aligns are coupled: through products,
    convolutions, norms, residual sums, reshapes, transposes, splits, lookups and loops over layers
    or time.  Units that are inputs, outputs, positions or fixed by arrays that `f` closes over are
    left out, and so are couplings that fail a check: permuting their units everywhere must not
    change the outputs.

    Args:
        f: Function `(params, inputs)` or `(params, inputs, constants)`; or a `Model`.
        params: Any pytree of floating-point arrays.
        inputs: Inputs of the network with a leading axis of examples; four are used.
        constants: Pytree of arrays that are not trained, such as batch-norm statistics; their key
            paths begin with `constants/`.  None if `f` takes none.

    Returns:
        A list of couplings, each a list of `(key path, axis)` or `(key path, axis, block size)`:
        unit j is index j along the axis, or its j-th block of that size.  An axis with several
        times as many indices repeats the units.

    Raises:
        ValueError: Invalid params; outputs that are not finite.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> params = {"w1": jnp.ones((3, 8)), "b1": jnp.ones(8), "w2": jnp.ones((8, 2))}
        >>> f = lambda p, x: jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"]
        >>> flj.find_couplings(f, params, jnp.ones((4, 3)))
        [[('b1', 0), ('w1', 1), ('w2', 0)]]
    """
    _, _, found = coupled(f, params, inputs, constants, None)
    return [[member.short for member in members] for members in found]


def coupled(
    f: Any,
    params: Any,
    inputs: Any,
    constants: Any | None,
    couplings: Any | None,
    masks: Any | None = None,
) -> tuple[Network, Analysis, list[tuple[Member, ...]]]:
    """Analyses a network, and finds its couplings or takes the user's; either way they are checked.

    A coupling of the user that fails is refused.  A found one that fails stems from an operation
    that the rules misread, and is left out.

    Returns:
        The network, its analysis, and its verified couplings.
    """
    network = _network(f, params, constants)
    _check_runs(network, inputs)
    leaves, few = network.leaves(), first(inputs, EXAMPLES)
    own = living_leaves(network, masks)
    wide, examples = verification.widened(network, leaves, few)
    call = lambda x: network.call(x, examples)
    if couplings is None:
        analysis = analyse(network, own, few, ())
        found = couplings_of(analysis)
        return network, analysis, verification.verified(call, wide, found)
    given = read_all(couplings, leaves)
    verification.check(call, wide, given)
    return network, analyse(network, own, few, given), given


def _network(f: Any, params: Any, constants: Any | None) -> Network:
    """The user's function, checked."""
    f = f.predict if isinstance(f, Model) else f
    count, expected = (
        (2, "(params, inputs)") if constants is None else (3, "(params, inputs, constants)")
    )
    numbers.check_function(f, "f", count, f"a function {expected}, or a Model")
    arrays.check_params(params)
    return Network(f, params, constants)


def _check_runs(network: Network, inputs: Any) -> None:
    """Raises a ValueError unless the network runs on the inputs and returns real numbers."""
    if is_traced((network.params, network.constants, inputs)):
        raise ValueError(
            "params and inputs must be arrays, got traced ones: shapes can't change under jit"
        )
    empty = [jnp.shape(x) for x in jax.tree.leaves(inputs) if np.ndim(x) and not np.size(x)]
    if empty:
        raise ValueError(f"inputs must have at least one example, got an array of shape {empty[0]}")
    try:
        outputs = jax.eval_shape(network.call, network.leaves(), inputs)
    except Exception as error:  # whatever a user's function raises
        text = str(error).strip().partition("\n")[0]
        shapes = [jnp.shape(x) for x in jax.tree.leaves(inputs)]
        raise ValueError(f"f does not run on inputs of shapes {shapes}: {text}") from error
    for x in jax.tree.leaves(outputs):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise ValueError(
                "f must return logits or other real numbers, in which a difference shows, got "
                f"outputs of dtype {x.dtype}"
            )


def living_leaves(network: Network, masks: Any | None) -> dict[str, Any]:
    """Leaves to analyse: weights that are zero count as pruned only if no masks are given.

    With masks, those of kernels that are zero, but not pruned, become next to zero: units go for
    weights that were pruned, not for those of a layer that begins at zero.

    Args:
        network: The network with pruned weights at zero.
        masks: Booleans like its parameters, False for pruned; or None.
    """
    leaves = network.leaves()
    if masks is None:
        return leaves
    named = _tree.named_leaves(network.params)
    reasons = _prunable.default_reasons(named, None)
    for (name, leaf), mask, reason in zip(named, jax.tree.leaves(masks), reasons, strict=True):
        if reason is None:
            tiny = jnp.finfo(jnp.result_type(leaf)).tiny * 2
            leaves[name] = jnp.where(mask & (leaf == 0), tiny, leaf)
    return leaves
