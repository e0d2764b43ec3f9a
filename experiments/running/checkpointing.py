"""Where a run is, on disk: by orbax, so that it goes on after it was killed at any moment.

A checkpoint is written under another name and renamed once it is whole: whoever is killed while
writing finds the one before.  For weights that are bit for bit those of a run that was never
killed, all that a step depends on has to be in the tree or follow from the number of the step: the
order of the data too.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

KEPT = 2  # the newest, and one more


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, for jobs that may end without notice.

    Orbax up to 0.11.36, which jax2onnx asks for, inquires after that with every checkpoint of
    several processes, and jax 0.10 raises an error unless its service for it was started.
    """

    def reached_preemption(self, step: int) -> bool:
        """Never."""
        del step
        return False


class Checkpoints:
    """The checkpoints of one run, in a folder of its own.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder)) as kept:
        ...     kept.save(7, {"weights": jnp.ones(2)})
        ...     kept.restore({"weights": jnp.zeros(2)})
        (7, {'weights': Array([1., 1.], dtype=float32)})
    """

    def __init__(self, folder: Path):
        """Opens the folder, which is made where it is missing."""
        # in the background it would save while the next step runs, on a core that the step needs
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._manager = _Manager(folder.resolve(), options=options)

    def __enter__(self) -> "Checkpoints":
        """For `with`, which closes the folder."""
        return self

    def __exit__(self, *_: Any) -> None:
        """Closes the folder."""
        self._manager.close()

    def save(self, step: int, tree: Any) -> None:
        """Writes a pytree of arrays, whole or not at all.

        Args:
            step: number of steps made.
            tree: everything that the next step depends on; arrays, numbers and random keys.
        """
        self._manager.save(step, args=ocp.args.StandardSave(_storable(tree)))

    def restore(self, template: Any) -> tuple[int, Any] | None:
        """Reads the newest checkpoint.

        Args:
            template: a tree of the same structure, shapes and dtypes, such as a run starts with.

        Returns:
            The number of steps and the tree, or None where there is no checkpoint.

        Raises:
            ValueError: the checkpoint has another structure.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, _storable(template))
        found = self._manager.restore(step, args=ocp.args.StandardRestore(wanted))
        leaves, structure = jax.tree.flatten(template)
        names = _names(template)
        return step, structure.unflatten(
            _like(leaf, found.get(name)) for name, leaf in zip(names, leaves, strict=True)
        )


def _names(tree: Any) -> list[str]:
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path) for path, _ in paths]


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _storable(tree: Any) -> dict[str, Any]:
    """Arrays by key path; orbax knows neither empty arrays nor empty named tuples."""
    named = zip(_names(tree), jax.tree.leaves(tree), strict=True)
    raw = {name: jax.random.key_data(x) if _is_key(x) else x for name, x in named}
    return {name: x for name, x in raw.items() if np.size(x)}


def _like(leaf: Any, found: Any) -> Any:
    if found is None:  # it is empty
        return leaf
    if _is_key(leaf):
        return jax.random.wrap_key_data(found, impl=jax.random.key_impl(leaf))
    return found
