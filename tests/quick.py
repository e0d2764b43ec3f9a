"""How tests compile: their models are so small that nearly all the time is the compiler's."""

import functools
import itertools

import jax

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
