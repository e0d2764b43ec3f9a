"""Estimates of `experiments.imagenet`, all fitted to the same photos."""

import argparse
import math
from functools import partial
from typing import Any, NamedTuple

import jax

import fishleg_jax as flj
from experiments.estimates.methods import variant
from experiments.running import processes

NAMES = ("fishleg", "woodfisher", "mfac", "kfac", "magnitude")
MFAC_BLOCK = 128
# without the default's third axis, and with blocks as large along all axes and in all leaves
SPECTRAL = partial(flj.inverse.factors.spectral, sandwich=False)


class Fit(NamedTuple):
    """An estimate, and the size of the batches that it is fitted to.

    Attributes:
        estimator: the estimate of the inverse Fisher.
        batch: number of photos in an update.
        settings: the estimate's settings without its damping, for results.
        averaged: number of photos that a gradient is the mean of.  The Fisher of such gradients is
            smaller by this factor, and so must the damping be.
    """

    estimator: flj.InverseFisher
    batch: int
    settings: dict[str, Any]
    averaged: int = 1


def _settings(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """A method's settings without its damping, in the order in which results have them."""
    if name == "fishleg":
        return {"updates": args.updates, "cap": args.cap, "samples": args.samples}
    if name == "kfac":
        return {"examples_per_gradient": args.kfac_mean}
    means = {"examples_per_gradient": args.calibration // args.gradients}
    if name == "woodfisher":
        return {"gradients": args.gradients, "block_size": args.block_size, **means}
    if name == "mfac":
        return {"window": args.gradients, "block_size": MFAC_BLOCK, **means}
    return {}


def make(name: str, model: flj.Model, args: argparse.Namespace, damping: float) -> Fit:
    """A method's estimate with the settings of the arguments.

    Args:
        name: one of `NAMES`.
        model: the network.
        args: the arguments of `experiments.imagenet`.
        damping: γ, in units of the Fisher of single photos.

    Returns:
        The estimate, and how it is fitted.

    Raises:
        ValueError: a setting out of its range.
    """
    settings = _settings(name, args)
    averaged = settings.get("examples_per_gradient", 1)
    given = dict(settings)
    if name != "magnitude":
        given |= {"damping": damping / averaged, "examples_per_chunk": args.examples_per_chunk}
    if name == "fishleg":
        given |= {"factors": SPECTRAL, "examples_per_sample": args.batch // args.samples}
        settings |= {"factors": "spectral", "batch": args.batch}
    batch = averaged if "examples_per_gradient" in settings else args.batch
    if processes.several():
        # as few gradients as possible: labels are drawn update by update, as in one process
        # whose devices divide its batches
        batch = math.lcm(batch, jax.device_count())
    return Fit(variant(name, **given)(model), batch, settings, averaged)
