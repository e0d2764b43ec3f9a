"""The methods of `experiments.imagenet`: their estimates, all from the same photos."""

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import fishleg_jax as flj
from experiments.running import processes

MFAC_BLOCK = 128
# without the default's third axis, and with blocks as large along all axes and in all leaves
SPECTRAL = partial(flj.inverse.factors.spectral, sandwich=False)


class Method(NamedTuple):
    """How a method makes its estimate of the inverse Fisher.

    Attributes:
        estimator: the estimate.
        batch: how many photos an update sees.
        settings: what it was made with, for results; the damping is not among it.
        averaged: how many photos a gradient is the mean of: its Fisher is so many times smaller,
            and so must the damping be.
        refits: whether a state can't be given another damping.
    """

    estimator: flj.InverseFisher
    batch: int
    settings: dict[str, Any]
    averaged: int = 1
    refits: bool = False


def _magnitude(model: flj.Model, args: argparse.Namespace, damping: float) -> Method:
    del model, damping
    return Method(flj.inverse.identity(), args.batch, {})


def _fishleg(model: flj.Model, args: argparse.Namespace, damping: float) -> Method:
    settings = {"updates": args.updates, "cap": args.cap, "samples": args.samples}
    estimator = flj.inverse.fishleg(
        model, damping, factors=SPECTRAL, examples_per_sample=args.batch // args.samples,
        examples_per_chunk=args.examples_per_chunk, **settings,
    )  # fmt: skip
    return Method(estimator, args.batch, settings | {"factors": "spectral", "batch": args.batch})


def _kfac(model: flj.Model, args: argparse.Namespace, damping: float) -> Method:
    each = args.kfac_mean
    estimator = flj.inverse.kfac(
        model, damping / each, examples_per_gradient=each,
        examples_per_chunk=args.examples_per_chunk,
    )  # fmt: skip
    return Method(estimator, each, {"examples_per_gradient": each}, averaged=each)


def _woodfisher(model: flj.Model, args: argparse.Namespace, damping: float) -> Method:
    each = args.calibration // args.gradients
    settings = {
        "gradients": args.gradients,
        "block_size": args.block_size,
        "examples_per_gradient": each,
    }
    estimator = flj.inverse.woodfisher(
        model, damping / each, examples_per_chunk=args.examples_per_chunk, **settings
    )
    return Method(estimator, each, settings, averaged=each, refits=True)


def _mfac(model: flj.Model, args: argparse.Namespace, damping: float) -> Method:
    each = args.calibration // args.gradients
    settings = {
        "window": args.gradients,
        "block_size": MFAC_BLOCK,
        "examples_per_gradient": each,
    }
    estimator = flj.inverse.mfac(
        model, damping / each, examples_per_chunk=args.examples_per_chunk, **settings
    )
    return Method(estimator, each, settings, averaged=each)


METHODS: dict[str, Callable[..., Method]] = {
    "fishleg": _fishleg,
    "woodfisher": _woodfisher,
    "mfac": _mfac,
    "kfac": _kfac,
    "magnitude": _magnitude,
}


def make(name: str, model: flj.Model, args: argparse.Namespace, damping: float) -> Method:
    """A method with the settings of the arguments.

    Args:
        name: a name in `METHODS`.
        model: the network.
        args: the arguments of `experiments.imagenet`.
        damping: γ, in units of the Fisher of single photos.

    Raises:
        ValueError: a setting out of its range.
    """
    method = METHODS[name](model, args, damping)
    if processes.several():
        # as few gradients as may be: labels are drawn update by update, and so are those of one
        # process where devices divide its batches
        method = method._replace(batch=math.lcm(method.batch, jax.device_count()))
    return method


def at_damping(
    method: Method, damping: float
) -> tuple[flj.InverseFisher, Callable[[Any], Any] | None]:
    """What makes a method's state at another damping.

    Args:
        method: the method.
        damping: γ, in units of the Fisher of single photos.

    Returns:
        The estimator to fit anew, and None; or where a state can be given another damping, the
        estimator as it is and a function that does that.
    """
    estimator, own = method.estimator, damping / method.averaged
    if not method.refits:
        return estimator, lambda state: state._replace(
            damping=jnp.asarray(own, state.damping.dtype)
        )

    def init(params):
        # it starts at square roots of `I / γ`; so the compiled update serves all dampings
        start = estimator.init(params)
        factor = jnp.sqrt(start.damping / own)
        blocks = jax.tree.map(lambda root: root * factor, start.blocks)
        return start._replace(damping=jnp.full_like(start.damping, own), blocks=blocks)

    return estimator._replace(init=init), None
