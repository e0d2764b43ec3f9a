"""Times of smaller networks, measured in turn with that of the whole one."""

import time
from collections.abc import Callable
from typing import Any

import jax

from fishleg_jax.compaction.analysis import Network

ROUNDS = 15  # timed measurements; the shortest counts: other programs only ever add time
SHORTEST = 1e-3  # seconds of one measurement; shorter calls are repeated


class Clock:
    """Times networks beside the whole one, since a machine is faster now than a minute later."""

    def __init__(self, whole: Network, inputs: Any):
        """Compiles the whole network, and times it.

        Args:
            whole: The network at full size.
            inputs: Inputs with a leading axis of examples.
        """
        self.inputs = inputs
        self._whole = _compiled(whole, inputs)
        self._calls = max(1, round(SHORTEST / min(_seconds(self._whole, 1) for _ in range(3))))
        self.whole = min(self._timed(self._whole) for _ in range(ROUNDS))

    def share(self, network: Network) -> float:
        """Time of a call as a share of the whole network's, the shortest of fifteen of each."""
        run = _compiled(network, self.inputs)
        rounds = [(self._timed(run), self._timed(self._whole)) for _ in range(ROUNDS)]
        own, whole = (min(times) for times in zip(*rounds, strict=True))
        return own / whole

    def _timed(self, run: Callable[[], Any]) -> float:
        return _seconds(run, self._calls)


def _compiled(network: Network, inputs: Any) -> Callable[[], Any]:
    """Function that calls the compiled network and waits for its outputs."""
    constants = () if network.constants is None else (network.constants,)
    arguments = (network.params, inputs, *constants)
    function = jax.jit(network.function)
    run = lambda: jax.block_until_ready(function(*arguments))
    run()
    return run


def _seconds(run: Callable[[], Any], calls: int) -> float:
    """Mean time of some calls."""
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls
