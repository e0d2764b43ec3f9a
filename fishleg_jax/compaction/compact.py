"""The same function in a smaller network."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _prunable, _tree
from fishleg_jax._checks import numbers
from fishleg_jax.compaction import comparison
from fishleg_jax.compaction import report as _report
from fishleg_jax.compaction.analysis import Analysis, Network, analyse, couplings_of, first
from fishleg_jax.compaction.axes import Factor
from fishleg_jax.compaction.comparison import Misfit
from fishleg_jax.compaction.couplings import Member
from fishleg_jax.compaction.cutting import FIXED, uncuttable, without
from fishleg_jax.compaction.finding import EXAMPLES, coupled, living_leaves
from fishleg_jax.compaction.removal import Decision, Run, check_settled, decide
from fishleg_jax.compaction.result import Compact, Kept
from fishleg_jax.compaction.sizes import other_runs
from fishleg_jax.compaction.slicing import Slicer
from fishleg_jax.pruning.masks.groups import check_masks


def compact(
    f: Callable[..., Any],
    params: Any,
    masks: Any | None,
    inputs: Any,
    *,
    constants: Any | None = None,
    couplings: list[list[tuple]] | None = None,
    multiple_of: int = 1,
    tolerance: float | None = None,
) -> Compact:
    """Removes units that pruning left without weights: the same function in a smaller network.

    A unit (a channel, neuron or head) goes if all its incoming weights are zero, so that it gives
    out a constant, or all its outgoing ones, or a mixture of both.  The constant is folded into
    the bias or the batch-norm mean behind it, where that is exact; otherwise the unit stays, and
    the report says why.  So do units of found couplings if the outputs depend on their number, or
    `f` does not run with fewer of them.  At the end the outputs of both networks are compared.

    Args:
        f: Function `(params, inputs)` or `(params, inputs, constants)`, or a `Model`: the network
            in evaluation mode.  It has to run with smaller arrays, so sizes must come from the
            shapes of `params`, not from numbers fixed before.
        params: Any pytree of floating-point arrays.
        masks: Pytree of booleans like the parameters, False for pruned; weights that are zero, but
            not pruned, stay.  None if pruned weights are zero in `params`.
        inputs: Inputs with a leading axis of examples.  Four are used to analyse the network, all
            to compare it.  If constants are folded, other axes are also tried a little shorter, at
            half of their size and, for loops over time, at twice of it, where `f` runs on that: a
            unit whose constant changes with it stays.
        constants: Pytree of arrays that are not trained, such as batch-norm statistics; their key
            paths begin with `constants/`.  None if `f` takes none.
        couplings: Axes that index the same units, each coupling a list of `(key path, axis)` or
            `(key path, axis, block size)`; None finds them, as `find_couplings` does.  Units of
            all layers of a scan are one coupling, so one goes if it is pruned in every layer.
        multiple_of: Sizes are rounded up to multiples of this number by keeping units without
            weights; 1 by default.
        tolerance: Largest difference between the outputs of both networks, relative to the largest
            output.  None, the default, for 1e-5, or for 4 times the machine epsilon of the coarsest
            dtype that `f` computes with the parameters in if that is coarser than float32: 0.031 in
            bfloat16, 0.0039 in float16.

    Returns:
        A `Compact`: smaller `params`, `constants` and `masks`, the units `kept`, a `report`, and
        the methods `like` and `opt_state` for further trees.  What took up a constant is kept by
        the masks; with `masks=None` so are biases, norms and other leaves that are not pruned by
        default.

    Raises:
        ValueError: Invalid arguments; a coupling that changes the outputs when its units are
            permuted, or one of the user's that can't be cut; a function that does not run with
            smaller arrays, or computes something else.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> params = {"w1": jnp.ones((3, 8)), "b1": jnp.ones(8), "w2": jnp.ones((8, 2))}
        >>> params["b2"] = jnp.zeros(2)
        >>> f = lambda p, x: jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
        >>> params["w1"] = params["w1"].at[:, 2:].set(0)
        >>> small = flj.compact(f, params, None, jnp.ones((4, 3)))
        >>> small.params["w1"].shape, small.params["b2"]  # 6 tanh(1) in b2
        ((3, 2), Array([4.569565, 4.569565], dtype=float32))
    """
    # Refuse invalid arguments before anything runs.
    numbers.check_count(multiple_of, "multiple_of")
    if tolerance is not None:
        tolerance = numbers.check_not_negative(tolerance, "tolerance")
    if masks is not None:
        check_masks(params, masks)
        params = jax.jit(_tree.apply_mask)(params, masks)
    network, analysis, given = coupled(f, params, inputs, constants, couplings, masks)
    few = first(inputs, EXAMPLES)
    run = Run(analysis, [_factor(analysis, members, i) for i, members in enumerate(given)])

    # Decide which units go: those of found couplings only if they can be cut out of `f`.
    wrong = uncuttable(network, given, run.factors, few)
    frozen = {}
    if couplings is None:
        frozen = {i: FIXED if isinstance(x, Misfit) else str(x) for i, x in wrong.items()}
    decision, others = decide([run], frozen, multiple_of), []
    if any(not living.all() for living in decision.alive):
        own = living_leaves(network, masks)
        analysed = lambda x: analyse(network, own, x, given)
        runs, others = _other_runs(network, run, given, few, analysed, bool(decision.changes))
        decision = decide([run, *runs], frozen, multiple_of)
    _check_cut(network, given, wrong, decision, couplings, few)

    # Fold what they give out, cut, and compare.
    small, cuts = without(network, given, decision.alive, decision.changes)
    difference = comparison.compare(network, small, inputs, tolerance)
    for other in others:
        comparison.compare(network, small, other, tolerance)

    # Report.
    counted = [_report.flops(x, inputs) for x in (network, small)]
    sizes = [x.units for x, *_ in given]
    leaves = network.leaves()
    units = [
        _report.units_of(*row, leaves)
        for row in zip(given, decision.alive, decision.reasons, strict=True)
    ]
    report = _report.CompactReport(
        tuple(units),
        (_report.size(params), _report.size(small.params)),
        (_report.bytes_of((params, constants)), _report.bytes_of((small.params, small.constants))),
        None if None in counted else tuple(counted),
        tuple(decision.changes),
        difference,
    )
    slicer = Slicer(
        {
            tuple(path): _tree.leaf_name(path)
            for path, _ in jax.tree_util.tree_leaves_with_path(params)
        },
        {name: jnp.shape(leaf) for name, leaf in _tree.named_leaves(params)},
        cuts,
    )
    kept = [
        Kept([x.short for x in members], np.flatnonzero(living), size)
        for members, living, size in zip(given, decision.alive, sizes, strict=True)
    ]
    if masks is None:
        masks = _zeros_of_weights(params)
    masks = _with_folded(slicer.like(masks), small.params, decision.changes)
    return Compact(small.params, small.constants, masks, tuple(kept), report, slicer)


def _zeros_of_weights(params: Any) -> Any:
    """Masks of zeros, but True in biases and norms: these are pruned by nobody's default."""
    reasons = _prunable.default_reasons(_tree.named_leaves(params), None)
    leaves, tree = jax.tree.flatten(params)
    return tree.unflatten(
        [
            jnp.ones(jnp.shape(x), bool) if reason else jnp.asarray(x != 0)
            for x, reason in zip(leaves, reasons, strict=True)
        ]
    )


def _with_folded(masks: Any, params: Any, changes: Mapping[str, Any]) -> Any:
    """Masks that keep what took up a constant: without it the network is another one."""
    leaves, tree = jax.tree.flatten(masks)
    named = zip(_tree.named_leaves(params), leaves, strict=True)
    return tree.unflatten(
        [mask | jnp.asarray(x != 0) if name in changes else mask for (name, x), mask in named]
    )


def _other_runs(
    network: Network,
    run: Run,
    given: Sequence[tuple[Member, ...]],
    inputs: Any,
    analysed: Callable[[Any], Analysis],
    folded: bool,
) -> tuple[list[Run], list[Any]]:
    """Runs of the network on inputs of other sizes, and these inputs."""
    runs, others = [], []
    for other, found, longer in other_runs(network, inputs, analysed, folded):
        try:
            again = Run(found, [_factor(found, members, i) for i, members in enumerate(given)])
        except ValueError:  # units that a reshape cuts apart at this size alone
            continue
        if longer:
            check_settled(run, again)
        runs.append(again)
        others.append(other)
    return runs, others


def _check_cut(
    network: Network,
    given: Sequence[tuple[Member, ...]],
    wrong: Mapping[int, ValueError],
    decision: Decision,
    couplings: Any | None,
    inputs: Any,
) -> None:
    """Raises a ValueError for units that should go and can't be cut out of the function.

    Those of found couplings stay; if there are no others, the function is at fault.
    """
    for i, error in wrong.items():
        if couplings is None:
            nothing = all(living.all() for living in decision.alive)
            if nothing and isinstance(error, Misfit) and FIXED in decision.reasons[i].values():
                raise error
        elif not decision.alive[i].all():
            hint = _lacking(network, given, inputs) if isinstance(error, Misfit) else ""
            raise ValueError(f"couplings[{i}]: {error}{hint}; leave it out") from error


def _lacking(network: Network, given: Sequence[tuple[Member, ...]], inputs: Any) -> str:
    """What the user's couplings lack of those that are found, in words."""
    analysis = analyse(network, network.leaves(), first(inputs, EXAMPLES), ())
    for i, members in enumerate(given):
        for found in couplings_of(analysis):
            missing = set(found) - set(members)
            if missing and set(found) & set(members):
                names = ", ".join(repr(x.short) for x in sorted(missing))
                return f".  find_couplings puts {names} into couplings[{i}] as well"
    return ""


def _factor(analysis: Any, members: tuple[Member, ...], number: int) -> Any:
    """The factor of a coupling."""
    if members[0].units == 1:
        return Factor(1)  # one unit stays
    found = analysis.factor_of(members[0])
    if found is None:
        raise ValueError(
            f"couplings[{number}]: f reshapes axis {members[0].axis} of {members[0].name!r} in a "
            f"way that cuts its {members[0].units} units apart: they can't be removed one by one"
        )
    return found
