"""Rematerialisation: recomputes activations instead of storing them, compute against memory."""

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax

from fishleg_jax import _text
from fishleg_jax._checks import numbers
from fishleg_jax._jaxpr import core
from fishleg_jax.model import Model

if TYPE_CHECKING:
    from jax.extend.core import Jaxpr

CALLS = ("jit", "pjit")  # a network that is compiled as a whole is cut inside


def remat(model: Model, segments: int = 8) -> Model:
    """Returns the same model with derivatives that store few activations and recompute the rest.

    The operations of `predict` are cut into segments, each under `jax.checkpoint`: a derivative
    recomputes the inside of a segment when it reaches it.  For a network of n equal layers in s
    segments the peak falls from n layers' activations to about `s + n / s`, for one more forward
    pass in a gradient and two in a Fisher product.  `jax.checkpoint` around all of `predict` would
    save nothing: its backward pass recomputes all activations at once.

    A `lax.scan` over layers is one operation and is not cut: put `jax.checkpoint` around its body.
    That lowers the peak everywhere; XLA for the CPU merges repeated computations outside of loops
    and stores them after all, so on the CPU this function has no effect.

    Args:
        model: Model to rematerialise.
        segments: Number of segments, of about equal size in numbers computed (default 8); best near
            the square root of the number of layers.

    Returns:
        A `Model` to use in place of the original; the same object for equal arguments.

    Raises:
        ValueError: An invalid model, or fewer than one segment.

    References:
        Chen, Xu, Zhang & Guestrin, Training deep nets with sublinear memory cost, 2016, section 4.

    Example:
        >>> import jax.numpy as jnp, fishleg_jax as flj
        >>> model = flj.Model(lambda w, x: jnp.tanh(x @ w) @ w, flj.likelihoods.gaussian())
        >>> batch = jnp.ones((1, 2)), jnp.zeros((1, 2))
        >>> flj.loss(flj.remat(model), jnp.eye(2), batch) == flj.loss(model, jnp.eye(2), batch)
        Array(True, dtype=bool)
    """
    if not isinstance(model, Model):
        raise ValueError(f"model must be a flj.Model, got {_text.shown(model)}")
    return _remat(model, numbers.check_count(segments, "segments"))


@functools.lru_cache(maxsize=64)  # keyed on checked values: arguments have several spellings
def _remat(model: Model, segments: int) -> Model:
    @functools.wraps(model.predict)
    def predict(*args):
        closed, shapes = jax.make_jaxpr(model.predict, return_shape=True)(*args)
        leaves = _run(closed.jaxpr, closed.consts, jax.tree.leaves(args), segments)
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    predict.__wrapped__, predict.is_remat = model.predict, True  # one model, see `_same_model`
    return model._replace(predict=predict)


def _run(jaxpr: "Jaxpr", consts: Sequence[Any], args: Sequence[Any], segments: int) -> list[Any]:
    """Evaluates a traced function segment by segment and returns its results."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    read = lambda atom: atom.val if isinstance(atom, core().Literal) else known[atom]  # noqa: E731
    # a single call, as from `jax.jit`: enter it
    if len(jaxpr.eqns) == 1 and jaxpr.eqns[0].primitive.name in CALLS:
        (call,) = jaxpr.eqns
        inner = call.params["jaxpr"]
        operands = [read(x) for x in call.invars]
        known.update(
            zip(call.outvars, _run(inner.jaxpr, inner.consts, operands, segments), strict=True)
        )
        return [read(x) for x in jaxpr.outvars]
    # run each segment under `jax.checkpoint`, returning only variables that are read later
    parts = _cut(jaxpr.eqns, segments)
    for i, part in enumerate(parts):
        read_later = [x for rest in parts[i + 1 :] for equation in rest for x in equation.invars]
        wanted = _variables([*read_later, *jaxpr.outvars])
        written = [x for equation in part for x in equation.outvars]
        results = [x for x in written if x in wanted]
        operands = _variables(x for equation in part for x in equation.invars)
        operands = [x for x in operands if x not in written]
        body = jaxpr.replace(constvars=[], invars=operands, outvars=results, eqns=part)
        segment = jax.checkpoint(core().jaxpr_as_fun(core().ClosedJaxpr(body, [])))
        known.update(zip(results, segment(*map(read, operands)), strict=True))
    return [read(x) for x in jaxpr.outvars]


def _variables(atoms: Iterable[Any]) -> dict[Any, None]:
    return dict.fromkeys(x for x in atoms if not isinstance(x, core().Literal))


def _cut(equations: Sequence[Any], segments: int) -> list[list[Any]]:
    """Cuts equations into consecutive segments with results of about equal size."""
    sizes = [sum(x.aval.size for x in equation.outvars) for equation in equations]
    parts: list[list[Any]] = [[] for _ in range(segments)]
    total, seen = max(sum(sizes), 1), 0
    for equation, size in zip(equations, sizes, strict=True):
        parts[min(seen * segments // total, segments - 1)].append(equation)
        seen += size
    return [part for part in parts if part]
