"""Tries a low-rank coupling between layers on top of FishLeg's estimate of the inverse Fisher.

    python -m experiments.coupling

FishLeg's `Q_b` treats every leaf by itself.  Here it gets a correction over all leaves,
`Q = Q_b − Y (I − M⁻¹) Yᵀ` with `Y = Q_b^{1/2} V`: V are the leading directions of further Fisher
samples in the whitened coordinates `Q_b^{1/2} g`, where the damped Fisher would be the identity if
`Q_b` were exact, and M is its diagonal in these directions, measured on half of the samples that V
is not made of.  Only `Q_b` times samples is needed.  Each estimate is judged by

- its auxiliary loss `½ zᵀF_γz − uᵀz`, `z = Qu`, on other images and the same normal probes u;
- iterations of the group update's solve to a relative residual of 0.01, at a fifth of the Fisher's
  mean diagonal, where `flj.compensation.group` begins;
- the loss on other images after a group update of six iterations, above that of the dense network.

Prints a table for every network and seed, and writes `coupling.json` into `--out`.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

import fishleg_jax as flj
from experiments.arena.networks import NETWORKS, load, stacked
from experiments.models.cases import curvature_batches
from experiments.preconditioning.solving import make_system, solve
from experiments.report import tables
from experiments.running import arguments, files
from experiments.running.arguments import at_least, one_of, seed, sparsity

# the library's own samples, so that the correction sees what the estimate sees
from fishleg_jax.inverse._fishleg.samples import rows
from fishleg_jax.pruning.compensation._group_system import mean_diagonal, random_signs

SHARE = 0.2  # damping of the solve over the Fisher's mean diagonal
BATCH = 64
PROBES = 8
SHORT = 6  # iterations of the group update whose loss is measured
COLUMNS = {
    "rank": "{rank}",
    "leading": "{leading:.1f}",
    "auxiliary loss": "{auxiliary_loss:.4g}",
    "difference": "{difference:.2g}",
    "its error": "{error:.2g}",
    "iterations": "{iterations}",
    "loss after 6": "{loss:.4f}",
}


def _tree_of(flat: jax.Array, like: Any) -> Any:
    return ravel_pytree(like)[1](flat)


def _flat(tree: Any) -> jax.Array:
    return ravel_pytree(tree)[0]


def samples(model: flj.Model, params: Any, batches: Sequence, masks: Any, key: Any) -> jax.Array:
    """Fisher samples of single examples, cut to the kept weights, a row each."""

    @jax.jit
    def of_batch(params: Any, batch: tuple, key: jax.Array) -> jax.Array:
        found = rows(model, params, batch, key, "exact", 1, None, None)
        return jax.vmap(_flat)(jax.tree.map(lambda x, m: jnp.where(m, x, 0), found, masks))

    found = [of_batch(params, b, jax.random.fold_in(key, i)) for i, b in enumerate(batches)]
    return jnp.concatenate(found)


class Coupled:
    """Low-rank correction of one estimate, cut to its leading directions on request.

    Attributes:
        images: `Y`, a row for each direction, the leading one first.
        values: the whitened Fisher along each, M.
    """

    def __init__(self, multiply: Any, damping: float, grown: jax.Array, judged: jax.Array):
        """Finds directions in some samples, and the Fisher along them in others.

        Args:
            multiply: product of `Q_b` with a flat vector.
            damping: γ of `Q_b`.
            grown: samples for the directions, a row each.
            judged: samples for M, a row each.
        """
        images = jax.lax.map(multiply, grown, batch_size=16)
        values, vectors = jnp.linalg.eigh(images @ grown.T / len(grown))
        values, vectors = values[::-1], vectors[:, ::-1]
        some = values > 1e-6 * values[0]
        scale = jnp.where(some, 1 / jnp.sqrt(jnp.where(some, values, 1) * len(grown)), 0)
        self.images = (vectors * scale).T @ images
        # vᵀ Q^{1/2}(F + γ)Q^{1/2} v for v = Q^{1/2} (…): yᵀ F y is over judged samples g
        along = jnp.mean((judged @ self.images.T) ** 2, 0)
        self.values = along + damping * jnp.sum(self.images**2, 1)

    def leading(self, rank: int) -> tuple[jax.Array, jax.Array]:
        """Leading directions, and the share of each that is taken from Q."""
        m = self.values[:rank]
        return self.images[:rank], jnp.where(m > 1, 1 - 1 / m, 0)  # only what stands out


def measure(name: str, args: argparse.Namespace, number: int) -> list[dict[str, Any]]:
    """Rows of one network and one seed."""
    network = load(name, train_in=args.networks, test_examples=0)
    model, params, constants = network.spec.model, network.params, network.constants
    batches = curvature_batches(
        network.split.train,
        constants,
        examples=3 * args.examples,
        batch_size=BATCH,
        seed=number,
        fill=False,
    )
    third = len(batches) // 3
    own, more, other = batches[:third], batches[third : 2 * third], batches[2 * third :]
    curvature, elsewhere = flj.curvature(model, own), flj.curvature(model, other)
    key = jax.random.key(number)

    # masks by magnitude, so that no estimate chooses them
    masks = flj.make_masks(jax.tree.map(jnp.square, params), args.sparsity)
    signs = random_signs(params, masks)
    damping = SHARE * float(mean_diagonal(signs, curvature.product(params, signs), masks))
    estimator = flj.inverse.fishleg(model, damping, stacked=stacked(network.spec))
    kept = jax.tree.map(lambda p, m: jnp.where(m, p, 0), params, masks)
    state = flj.fit(estimator, kept, own, key=key, masks=masks)

    def multiply(state: Any, vector: jax.Array) -> jax.Array:
        return _flat(estimator.multiply(state, _tree_of(vector, params), masks))

    given = samples(model, kept, [*own, *more], masks, key)
    half = len(given) // 2
    coupled = Coupled(partial(jax.jit(multiply), state), damping, given[:half], given[half:])

    def product(state: Any, tangent: Any, mask: Any = None) -> Any:
        del mask
        flat = _flat(jax.tree.map(lambda x, m: jnp.where(m, x, 0), tangent, masks))
        own_state, (y, share) = state
        return _tree_of(multiply(own_state, flat) - (share * (y @ flat)) @ y, params)

    case = flj.inverse.identity()._replace(multiply=product)
    compiled = jax.jit(product)

    def auxiliary(whole: Any) -> jax.Array:
        """Auxiliary losses of the same probes, on the other images."""
        losses = []
        for i in range(PROBES):
            u = random_normal(params, masks, jax.random.fold_in(key, 1000 + i))
            z = compiled(whole, u)
            image = elsewhere.product(kept, z)
            losses.append(float((_dot(z, image) + damping * _dot(z, z)) / 2 - _dot(u, z)))
        return jnp.array(losses)

    system = make_system(curvature, params, masks, damping)

    def solved(estimator: flj.InverseFisher, state: Any) -> dict[str, Any]:
        """Iterations of a solve, and the loss after a short one."""
        _, record = solve(system, estimator, state, iterations=args.iterations, tolerance=1e-2)
        x, _ = solve(system, estimator, state, iterations=SHORT, tolerance=0.0)
        done = len(record.residual) - 1
        return {
            "iterations": done if record.residual[-1] <= 1e-2 else f"> {done}",
            "loss": float(elsewhere.loss(jax.tree.map(jnp.add, kept, x)) - elsewhere.loss(params)),
        }

    found, reference = [], None
    for rank in (0, *args.rank):
        whole = state, coupled.leading(rank)
        losses = auxiliary(whole)
        reference = losses if reference is None else reference
        difference = losses - reference
        measured = {
            "leading": float(coupled.values[min(rank, half - 1)]),
            "auxiliary_loss": float(losses.mean()),
            "difference": float(difference.mean()),
            "error": float(difference.std(ddof=1) / PROBES**0.5),
        }
        found.append({"rank": rank} | measured | solved(case, whole))
    diagonal = flj.inverse.diagonal(model, damping)  # beside them
    fitted = flj.fit(diagonal, kept, own, key=key, masks=masks)
    unknown = dict.fromkeys(measured, float("nan"))
    found.append({"rank": "diagonal"} | unknown | solved(diagonal, fitted))
    return [{"network": name, "seed": number} | row for row in found]


def random_normal(params: Any, masks: Any, key: jax.Array) -> Any:
    """Standard normal numbers on the kept weights."""
    flat = jax.random.normal(key, _flat(params).shape)
    return jax.tree.map(lambda x, m: jnp.where(m, x, 0), _tree_of(flat, params), masks)


def _dot(x: Any, y: Any) -> jax.Array:
    return jnp.vdot(_flat(x), _flat(y))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.coupling", description="Try a coupling between layers."
    )
    option = partial(arguments.option, parser)
    names = "autoencoder", "transformer"
    option("--network", one_of(tuple(NETWORKS)), list(names), several=True)
    option("--rank", at_least(1), [16, 64, 256], "of the coupling", several=True)
    option("--examples", at_least(BATCH), 512, "training examples of each of three parts")
    option("--iterations", at_least(1), 200, "of a solve at most")
    option("--sparsity", sparsity, 0.8)
    option("--seed", seed, [0], several=True)
    option("--networks", Path, Path("results/arena/networks"), "folder of trained networks")
    option("--out", Path, Path("results/coupling"))
    args = parser.parse_args(argv)
    found = []
    for name in args.network:
        for number in args.seed:
            rows_of = measure(name, args, number)
            found += rows_of
            print(f"\n{name}, seed {number}")
            print(tables.of_rows(rows_of, COLUMNS))
            files.write_json(args.out / "coupling.json", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
