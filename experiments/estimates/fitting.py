"""Fitting an inverse Fisher in sight of a user."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from tqdm import tqdm

import fishleg_jax as flj

OnUpdate = Callable[[int, int, Any], None]


@contextlib.contextmanager
def progress(name: str, watch: OnUpdate = lambda done, total, state: None) -> Iterator[OnUpdate]:
    """A progress bar for one fit, or for one after the other.

    Args:
        name: the text of the bar.
        watch: called after every update, with the arguments of an `on_update`.

    Yields:
        An `on_update` for `fishleg_jax.fit`.
    """
    with tqdm(desc=f"fitting {name}", disable=None) as bar:

        def on_update(done, total, state):
            bar.total = total
            bar.update(done - bar.n)
            watch(done, total, state)

        yield on_update


def fit(
    estimator: flj.inverse.InverseFisher,
    params: Any,
    batches: Sequence[tuple],
    *,
    key: jax.Array,
    name: str,
    watch: Callable[[Any], None] = lambda state: None,
    masks: Any | None = None,
    state: Any | None = None,
) -> Any:
    """Fits an estimator behind a progress bar and waits for it.

    Args:
        estimator: an inverse Fisher.
        params: the parameters.
        batches: the data.
        key: a random key.
        name: the text of the bar.
        watch: called with the state after every update.
        masks: which weights survive; None for all.
        state: one to carry on from, see `fishleg_jax.fit`; None for a fit from scratch.

    Returns:
        The fitted state.
    """
    with progress(name, lambda done, total, state: watch(state)) as on_update:
        how = {"masks": masks, "on_update": on_update, "state": state}
        state = flj.fit(estimator, params, batches, key=key, **how)
    return jax.block_until_ready(state)


class FitClock:
    """Adds up the seconds of the fits inside of `prune_one_shot`, from when it is made.

    A fit ends with its last update, and begins where the stage before ends, with its compensation.

    Attributes:
        seconds: of all fits until now.
    """

    def __init__(self):
        """Starts the clock."""
        self.seconds = 0.0
        self._begin = time.perf_counter()

    def restart(self) -> None:
        """Starts the clock for the next fit."""
        self._begin = time.perf_counter()

    def on_update(self, done: int, total: int, state: Any) -> None:
        """Looks on while a fit goes on, as `prune_one_shot` wants it."""
        if done == total:
            jax.block_until_ready(state)
            self.seconds += time.perf_counter() - self._begin

    def after(self, compensation: Callable) -> Callable:
        """A compensation with whose end the next fit begins."""

        def compensate(*args):
            out = jax.block_until_ready(compensation(*args))
            self.restart()
            return out

        # what it says of itself: a check of its arguments, whether it uses the gradient
        return functools.update_wrapper(compensate, compensation)
