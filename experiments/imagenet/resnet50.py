"""ResNet-50 for ImageNet as Keras has it (v1), a pure function of weights with Keras' names.

He, Zhang, Ren & Sun, Deep residual learning for image recognition, CVPR 2016; `keras.applications`
before 2.2.  Unlike torchvision's: convolutions have biases, the first 1x1 convolution of a block
has the stride, batch norm has an epsilon of 1e-3, and images are BGR with a mean taken off.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fishleg_jax as flj
from experiments.imagenet.evaluation import Network
from fishleg_jax.pruning.masks.files import read_npz

EPSILON = 1e-3  # of batch norm
BGR_MEAN = (103.939, 116.779, 123.68)
SIZE = 224  # pixels, height and width
BLOCKS = {"2": "abc", "3": "abcd", "4": "abcdef", "5": "abc"}  # the blocks of every stage
STATISTICS = ("moving_mean", "moving_variance")
FILE = "resnet50_imagenet.npz"
HOW = "make it with: python ../shared/data/prepare.py resnet50"


def predict(params: Any, images: jax.Array, constants: Any) -> jax.Array:
    """Logits of images.

    What may be pruned are the parameters; all else is constant, 0.3 % of the numbers: with it every
    estimate would have six times as many leaves.

    Args:
        params: by layer, `{"conv1": {"kernel"}, ...}`, convolutions HWIO.
        images: `(examples, 224, 224, 3)`, see `preprocess`.
        constants: by layer, `{"conv1": {"bias"}, "bn_conv1": {"gamma", "beta", "moving_mean",
            "moving_variance"}, ...}`.

    Returns:
        `(examples, 1000)`.
    """
    return _forward(params, images, constants, stored=True)[0]


def by_batch(params: Any, images: jax.Array, constants: Any) -> tuple[jax.Array, Any]:
    """Logits of images with the statistics of these images themselves, and constants with these.

    They are of every layer behind layers that use them.  Arguments as in `predict`.
    """
    return _forward(params, images, constants, stored=False)


def preprocess(pixels: np.ndarray) -> np.ndarray:
    """RGB pixels 0 to 255, channels last, as the network wants them: float32 BGR without a mean."""
    return pixels[..., ::-1].astype(np.float32) - np.float32(BGR_MEAN)


def _forward(params: Any, x: jax.Array, constants: Any, *, stored: bool) -> tuple[jax.Array, Any]:
    used = dict(constants)

    def convolution(x: jax.Array, name: str, norm: str, stride: int, padding: int) -> jax.Array:
        x = convolve(x, params[name]["kernel"], stride, padding) + constants[name]["bias"]
        own = constants[norm]
        if not stored:
            values = x.mean((0, 1, 2)), x.var((0, 1, 2))
            own = used[norm] = own | dict(zip(STATISTICS, values, strict=True))
        scale = own["gamma"] * jax.lax.rsqrt(own["moving_variance"] + EPSILON)
        return x * scale + (own["beta"] - own["moving_mean"] * scale)

    def branch(x: jax.Array, name: str, stride: int = 1, padding: int = 0) -> jax.Array:
        return convolution(x, f"res{name}", f"bn{name}", stride, padding)

    x = max_pool(jax.nn.relu(convolution(x, "conv1", "bn_conv1", 2, 3)))
    for stage, blocks in BLOCKS.items():
        for block in blocks:
            name = f"{stage}{block}_branch"
            stride = 2 if block == "a" and stage != "2" else 1
            y = jax.nn.relu(branch(x, f"{name}2a", stride))
            y = jax.nn.relu(branch(y, f"{name}2b", padding=1))
            y = branch(y, f"{name}2c")
            shortcut = branch(x, f"{name}1", stride) if block == "a" else x
            x = jax.nn.relu(y + shortcut)
    return x.mean((1, 2)) @ params["fc1000"]["kernel"] + constants["fc1000"]["bias"], used


def convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """A convolution with zeros around the image, channels last."""
    if kernel.shape[:2] == (1, 1):
        return jnp.einsum("bhwi,io->bhwo", x[:, ::stride, ::stride], kernel[0, 0])
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def max_pool(x: jax.Array) -> jax.Array:
    """The largest of 3x3 values at stride 2; values behind a ReLU, so that zeros around do."""
    return jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), [(0, 0), (1, 1), (1, 1), (0, 0)]
    )


NETWORK = Network(
    "resnet50", flj.Model(predict, flj.likelihoods.categorical()), by_batch, preprocess, SIZE
)


def folder() -> Path:
    """Where the weights are looked for unless a user says otherwise: see `prepare.py`."""
    return Path("~/.cache/fishleg-data").expanduser()


def load(path: Path) -> tuple[Any, Any]:
    """Reads the weights that `prepare.py` makes.

    Args:
        path: an npz file of arrays named `layer/leaf`, as Keras names them, convolutions HWIO.

    Returns:
        The parameters and the constants of `predict`, float32.

    Raises:
        ValueError: there is no such file, or an entry is missing, unknown, or not as it should be.
    """
    if not path.is_file():
        raise ValueError(f"the weights {path} are missing: {HOW}")
    entries = read_npz(path)
    for name, shape in shapes().items():
        found = entries.get(name)
        if found is None or found.shape != shape or not np.isfinite(found).all():
            what = "is missing" if found is None else f"has shape {found.shape} or is not finite"
            raise ValueError(f"weights {path}: {name} {what}, expected {shape}; {HOW}")
    if unknown := sorted(set(entries) - set(shapes())):
        raise ValueError(f"weights {path}: {unknown[0]} is unknown; {HOW}")
    return tree_of(entries)


def tree_of(entries: Mapping[str, np.ndarray]) -> tuple[Any, Any]:
    """Parameters and constants, see `predict`, of arrays by `layer/leaf`."""
    params, constants = {}, {}
    for name, array in entries.items():
        layer, leaf = name.split("/")
        tree = params if leaf == "kernel" else constants
        tree.setdefault(layer, {})[leaf] = jnp.asarray(array, jnp.float32)
    return params, constants


def shapes(base: int = 64, classes: int = 1000) -> dict[str, tuple[int, ...]]:
    """The shapes of all entries of a file of weights.

    Args:
        base: the channels behind the first convolution; fewer make a network for tests.
        classes: number of classes.
    """
    out = {}

    def layer(name: str, norm: str, *kernel: int) -> None:
        out[f"{name}/kernel"], out[f"{name}/bias"] = kernel, kernel[-1:]
        out.update({f"{norm}/{leaf}": kernel[-1:] for leaf in ("gamma", "beta", *STATISTICS)})

    layer("conv1", "bn_conv1", 7, 7, 3, base)
    width = base
    for i, (stage, blocks) in enumerate(BLOCKS.items()):
        inner, outer = base * 2**i, 4 * base * 2**i
        for block in blocks:
            name = f"{stage}{block}_branch"
            layer(f"res{name}2a", f"bn{name}2a", 1, 1, width, inner)
            layer(f"res{name}2b", f"bn{name}2b", 3, 3, inner, inner)
            layer(f"res{name}2c", f"bn{name}2c", 1, 1, inner, outer)
            if block == "a":
                layer(f"res{name}1", f"bn{name}1", 1, 1, width, outer)
            width = outer
    out["fc1000/kernel"], out["fc1000/bias"] = (width, classes), (classes,)
    return out
