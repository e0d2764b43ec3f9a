"""A network with batch norm and a folder of photos, so small that all methods take seconds."""

import io
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import fishleg_jax as flj
from experiments.imagenet.evaluation import Network

SIZE, CLASSES = 8, 6


def _forward(params, images, used):
    x = jnp.einsum("bhwi,io->bhwo", images, params["conv"]["kernel"])
    seen = {"mean": x.mean((0, 1, 2)), "variance": x.var((0, 1, 2))}
    used = seen if used is None else used
    x = (x - used["mean"]) * jax.lax.rsqrt(used["variance"] + 1e-3)
    x = jax.nn.relu(x).reshape(len(x), -1)
    return x @ params["head"]["kernel"], seen


def predict(params, images, constants):
    return _forward(params, images, constants)[0]


NETWORK = Network(
    "small",
    flj.Model(predict, flj.likelihoods.categorical()),
    lambda params, images, constants: _forward(params, images, None),
    lambda pixels: pixels.astype(np.float32) / 255,
    SIZE,
)


def load(path):
    """Weights in place of those of a file."""
    del path
    keys = jax.random.split(jax.random.key(0))
    params = {
        "conv": {"kernel": jax.random.normal(keys[0], (3, 4))},
        "head": {"kernel": jax.random.normal(keys[1], (SIZE * SIZE * 4, CLASSES)) / 5},
    }
    return params, {"mean": jnp.zeros(4), "variance": jnp.ones(4)}


def write_tar(path, labels, size=(12, 10), seed=0):
    """A tar of photos with some labels, of random pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    with tarfile.open(path, "w") as tar:
        for i, label in enumerate(labels):
            stream = io.BytesIO()
            pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
            Image.fromarray(pixels).save(stream, "JPEG")
            info = tarfile.TarInfo(f"{i:04}_{label}.jpg")
            info.size = stream.tell()
            stream.seek(0)
            tar.addfile(info, stream)


def write_shared(folder):
    """A shared folder with both tars."""
    write_tar(folder / "data/imagenet/calibration.tar", [i % CLASSES for i in range(30)])
    write_tar(folder / "data/imagenet/validation.tar", [i % CLASSES for i in range(20)], seed=1)
