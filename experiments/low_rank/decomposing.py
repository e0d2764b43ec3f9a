"""Decomposes a network, trains the factors on, and evaluates both."""

import time
from typing import Any, NamedTuple

import jax

import fishleg_jax as flj
from experiments.data import datasets
from experiments.models import recalibration, training
from experiments.models.cases import curvature_batches
from experiments.models.specs import Spec
from experiments.running import results

SLOWER = 0.1  # of the model's own learning rate
_MOMENTS: dict[tuple, Any] = {}  # of the last network: methods and shares have them in common
RANKS = {
    "global": "one threshold",
    "equal": "equal shares",
    "energy": "equal energy",
    "search": "continuous search",
}


class Method(NamedTuple):
    """A metric of the decomposition, and a rule of its ranks."""

    metric: str
    ranks: str

    @property
    def title(self) -> str:
        """Its name in tables."""
        metric = "Fisher metric" if self.metric == "fisher" else "plain SVD"
        return f"{metric}, {RANKS[self.ranks]}"


METHODS = {
    "fisher_global": Method("fisher", "global"),
    "fisher_equal": Method("fisher", "equal"),
    "plain_global": Method("identity", "global"),
    "plain_equal": Method("identity", "equal"),
    "plain_energy": Method("identity", "energy"),
    "plain_search": Method("identity", "search"),
}


class Factored:
    """A flax module whose kernels are factors, as far as training calls it."""

    def __init__(self, spec: Spec, like: Any):
        """Takes the network and its parameters before the decomposition."""

        def call(params, constants, *arguments, **options):
            variables = {"params": params, "batch_stats": constants}
            return spec.module.apply(variables, *arguments, **options)

        self._call, self._like = call, like

    def apply(self, variables: Any, *arguments: Any, **options: Any) -> Any:
        """Applies the network, see `flax.linen.Module.apply`."""

        def call(params, constants, *arguments):
            return self._call(params, constants, *arguments, **options)

        run = flj.low_rank.apply(call, self._like)
        return run(variables["params"], variables["batch_stats"], *arguments)


def factored(spec: Spec, small: flj.low_rank.Decomposition, like: Any) -> Spec:
    """The network with factors for kernels, to be trained and evaluated like any other.

    Args:
        spec: the network.
        small: its decomposition.
        like: its parameters before.
    """
    return spec._replace(module=Factored(spec, like), model=small.model)


def decomposed(
    spec: Spec,
    dense: results.Dense,
    split: datasets.Data,
    *,
    method: str,
    share: float,
    convolutions: str,
    examples: int,
    per_gradient: int,
    chunk: int | None,
    epochs: int,
    seed: int,
) -> dict[str, Any]:
    """Decomposes a network to a share of its weights, and trains it on.

    Args:
        spec: the network.
        dense: its trained weights.
        split: the data set.
        method: a name in `METHODS`.
        share: of the weights of the kernels that are decomposed.
        convolutions: form of convolutions.
        examples: training examples for the Fisher.
        per_gradient: examples averaged into one of its gradients.
        chunk: examples whose gradients are held at a time; None for a whole batch.
        epochs: of training on; 0 for none.
        seed: for the examples and their order.

    Returns:
        Accuracy and loss before and after training on, weights, operations, ranks and seconds.
        Batch-norm statistics are recomputed before the first evaluation.
    """
    begin = time.perf_counter()
    own = METHODS[method]
    batches = curvature_batches(
        split.train, dense.constants, examples=examples, batch_size=spec.batch, seed=seed
    )
    key = spec.name, results.fingerprint(dense.params), convolutions, examples, per_gradient, seed
    small = flj.low_rank.decompose(
        spec.model,
        dense.params,
        batches,
        share,
        ranks=own.ranks,
        metric=own.metric,
        convolutions=convolutions,
        examples_per_gradient=per_gradient,
        examples_per_chunk=chunk,
        decomposable=spec.prunable,
        key=jax.random.key(seed),
        moments=_MOMENTS.get(key),
    )
    if small.moments is not None:
        _MOMENTS.clear()
        _MOMENTS[key] = small.moments
    seconds = time.perf_counter() - begin
    network, constants = factored(spec, small, dense.params), dense.constants
    if constants:
        constants = recalibration.recalibrated(network, small.params, constants, split.train, seed)
    accuracy, loss = results.measure(network, small.params, split.test, constants)
    found = {
        "accuracy": accuracy,
        "loss": loss,
        "predicted": small.report.loss,
        "weights": small.report.weights,
        "flops": small.report.flops,
        "ranks": {row.name: row.ranks for row in small.report.rows if row.ranks},
        "seconds": seconds,
    }
    if epochs:
        params, constants = training.train(
            network,
            split.train,
            epochs=epochs,
            seed=seed,
            start=(small.params, constants),
            learning_rate=SLOWER * spec.learning_rate,
        )
        trained = results.measure(network, params, split.test, constants)
        found |= dict(zip(("trained_accuracy", "trained_loss"), trained, strict=True))
    return found
