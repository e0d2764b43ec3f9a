"""The networks, in flax linen; images are channels last."""

import flax.linen as nn
import jax
import jax.numpy as jnp

MOMENTUM = 0.9  # of the running averages of batch norm


class Mlp(nn.Module):
    """Fully connected layers with ReLU between them, on flattened inputs.

    Attributes:
        features: the width of each layer, the last one that of the outputs.
        use_bias: whether the layers have biases.
        linear: the index of a layer without ReLU behind it (the code of an auto-encoder).
    """

    features: tuple[int, ...]
    use_bias: bool = True
    linear: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps inputs `(examples, ...)` to `(examples, features[-1])`."""
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.features):
            x = nn.Dense(width, use_bias=self.use_bias, name=f"fc{i + 1}")(x)
            if i not in (self.linear, len(self.features) - 1):
                x = nn.relu(x)
        return x


class Cnn(nn.Module):
    """Two convolutions and two dense layers for the 8x8 digits, 38,282 parameters at 3x3.

    Attributes:
        size: height and width of the kernels.
    """

    size: int = 3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images `(examples, 8, 8, 1)` to logits `(examples, 10)`."""
        kernel = (self.size, self.size)
        x = nn.relu(nn.Conv(16, kernel, name="conv1")(x))
        x = nn.relu(nn.Conv(32, kernel, strides=2, name="conv2")(x))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(64, name="fc1")(x))
        return nn.Dense(10, name="fc2")(x)


def _conv(features: int, size: int, stride: int, name: str) -> nn.Conv:
    # the padding of torch, also at stride 2, where "SAME" would pad on one side only
    padding = [(size // 2, size // 2)] * 2
    return nn.Conv(
        features, (size, size), strides=stride, padding=padding, use_bias=False, name=name
    )


def _norm(train: bool, name: str) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM, epsilon=1e-5, name=name)


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut, which is a 1x1 convolution where shapes change.

    Attributes:
        features: the number of output channels.
        stride: of the first convolution and the shortcut.
    """

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps images to images with `features` channels, smaller by `stride`."""
        y = nn.relu(_norm(train, "bn1")(_conv(self.features, 3, self.stride, "conv1")(x)))
        y = _norm(train, "bn2")(_conv(self.features, 3, 1, "conv2")(y))
        if x.shape != y.shape:
            x = _conv(self.features, 1, self.stride, "downsample_0")(x)
            x = _norm(train, "downsample_1")(x)
        return nn.relu(x + y)


class ResNet20(nn.Module):
    """ResNet-20 for 32x32 images (He et al. 2016), with the names of torch's usual checkpoints."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images `(examples, 32, 32, 3)` to logits `(examples, 10)`.

        Args:
            x: the images.
            train: whether batch norm uses (and averages) the statistics of the batch.
        """
        x = nn.relu(_norm(train, "bn1")(_conv(16, 3, 1, "conv1")(x)))
        for stage, width in enumerate((16, 32, 64)):
            for block in range(3):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Block(width, stride, name=f"layer{stage + 1}_{block}")(x, train)
        return nn.Dense(10, name="fc")(x.mean(axis=(1, 2)))


class TransformerBlock(nn.Module):
    """Causal self-attention and a two-layer perceptron, each behind a layer norm.

    Attributes:
        heads: the number of attention heads.
    """

    heads: int = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(examples, tokens, width)` to the same shape."""
        examples, tokens, width = x.shape
        qkv = nn.Dense(3 * width, use_bias=False, name="qkv")(nn.LayerNorm(name="norm1")(x))
        q, k, v = jnp.moveaxis(qkv.reshape(examples, tokens, 3, self.heads, -1), 2, 0)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + nn.Dense(width, use_bias=False, name="out")(attended.reshape(x.shape))
        y = nn.gelu(nn.Dense(4 * width, name="up")(nn.LayerNorm(name="norm2")(x)))
        return x + nn.Dense(width, name="down")(y)


class Transformer(nn.Module):
    """A causal language model over characters.

    Attributes:
        vocabulary: number of characters.
        width: of the residual stream.
        layers: the number of blocks.
    """

    vocabulary: int = 65
    width: int = 64
    layers: int = 2

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens `(examples, context)` to logits `(examples, context, vocabulary)`."""
        x = nn.Embed(self.vocabulary, self.width, name="embed_token")(tokens)
        x = x + nn.Embed(tokens.shape[1], self.width, name="embed_position")(
            jnp.arange(tokens.shape[1])
        )
        for i in range(self.layers):
            x = TransformerBlock(name=f"block_{i}")(x)
        return nn.Dense(self.vocabulary, name="head")(nn.LayerNorm(name="norm")(x))
