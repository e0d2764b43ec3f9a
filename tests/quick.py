"""How tests compile: their models are so small that nearly all the time is the compiler's.

`python -m tests.quick -m MODULE ...` or `-c CODE ...` runs a program that compiles in the same way.
"""

import collections
import functools
import gc
import hashlib
import inspect
import itertools
import math
import runpy
import sys
from collections.abc import Callable

import jax
import numpy as np

# XLA's newer generator of CPU kernels takes twice as long as the one before it, and programs that
# are cut into parts for several threads take longer than whole ones.  (With all optimisations it
# is the other way around for deep networks: 12 s and 60 s for a training step of ResNet-20.)
# Only where they are known: XLA ends a program over an unknown flag.
FLAGS = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    if jax.__version_info__[:2] == (0, 10)
    else ""
)

PROGRAMS = 500  # that share a context, which keeps what it has seen
DRAWS = 2048  # random numbers that are drawn for any smaller array
KEPT = 1000  # compiled programs that others of the same text take

_compiled: collections.OrderedDict[str, object] = collections.OrderedDict()


def prepare() -> None:
    """Sets all that this module knows of but `FLAGS`, which XLA reads when it starts."""
    jax.config.update("jax_traceback_in_locations_limit", 0)  # of programs' text: nobody reads it
    # half the time to compile, also while modules are imported; small models run for so short that
    # it is most of the time
    jax.config.update("jax_disable_most_optimizations", True)
    share_contexts()
    share_programs()
    share_draws()
    # what JAX makes lives as long as its caches, and Python's collector goes through all of it
    # again and again
    gc.set_threshold(200_000, 20, 20)


def share_contexts() -> None:
    """Lets programs share the contexts in which JAX writes them down.

    To load its dialects into a context takes a fifth of the time that a program of one operation
    takes altogether, and tests compile thousands of these.  Only where it is known.
    """
    if jax.__version_info__[:2] != (0, 10):
        return
    from jax._src.interpreters import mlir

    make, made = mlir.make_ir_context, itertools.count()
    context = functools.lru_cache(maxsize=1)(lambda number: make())
    mlir.make_ir_context = lambda: context(next(made) // PROGRAMS)


def share_programs() -> None:
    """Lets functions with the same program share what was compiled, one in ten of them.

    JAX compiles for every function object, also for those that each test makes anew.  Only where
    its compiler is known.
    """
    if jax.__version_info__[:2] != (0, 10):
        return
    from jax._src import compiler

    compile_anew = compiler.compile_or_get_cached

    def compile_once(backend, computation, devices, options, callbacks, *rest, **more):
        if callbacks:
            return compile_anew(backend, computation, devices, options, callbacks, *rest, **more)
        text = computation.operation.get_asm(enable_debug_info=False)
        settings = options.SerializeAsString() + str((id(backend), devices.tolist())).encode()
        key = hashlib.sha256(text.encode() + settings).hexdigest()
        if key not in _compiled:
            _compiled[key] = compile_anew(
                backend, computation, devices, options, callbacks, *rest, **more
            )
            if len(_compiled) > KEPT:
                _compiled.popitem(last=False)
        _compiled.move_to_end(key)
        return _compiled[key]

    compiler.compile_or_get_cached = compile_once


def share_draws() -> None:
    """Lets random numbers of all shapes come from one program, with the values that they have.

    A number depends on the key and its place alone, so that those of a small array are the first of
    a large one.  JAX compiles for every shape, for a tenth of a second.  Only where it is known.
    """
    if jax.__version_info__[:2] != (0, 10):
        return
    for name in ("normal", "randint"):
        setattr(jax.random, name, _first_of_many(getattr(jax.random, name)))


def _first_of_many(draw: Callable) -> Callable:
    """A function of `jax.random` that draws `DRAWS` numbers where it is asked for fewer."""
    from jax._src import core

    signature = inspect.signature(draw)

    @functools.wraps(draw)
    def drawn(*args, **options):
        given = signature.bind(*args, **options)
        given.apply_defaults()
        asked = given.arguments
        if (
            any(isinstance(x, core.Tracer) for x in asked.values())
            or not core.trace_state_clean()
            or not jax.sharding.get_abstract_mesh().empty
            or any(np.ndim(asked.get(limit, 0)) for limit in ("minval", "maxval"))
            or jax.random.key_data(asked["key"]).ndim > 1
            or math.prod(asked["shape"]) > DRAWS
        ):
            return draw(*args, **options)
        shape, asked["shape"] = asked["shape"], (DRAWS,)
        many = np.asarray(draw(*given.args, **given.kwargs))
        return jax.numpy.asarray(many[: math.prod(shape)].reshape(shape))

    return drawn


def forget_programs() -> None:
    """Lets go of all compiled programs."""
    _compiled.clear()
    jax.clear_caches()


def main() -> None:
    """Runs a module or code with the arguments behind it."""
    prepare()
    how, what = sys.argv[1:3]
    del sys.argv[:2]
    if how == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
