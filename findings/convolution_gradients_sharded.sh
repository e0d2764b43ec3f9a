#!/usr/bin/env bash
# Per-example gradients of a convolution kernel are wrong, without an error, when the batch is sharded.
#
# Versions:  jax 0.10.2 and jaxlib 0.10.2, CPU, Python 3.11, two virtual devices, Auto axes.
# Expected:  jit(vmap(grad(loss), (None, 0))) gives the same numbers whether the batch of images lies on
#            one device or is sharded over two.
# Seen:      the gradients of the images on the first device are right, all others are exactly 0, as soon
#            as something nonlinear follows the convolution (with a plain sum they are right):
#                one device:  [4.694 7.307 7.973 4.447]
#                two devices: [4.694 7.307 0.    0.   ]
#            (largest entry of each image's gradient).  jax issue 32157, closed, has an error in the
#            same place in jax 0.7.2; here there is none.
# We do:     take such gradients under jax.shard_map, each device on its own examples
#            (fishleg_jax.per_example_gradients, check_vma=False); the script checks that this is right.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2

cat > "$folder/show.py" <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P


def loss(kernel, image):
    dims = ("NHWC", "HWIO", "NHWC")
    out = jax.lax.conv_general_dilated(image[None], kernel, (1, 1), "SAME", dimension_numbers=dims)
    return jnp.tanh(out).sum()


gradients = jax.vmap(jax.grad(loss), (None, 0))
kernel = jax.random.normal(jax.random.key(0), (3, 3, 1, 2))
images = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
sharded = jax.device_put(images, NamedSharding(mesh, P("data")))

one = np.asarray(jax.jit(gradients)(kernel, images))
two = np.asarray(jax.jit(gradients)(kernel, sharded))
by_hand = jax.shard_map(  # without check_vma gradients of the replicated kernel stay unsummed
    gradients, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=False
)
mapped = np.asarray(jax.jit(by_hand)(kernel, sharded))


def largest(x):
    return np.abs(x).max(axis=(1, 2, 3, 4)).round(3)


print(f"jax {jax.__version__}")
print("one device: ", largest(one))
print("two devices:", largest(two))
print("shard_map:  ", largest(mapped))
np.testing.assert_allclose(mapped, one, atol=1e-5)
np.testing.assert_allclose(two[:2], one[:2], atol=1e-5)
assert (one[2:] != 0).all()
if not (two[2:] == 0).all():
    raise SystemExit("changed: the gradients on the second device are no longer 0")
print("as stated")
PYTHON
cd "$folder"
env -u PYTHONPATH JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=2 \
    "$folder/venv/bin/python" show.py
