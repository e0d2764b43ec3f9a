"""Shows that FishLeg converges with the library's defaults, model by model.

    python -m experiments.convergence
    python -m experiments.convergence --model mlpnet,resnet20

The auxiliary loss `½ zᵀF_γz − uᵀz` is measured three times on the same probes u and the same
batch, at one damping: for Q = I/γ, for Q after the start from data, and for Q after learning.  The
lower the better; the lowest is `−½ tr F_γ⁻¹`, which nobody knows on models of this size.

Networks without a checkpoint in the shared folder are trained a short while first, and kept in
`--out`.  Prints a table and writes `convergence.json` and `convergence.png`.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fishleg_jax as flj
from experiments.estimates.fitting import fit
from experiments.models import cases
from experiments.models.specs import MODELS
from experiments.report import plots, tables
from experiments.running import arguments, files, network_arguments

PROBES = 8
START = 64  # updates in closed form
COLUMNS = {
    "model": "{model}",
    "weights": "{weights:,}",
    "damping": "{damping:.2g}",
    "loss, I/γ": "{loss_identity:.4g}",
    "loss, start": "{loss_start:.4g}",
    "loss, learned": "{loss_learned:.4g}",
    "residual, I/γ": "{residual_identity:.3g}",
    "residual, start": "{residual_start:.3g}",
    "residual, learned": "{residual_learned:.3g}",
    "back-offs": "{back_offs}",
    "s": "{seconds:.0f}",
}


def sampler(model: flj.Model, estimator: flj.InverseFisher) -> Callable:
    """Makes the function that measures an estimate on one probe.

    Args:
        model: the model.
        estimator: an inverse Fisher whose state has a damping.

    Returns:
        A compiled function `(state, params, batch, key, masks=None) -> (loss, residual)`: the
        auxiliary loss and the relative residual, of surviving weights where there are masks.
    """

    @jax.jit
    def sample(state, params, batch, key, masks=None):
        def masked(tree):
            return tree if masks is None else flj.apply_masks(tree, masks)

        leaves, tree = jax.tree.flatten(params)
        flat = jax.random.normal(key, (sum(x.size for x in leaves),))
        ends = np.cumsum([x.size for x in leaves])[:-1]
        parts = jnp.split(flat, ends)
        u = tree.unflatten([p.reshape(x.shape) for p, x in zip(parts, leaves, strict=True)])
        u = masked(u)
        z = estimator.multiply(state, u, masks)
        fz = masked(flj.fisher_vector_product(model, params, batch, z))
        fz = jax.tree.map(lambda f, x: f + state.damping * x, fz, z)
        residual = optax.tree.norm(optax.tree.sub(fz, u)) / optax.tree.norm(u)
        return 0.5 * optax.tree.vdot(z, fz) - optax.tree.vdot(u, z), residual

    return sample


def measure(case: cases.Case, estimator: flj.InverseFisher, states: Sequence) -> list[dict]:
    """The auxiliary loss and the relative residual of several states on the same probes.

    Args:
        case: the network and its data; the last batch is used.
        estimator: the inverse Fisher.
        states: its states, of one damping.

    Returns:
        A dictionary with the means over the probes for each state.
    """
    params, batch = case.params, case.batches[-1]
    sample = sampler(case.spec.model, estimator)
    rows = []
    for state in states:
        keys = jax.random.split(jax.random.key(12345), PROBES)
        samples = np.array([sample(state, params, batch, key) for key in keys])
        rows.append(dict(zip(("loss", "residual"), samples.mean(axis=0).tolist(), strict=True)))
    return rows


def converge(case: cases.Case, seed: int) -> tuple[dict, list[float]]:
    """Fits the inverse Fisher of a network with the defaults.

    Args:
        case: the network and its data.
        seed: for the fit.

    Returns:
        An object for `convergence.json`, and the smoothed auxiliary loss after every update that
        learned.  `seconds` includes the compilation.
    """
    estimator = flj.inverse.fishleg(case.spec.model, learn=True, start=START)
    losses, started = [], []

    def watch(state):
        losses.append(jnp.copy(state.auxiliary_loss))  # the next update takes the state's memory
        if len(losses) == START:
            started.append(jax.tree.map(jnp.copy, state))

    begin = time.perf_counter()
    key, name = jax.random.key(seed), case.spec.name
    state = fit(estimator, case.params, case.batches, key=key, name=name, watch=watch)
    seconds = time.perf_counter() - begin
    nothing = flj.inverse.with_damping(estimator.init(case.params), state.damping)
    identity, start, learned = measure(case, estimator, [nothing, *started, state])
    row = {
        "model": name,
        "weights": sum(leaf.size for leaf in jax.tree.leaves(case.params)),
        "updates": len(losses),
        "batch_size": len(case.batches[0][0]),
        "damping": float(state.damping),
        "loss_identity": identity["loss"],
        "loss_start": start["loss"],
        "loss_learned": learned["loss"],
        "residual_identity": identity["residual"],
        "residual_start": start["residual"],
        "residual_learned": learned["residual"],
        "back_offs": int(state.guard.back_offs),
        "skipped": int(state.guard.skipped),
        "seconds": seconds,
        "seed": seed,
    }
    # while the start is gathered from data there is no smoothed loss yet
    return row, [value for value in map(float, losses) if np.isfinite(value)]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment.

    Args:
        argv: the arguments; None for those of the command line.

    Returns:
        The exit code.
    """
    parser = network_arguments.make_parser(
        "experiments.convergence", "Fit FishLeg with its defaults.", MODELS
    )
    arguments.option(parser, "--seed", arguments.seed, 0)
    arguments.option(parser, "--out", Path, Path("results/convergence"))
    args = network_arguments.parse(parser, argv)
    rows, losses = [], {}
    for name in args.model:
        case = cases.load(name, train_in=args.out, data_dir=args.data_dir, seed=args.seed)
        row, losses[name] = converge(case, args.seed)
        rows.append(row)
    print(tables.of_rows(rows, COLUMNS))
    print(files.write_json(args.out / "convergence.json", rows))
    print(plots.convergence(args.out / "convergence.png", losses))
    return 0


if __name__ == "__main__":
    sys.exit(main())
