#!/usr/bin/env bash
# jax2onnx writes a file of a residual network that no runtime takes, without an error.
#
# Versions:  jax2onnx 0.17.1, jax and jaxlib 0.10.2, onnx 1.23.2, onnxruntime 1.32.0, CPU, Python 3.11.
# Guess:     before it was run down: the batch norm of flax, whose ONNX operator wants channels first.
#            Wrong: without flax and without batch norm it is the same.
# Expected:  images with channels last through convolutions, ReLU and residual sums give a file that
#            onnxruntime runs, whatever the number of blocks.
# Seen:      with three blocks or more before one that changes the number of channels, an Add gets one
#            operand with channels first and one with channels last:
#                1 block:  7e-07 from JAX
#                2 blocks: 7e-07 from JAX, but onnx.checker (full_check) refuses the file
#                3 blocks: onnxruntime refuses it: Op (Add) [ShapeInferenceError] Incompatible dimensions
#            Every ResNet has such blocks.  jax2onnx issue 166 is about transpositions that stay.
# We do:     convert without the pass "remove_redundant_transpose_pairs" where the file does not run
#            (fishleg_jax.export.to_onnx); the script checks that this is right.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 \
    jax2onnx==0.17.1 onnx==1.23.2 onnxruntime==1.32.0

cat > "$folder/show.py" <<'PYTHON'
import jax
import jax2onnx
import numpy as np
import onnxruntime
from jax2onnx.converter import ir_optimizations

rng = np.random.default_rng(0)
narrow = rng.normal(size=(4, 3, 3, 4, 4)).astype(np.float32) / 6
wide = rng.normal(size=(2, 3, 3, 4, 8)).astype(np.float32) / 6
images = rng.normal(size=(2, 8, 8, 4)).astype(np.float32)


def conv(x, kernel):
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)


def network(blocks):
    """A convolution, residual blocks of four channels, and one that widens to eight."""

    def predict(x):
        x = jax.nn.relu(conv(x, narrow[0]))
        for kernel in narrow[1 : 1 + blocks]:
            x = jax.nn.relu(x + conv(x, kernel))
        return jax.nn.relu(conv(x, wide[0]) + conv(x, wide[1]))

    return predict


def apart(blocks):
    """Largest difference between onnxruntime and JAX; what onnxruntime says where it refuses."""
    predict = network(blocks)
    expected = np.asarray(jax.jit(predict)(images))
    model = jax2onnx.to_onnx(predict, [images.shape]).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        return str(error)
    (found,) = session.run(None, {session.get_inputs()[0].name: images})
    return float(np.abs(found - expected).max())


seen = {blocks: apart(blocks) for blocks in (1, 2, 3)}
passes = ir_optimizations._OPTIMIZER_PASSES
kept = [x for x in passes if x.name != "remove_redundant_transpose_pairs"]
ir_optimizations._OPTIMIZER_PASSES = tuple(kept)
without = apart(3)
for blocks, result in seen.items():
    print(f"{blocks} block(s): {result}")
print(f"3 blocks, without the pass: {without}")
assert seen[1] < 1e-5 and seen[2] < 1e-5 and without < 1e-5
if not (isinstance(seen[3], str) and "Incompatible dimensions" in seen[3]):
    raise SystemExit("changed: the file of three blocks runs")
print("as stated")
PYTHON
cd "$folder"
env -u PYTHONPATH JAX_PLATFORMS=cpu "$folder/venv/bin/python" show.py
