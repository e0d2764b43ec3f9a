"""Checks of gradual pruning, before anything is compiled."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fishleg_jax import _prunable, _text
from fishleg_jax._checks import numbers
from fishleg_jax._devices import axis
from fishleg_jax.inverse.base import check_estimator
from fishleg_jax.pruning.gradual.counting import is_number
from fishleg_jax.pruning.leaves import Leaves
from fishleg_jax.pruning.masks.build import number_to_prune
from fishleg_jax.pruning.masks.densities import NEAR, check_scope
from fishleg_jax.pruning.masks.groups import Groups
from fishleg_jax.pruning.masks.patterns import Pattern, check_pattern
from fishleg_jax.pruning.one_shot.checks import check_compensation

STEPS = 1, 100, 10_000, 1_000_000  # at which a schedule is checked


def check_arguments(
    estimator: Any,
    sparsity: Any,
    scope: Any,
    compensation: Any,
    regrow: Any,
    pattern: Any = None,
    **whole: Any,
) -> None:
    """Raises a ValueError for an argument of `gradual_prune` that is out of its range.

    Args:
        estimator: Estimate of the inverse Fisher.
        sparsity: Number, array or function of the step; None with a pattern or densities.
        scope: Weights that share a threshold.
        compensation: Compensation, a function.
        regrow: None, a number or a function of the step.
        pattern: None or a pattern.
        **whole: Numbers of steps by argument name; `renew` may be None.
    """
    # Check types: numbers are checked at once, functions at a few steps.
    check_estimator(estimator)
    if is_number(sparsity):
        number_to_prune(sparsity, 1)
    elif sparsity is None:
        if not isinstance(scope, Mapping) and getattr(pattern, "kind", None) != "n_m":
            raise ValueError(
                "sparsity must be a number in [0, 1) or a function of the step, got None, which "
                "only patterns.n_m and densities by name allow"
            )
    elif not callable(sparsity) and not is_array(sparsity):
        raise ValueError(
            "sparsity must be a number in [0, 1) or a function of the step, such as "
            f"schedules.cubic(0.9, begin=100, end=2000), got {_text.shown(sparsity)}"
        )
    for name, value in (("sparsity", sparsity), ("regrow", regrow)):
        if callable(value):
            check_schedule(value, name)
            check_range(value, name)
    check_scope(scope)
    check_pattern(pattern)
    if pattern is not None and regrow is not None:
        raise ValueError(
            "regrow must be None with a pattern, because no weight comes back alone, got "
            f"{_text.shown(regrow)}"
        )
    _check_reach(sparsity, pattern)
    check_compensation(compensation)
    # Check ranges, as far as values are concrete.
    if is_array(sparsity) and _concrete(sparsity) and not 0 <= float(sparsity) < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {_text.shown(sparsity)}")
    known = is_number(regrow) or (is_array(regrow) and _concrete(regrow))
    fits = 0 <= float(regrow) <= 1 if known else callable(regrow) or is_array(regrow)
    if regrow is not None and not fits:
        raise ValueError(
            f"regrow must be a number in [0, 1] or a function, got {_text.shown(regrow)}"
        )
    # Check numbers of steps.
    for name, value in whole.items():
        if not (value is None and name == "renew") and not _is_whole(value):
            raise ValueError(
                f"{name} must be a whole number of steps, at least 1, got {_text.shown(value)}"
            )
    if (
        whole.get("renew") is not None
        and _concrete(whole["renew"])
        and (_concrete(whole["mask_every"]) and whole["renew"] > whole["mask_every"])
    ):
        raise ValueError(
            f"renew must be at most mask_every, {whole['mask_every']}, got {whole['renew']}"
        )


def check_schedule(value: Any, name: str) -> None:
    """Raises a ValueError for a function of the step that raises or does not return a real number.

    It is called once with a traced step, as under `jit`; nothing is computed.

    Args:
        value: Function of the step.
        name: Name of the argument.
    """
    invalid = []
    expected = (
        f"{name} must return a number at every step if it is a function, also for a step traced "
        "under jit (use jnp.where instead of if)"
    )
    try:
        jax.eval_shape(
            lambda step: invalid.append(_no_number(value(step))),
            jax.ShapeDtypeStruct((), jnp.int32),
        )
    except Exception as error:  # whatever a user's function raises
        first = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{expected}, got {_text.shown(value)}, which raised {type(error).__name__}: {first}"
        ) from error
    if invalid[0]:
        raise ValueError(f"{expected}, got {_text.shown(value)}, which returned {invalid[0]}")


def check_range(value: Any, name: str) -> None:
    """Raises a ValueError for a function of the step that leaves its range at some of them.

    It is called at a few concrete steps; a schedule that tends to 1 may reach 1 at the last of
    them.
    """
    for step in STEPS:
        with jax.ensure_compile_time_eval():
            found = value(jnp.asarray(step, jnp.int32))
        if not _concrete(found):
            return  # depends on traced values
        found = float(found)
        if not (0 <= found < 1 or (found == 1 and (name == "regrow" or step == STEPS[-1]))):
            interval = "[0, 1]" if name == "regrow" else "[0, 1)"
            raise ValueError(
                f"{name} must be a fraction in {interval} at every step, but the function gives "
                f"{found:g} at step {step}"
            )


def check_optimizer(value: Any, name: str, or_none: str = "") -> None:
    """Raises a ValueError for anything but an optax transformation."""
    if not hasattr(value, "update"):
        raise ValueError(
            f"{name} must be an optax transformation{or_none}, got {_text.shown(value)}"
        )


def check_others(leaves: Leaves, axis_name: Any, seed: Any) -> None:
    """Raises a ValueError for an argument of `gradual_prune` of another type."""
    _prunable.check_type(leaves.prunable, "prunable")
    _prunable.check_type(leaves.adjustable, "adjustable")
    if leaves.costs is not None:
        raise ValueError("prunable: costs apply to prune_one_shot only, got flj.Leaves(costs=...)")
    axis.check_name(axis_name)
    check_seed(seed)


def check_seed(seed: Any) -> None:
    """Raises a ValueError for a seed that is not a whole number in the range of a key's seed."""
    traced = is_array(seed) and not _concrete(seed)  # from optax.inject_hyperparams
    if not traced and not (numbers.is_whole(seed, 0) and int(seed) < 2**31):
        raise ValueError(f"seed must be a whole number in [0, 2³¹), got {_text.shown(seed)}")


def _check_reach(sparsity: Any, pattern: Pattern | None) -> None:
    """Raises a ValueError for a function of the step beyond what n:m prunes."""
    if pattern is None or pattern.kind != "n_m" or not callable(sparsity):
        return
    for step in (*STEPS, None):
        with jax.ensure_compile_time_eval():
            final = getattr(sparsity, "final", 0.0)
            found = final if step is None else sparsity(jnp.asarray(step, jnp.int32))
        if not _concrete(found):
            return
        if float(found) > pattern.highest + NEAR:
            raise ValueError(
                f"sparsity must be at most {pattern.highest:.6g} at every step for {pattern}, but "
                f"the function gives {float(found):g}"
            )


def end_of(sparsity: Any) -> Any:
    """Sparsity that a function of the step ends at; anything else as it is."""
    if not callable(sparsity):
        return sparsity
    with jax.ensure_compile_time_eval():
        final = getattr(sparsity, "final", None)
        final = sparsity(jnp.asarray(STEPS[-1], jnp.int32)) if final is None else final
    return round(float(final), 6) if _concrete(final) else sparsity


def check_sizes(groups: Groups) -> None:
    """Raises a ValueError if more weights share a threshold than can be counted."""
    sizes = [*groups.sizes, groups.weights if groups.scope in ("erk", "densities") else 0]
    if max(sizes) >= 2**31:
        raise ValueError(
            f"prunable: at most 2³¹ - 1 weights can share a threshold, got {max(sizes)}; use "
            'scope="layer", or a separate pruning for each part of the network'
        )


def _concrete(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer)


def is_array(x: Any) -> bool:
    """Whether it is an array of one real number, which may be traced."""
    kinds = jnp.floating, jnp.integer
    fits = isinstance(x, (jax.Array, np.ndarray)) and np.ndim(x) == 0
    return fits and any(jnp.issubdtype(x.dtype, kind) for kind in kinds)


def _no_number(x: Any) -> str | None:
    """Description of a value that a function returned; None if it is a number."""
    if is_number(x) or is_array(x):
        return None
    if isinstance(x, (jax.Array, np.ndarray, np.generic)):
        return f"an array of shape {x.shape} and dtype {x.dtype}"
    return repr(x)


def _is_whole(x: Any) -> bool:
    if isinstance(x, (jax.Array, np.ndarray)):
        whole = np.ndim(x) == 0 and np.issubdtype(x.dtype, np.integer)
        return whole and (not _concrete(x) or int(x) >= 1)
    return numbers.is_whole(x, 1)
