#!/usr/bin/env bash
# A function under jax.jit that was converted by jax2onnx for a fixed batch fails from then on.
#
# Versions:  jax2onnx 0.17.1, jax and jaxlib 0.10.2, flax 0.12.8, Python 3.11, CPU.
# Expected:  a conversion leaves the function that it converts as it was.
# Seen:      while jax2onnx traces, layers of flax and functions of jax.numpy are replaced by
#            operations of its own.  jit keeps the trace of a function by the shapes of its inputs,
#            so that the next call with inputs of those shapes finds operations that XLA does not
#            know:
#                without a conversion:           (4, 5)
#                converted:                      NotImplementedError: MLIR translation rule for
#                                primitive 'linen.dense' not found for platform cpu
#                converted, another batch size:  (3, 5)
#            With a symbolic batch size it happens to inner functions whose inputs have no batch.
#            A call before the conversion hides it: then jax2onnx finds the trace without them.
# We do:     trace inside of a context that jit tells apart, set_xla_metadata
#            (fishleg_jax.export.to_onnx).
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 \
    flax==0.12.8 jax2onnx==0.17.1

cat > "$folder/show.py" <<'PYTHON'
import flax.linen as nn
import jax
import jax.numpy as jnp
import jax2onnx

layer = nn.Dense(5)
params = layer.init(jax.random.key(0), jnp.ones((4, 12)))


def called(run, batch):
    try:
        return run(jnp.ones((batch, 12))).shape
    except NotImplementedError as error:
        return f"NotImplementedError: {error}"


run = jax.jit(lambda x: layer.apply(params, x))
seen = {"without a conversion": called(jax.jit(lambda x: layer.apply(params, x)), 4)}
jax2onnx.to_onnx(run, [(4, 12)])
seen["converted"] = called(run, 4)
seen["converted, another batch size"] = called(run, 3)
for when, result in seen.items():
    print(f"{when}: {result}")
assert seen["without a conversion"] == (4, 5) and seen["converted, another batch size"] == (3, 5)
if "primitive 'linen.dense' not found" not in str(seen["converted"]):
    raise SystemExit("changed: conversions keep their traces to themselves")
print("as stated")
PYTHON
cd "$folder"
env -u PYTHONPATH JAX_PLATFORMS=cpu "$folder/venv/bin/python" show.py
