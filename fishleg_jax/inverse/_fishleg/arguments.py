"""Checks of FishLeg's arguments, and the defaults that depend on one another."""

from fishleg_jax import _labels, _text, fisher
from fishleg_jax._checks import numbers
from fishleg_jax.model import Model, check_model

PROBES = ("normal", "sign", "gradient")
LARGE_PART = 32  # examples in a part of which the products of dense networks are fast
START, LEARNING = 64, 144  # updates in closed form before learning, and of learning


def check(model: Model, damping: float | None, kind: str, probe: str, cap: int | None) -> None:
    """Raises a ValueError for an invalid argument, or a likelihood without what `kind` needs."""
    check_model(model)
    if damping is not None:
        numbers.check_positive(damping, "damping", " or None")
    for name, value, allowed in (("kind", kind, fisher.KINDS), ("probe", probe, PROBES)):
        if value not in allowed:
            raise ValueError(
                f"{name} must be one of {', '.join(allowed)}, got {_text.shown(value)}"
            )
    if cap is not None:
        numbers.check_count(cap, "cap", or_none=" or None")
    # the start samples labels, for the exact Fisher as well
    needs = {"exact": ("sample", "fisher"), "sampled": ("sample",)}.get(kind, ())
    _labels.require(model.likelihood, needs, f"kind={kind!r}")


def check_counts(**values: tuple[int | None, int]) -> None:
    """Raises a ValueError for an invalid count; each is given as `(value, minimum)`."""
    for name, (value, least) in values.items():
        if value is not None:
            numbers.check_count(value, name, least)


def lengths(
    learn: bool, start: int | None, updates: int | None, examples_per_sample: int | None
) -> tuple[int, int | None, int]:
    """Lengths of the phases of a fit, and the least number of examples behind a Fisher sample.

    Args:
        learn: Whether λ is learned after the start.
        start: Number of updates until the estimate is ready, as given.
        updates: Number of updates of a one-shot fit, as given.
        examples_per_sample: Minimum number of examples behind a Fisher sample, as given.

    Returns:
        `start`, `updates` and `examples_per_sample` with their defaults filled in; `updates` stays
        None for one pass over the data.
    """
    if learn:
        start = START if start is None else start
        updates = start + LEARNING if updates is None else updates
    else:
        updates = start if updates is None else updates
        start = 1 if start is None else start
    return start, updates, examples_per_sample or (LARGE_PART if learn else 1)
