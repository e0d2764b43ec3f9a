"""How tests compile: their models are so small that nearly all the time is the compiler's."""

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
