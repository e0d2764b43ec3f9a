#!/usr/bin/env bash
# After one conversion by jax2onnx, jnp.cumsum(x, 0) raises a TypeError in the whole program.
#
# Versions:  jax2onnx 0.17.1, jax and jaxlib 0.10.2, Python 3.11, CPU.
# Guess:     before it was run down: a test of ours that ran behind one of ONNX used an argument that
#            jax.numpy had dropped.  Wrong: the same line works until the first conversion.
# Expected:  a converter that replaces functions while it traces puts them back; code that has
#            nothing to do with ONNX runs as before.
# Seen:      importing jax2onnx changes nothing.  After the first jax2onnx.to_onnx, of any function,
#            jax.numpy.cumsum is another function, which takes the axis by name only:
#                before:     [2.0, 2.0, 2.0]
#                imported:   [2.0, 2.0, 2.0]
#                converted:  TypeError: jnp.cumsum expects a single positional argument
#            It is the only name of jax.numpy that stays replaced, and is not replaced again once it
#            was put back.
# We do:     put back what a conversion leaves in jax.numpy (fishleg_jax.export.to_onnx).
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 \
    jax2onnx==0.17.1

cat > "$folder/show.py" <<'PYTHON'
import jax.numpy as jnp

before = dict(vars(jnp))


def summed():
    try:
        return jnp.cumsum(jnp.ones((2, 3)), 0)[1].tolist()
    except TypeError as error:
        return f"TypeError: {error}"


seen = {"before": summed()}
import jax2onnx  # noqa: E402

seen["imported"] = summed()
jax2onnx.to_onnx(lambda x: 2 * x, [(2, 3)])
seen["converted"] = summed()
for when, result in seen.items():
    print(f"{when}: {result}")
left = [name for name, value in before.items() if vars(jnp)[name] is not value]
print("replaced:", left)
for name in left:
    setattr(jnp, name, before[name])
jax2onnx.to_onnx(lambda x: jnp.cumsum(x, axis=0), [(2, 3)])
assert summed() == seen["before"] == seen["imported"] == [2.0, 2.0, 2.0]
if left != ["cumsum"] or "single positional argument" not in seen["converted"]:
    raise SystemExit("changed: conversions put back what they replace")
print("as stated")
PYTHON
cd "$folder"
env -u PYTHONPATH JAX_PLATFORMS=cpu "$folder/venv/bin/python" show.py
