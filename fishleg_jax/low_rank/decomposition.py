"""Decomposition of a network's kernels, with ranks for a budget."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _chunks, _prunable, _text, _tree
from fishleg_jax._checks import arrays, numbers
from fishleg_jax.fisher import check_kind
from fishleg_jax.low_rank import choice, forms
from fishleg_jax.low_rank.budget import checked_rule, choose
from fishleg_jax.low_rank.factors import in_place
from fishleg_jax.low_rank.moments import check_moments, second_moments
from fishleg_jax.low_rank.parts import Part, find_parts
from fishleg_jax.low_rank.report import DecompositionReport, Row
from fishleg_jax.low_rank.running import apply
from fishleg_jax.model import BatchLike, Model, check_model
from fishleg_jax.pruning.target_types import Budget, Limit

METRICS = ("fisher", "identity")
FISHERS = ("exact", "sampled", "empirical")


class Decomposition(NamedTuple):
    """Factorised network, as `decompose` returns it.

    Attributes:
        params: Parameters, with a dictionary of smaller kernels in the place of each decomposed
            one, in its dtype and in the order of its axes: `{"left", "right"}`, whose product is a
            matrix in either layout, or `{"first", "core", "last"}`.
        model: Model that takes them; `low_rank.apply` makes the same of any other function.
        report: Row for every leaf, and a total; print it.
        moments: Second moments of the gradients, a pair for every kernel by its key path, for
            another decomposition of the same weights; None for a plain one.
    """

    params: Any
    model: Model
    report: DecompositionReport
    moments: dict[str, tuple[np.ndarray, np.ndarray]] | None = None

    def __repr__(self) -> str:
        """One line, without the arrays."""
        return f"Decomposition({self.report.summary()})"


def decompose(
    model: Model,
    params: Any,
    batches: Sequence[BatchLike],
    budget: float | Budget | Limit | None = None,
    *,
    ranks: str | Mapping[str, int | tuple[int, int]] = "global",
    metric: str = "fisher",
    convolutions: str | Mapping[str, str] = "channel",
    decomposable: _prunable.LeafSelection = None,
    damping: float = 1e-3,
    fisher: str = "exact",
    examples_per_gradient: int = 1,
    examples_per_chunk: int | None = None,
    key: jax.Array | None = None,
    moments: Mapping[str, tuple[Any, Any]] | None = None,
) -> Decomposition:
    """Replaces kernels by products of smaller ones, with ranks for a budget of the whole network.

    A dense kernel K becomes `L R`.  With the Kronecker factors of its Fisher, `F ≈ A ⊗ B`, the rise
    of the loss is `½ ‖A^½ (K − LR) B^½‖²`, whose minimum of rank r is in closed form: whiten K,
    truncate its singular values, unwhiten.  Convolutions become two or three smaller ones.

    The network is traced to find its kernels, so that it may come from any framework.  A kernel
    is a leaf that inputs are multiplied with along all of its first or all of its last axes, as in
    dense layers and attention, or in an ungrouped convolution, and that nothing else happens to;
    other leaves stay whole, and the report gives the reason.  No kernel is multiplied out when the
    result runs.

    Args:
        model: Network and likelihood.
        params: Trained weights, any pytree of floating-point arrays.
        batches: Batches of training data for the Fisher.  The first also gives the shapes of
            inputs; with `metric="identity"` nothing else is read.
        budget: Share in (0, 1] of the weights of the kernels that are decomposed; or most that
            these may take, `targets.weights`, `.bytes` or `.flops`; or most that the loss may rise,
            `targets.loss_increase(..., measured=False)`, with `ranks="global"` only.  A kernel that
            factors would not make smaller stays whole.  None if `ranks` gives the ranks.
        ranks: Rule of the ranks.  `global`, the default, keeps the components that save most loss
            per cost in the whole network, by one threshold; `equal` gives every kernel the same
            share of its cost, `energy` the same share of its squared singular values; `search`
            descends on probabilities of ranks under a composite loss of relative errors and cost,
            whose minimum is one threshold on relative errors.
            Or a mapping from regular expressions over key paths to ranks, pairs of ranks for
            Tucker-2; ranks are cut to what a kernel has, and other kernels stay whole.
        metric: `fisher`, the default, or `identity` for plain decompositions.
        convolutions: Form of convolutions: `channel` for a convolution to r channels and one of
            1 × 1, the default; `spatial` for one along the height and one along the width;
            `tucker2` for one of 1 × 1, a smaller one and one of 1 × 1; or a mapping from regular
            expressions over key paths to these, `channel` for others.
        decomposable: Leaves to decompose, given like `prunable`; None for kernels of dense layers
            and convolutions that are prunable by default.
        damping: Number added to the eigenvalues of A and of B, as a share of their mean; 0.001 by
            default.
        fisher: Fisher of the metric: `exact` (default), from random signs times a root of the
            Fisher of the outputs; `sampled`, from labels drawn from the model; or `empirical`, from
            the labels of the data.
        examples_per_gradient: Examples added up in one gradient, 1 by default, which divides every
            batch; more of them cost less time and give noisier factors.
        examples_per_chunk: Examples whose gradients are held at a time, which bounds memory; None
            for a whole batch.
        key: Random key of the samples; `jax.random.key(0)` by default.
        moments: Field `moments` of an earlier result for the same weights and form of convolutions,
            which saves the pass over the batches; None computes them.

    Returns:
        A `Decomposition`: factorised parameters, their model, and a report.

    Raises:
        ValueError: An argument of another type or out of its range, a budget out of reach, an
            expression that matches nothing, or a selected leaf that is not a kernel of a dense
            layer or an ungrouped convolution; or a call within `jax.jit`, `grad` or `vmap`.
        FloatingPointError: Gradients that are not finite.

    References:
        Denton et al., Exploiting linear structure within convolutional networks, 2014 (channel);
        Jaderberg, Vedaldi & Zisserman, Speeding up convolutional neural networks with low rank
        expansions, 2014 (spatial); Kim et al., Compression of deep convolutional neural networks,
        2016 (Tucker-2); Martens & Grosse, K-FAC, 2015 (A and B); Aghababaei-Harandi & Amini,
        Unified framework for neural network compression via decomposition and optimal rank
        selection, 2024 (`ranks="search"` follows its idea, not its algorithm: ranks searched in a
        continuous space under a composite loss, without data).

    Example:
        >>> import jax, jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda p, x: x @ p["kernel"], flj.likelihoods.gaussian())
        >>> params = {"kernel": jnp.outer(jnp.arange(8.0), jnp.ones(6))}  # of rank 1
        >>> x = jax.random.normal(jax.random.key(0), (32, 8))
        >>> small = flj.low_rank.decompose(model, params, [(x, None)], 0.5)
        >>> small.report.rows[0].ranks, small.report.weights
        ((1,), (48, 14))
        >>> difference = small.model.predict(small.params, x) - model.predict(params, x)
        >>> bool(abs(difference).max() < 1e-4)
        True
    """
    # Reject invalid arguments before anything is compiled.
    check_model(model)
    arrays.check_untraced(  # ranks depend on the values of the weights
        "decompose first, and compile what uses the result",
        "decompose",
        params=params,
        batches=batches,
        moments=moments,
        key=key,
    )
    arrays.check_params(params)
    arrays.check_batches(batches)
    rule, given = checked_rule(ranks, budget)
    for name, value, known in (("metric", metric, METRICS), ("fisher", fisher, FISHERS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {_text.shown(value)}")
    numbers.check_positive(damping, "damping")
    numbers.check_count(examples_per_gradient, "examples_per_gradient")
    _chunks.check_chunk(examples_per_chunk)
    if metric == "fisher":
        check_kind(fisher, batches[0], jax.random.key(0))
    parts, reasons = find_parts(model, params, batches[0], convolutions, decomposable)

    # Second moments of gradients, folded as the kernels are.
    if metric == "identity":
        moments = None
    elif moments is None:
        folding = {part.name: (part.form, part.use) for part in parts}
        moments = second_moments(
            model,
            params,
            batches,
            folding,
            fisher=fisher,
            examples_per_gradient=examples_per_gradient,
            examples_per_chunk=examples_per_chunk,
            key=jax.random.key(0) if key is None else key,
        )
    else:
        check_moments(parts, moments)

    # Choose the ranks of all kernels, then make the factors.
    options = [
        forms.options_of(part.form, part.kernel, part.use, own, damping)
        for part, own in zip(parts, _of_parts(parts, moments), strict=True)
    ]
    chosen = choose(parts, options, rule, given, params)
    leaves, tree = jax.tree.flatten(params)
    rows = []
    for i, (name, leaf) in enumerate(_tree.named_leaves(params)):
        found = next((k for k, part in enumerate(parts) if part.leaf == i), None)
        if found is None:
            rows.append(Row.whole(name, leaf, reasons[i]))
            continue
        part, own, index = parts[found], options[found], chosen[found]
        if index == choice.DENSE:
            rows.append(Row.whole(name, leaf, "factors would not be smaller", own.dense[1]))
            continue
        ranks_here = tuple(int(r) for r in own.ranks[index])
        factors = in_place(own.factors(ranks_here), part.use, leaf.shape)
        leaves[i] = {key: jnp.asarray(x, leaf.dtype) for key, x in factors.items()}
        rows.append(Row.of(name, leaf, part.form, own, index))
    factorised = Model(apply(model.predict, params), model.likelihood)
    report = DecompositionReport(tuple(rows), metric)
    kept = None if moments is None else dict(moments)
    return Decomposition(tree.unflatten(leaves), factorised, report, kept)


def _of_parts(parts: Sequence[Part], moments: Mapping | None) -> list:
    return [None if moments is None else moments[part.name] for part in parts]
