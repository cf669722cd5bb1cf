"""Residual networks of ImageNet, whose stem suits the size of the images."""

from collections.abc import Callable

import jax
from flax import nnx

from ssa_jax.layers import Pool
from ssa_jax.models.blocks import Plain, Residual, batch_norm, check_images, conv, dense
from ssa_jax.models.feedforward import Feedforward

Array = jax.Array
Activation = Callable[[Array], Array] | None
# (c_in, c_out, size, strides, activation) -> convolution, norm and activation.
Part = Callable[[int, int, int, int, Activation], Plain]
# (part, c_in, width, strides) -> the body of a block.
Body = Callable[[Part, int, int, int], list[Plain]]

# Side of the largest images whose maps the stem does not shrink. At 64 pixels such a stem would
# cost 15 times what the other one costs.
_SMALL = 32


def resnet18(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    rank: float | None,
    rngs: nnx.Rngs,
    width: int = 64,
    blocks: tuple[int, ...] = (2, 2, 2, 2),
) -> Feedforward:
    """ResNet-18 (He et al. 2016, table 1), one residual block a unit.

    Four stages of two blocks with `width` times 1, 2, 4 and 8 channels, each block two 3x3
    convolutions with batch norm; the first block of a stage but the first has stride 2. A block
    that changes the shape has a 1x1 convolution with batch norm for its shortcut (option B),
    factorised like every other convolution. Global average pooling and a linear classifier end it.

    The stem starts at full rank. It is a 7x7 convolution of stride 2 and 3x3 max pooling of
    stride 2, and for images of 32 pixels or less a 3x3 convolution without either.

    Args:
      input_shape: (height, width, channels), sides of at least 8.
      classes: number of logits.
      rank: initial rank as a fraction of full rank, or None for dense layers.
      rngs: the key ``params`` draws all weights.
      width: channels of the stem.
      blocks: blocks of each stage.

    Raises:
      ValueError: inputs that are no images, or too small ones.
    """
    return _resnet(input_shape, classes, rank, rngs, width, blocks, _basic)


def resnet50(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    rank: float | None,
    rngs: nnx.Rngs,
    width: int = 64,
    blocks: tuple[int, ...] = (3, 4, 6, 3),
) -> Feedforward:
    """ResNet-50 (He et al. 2016, table 1), one bottleneck block a unit.

    Four stages of 3, 4, 6 and 3 blocks: a 1x1 convolution down to `width` times 1, 2, 4 or 8
    channels, a 3x3 one, which has the stride, and a 1x1 one up to four times as many. (In the
    paper the first convolution has the stride; in the middle it costs no accuracy that a map is
    halved.) The rest, arguments and errors are those of `resnet18`.
    """
    return _resnet(input_shape, classes, rank, rngs, width, blocks, _bottleneck)


def _basic(part: Part, c_in: int, width: int, strides: int) -> list[Plain]:
    return [part(c_in, width, 3, strides, nnx.relu), part(width, width, 3, 1, None)]


def _bottleneck(part: Part, c_in: int, width: int, strides: int) -> list[Plain]:
    return [
        part(c_in, width, 1, 1, nnx.relu),
        part(width, width, 3, strides, nnx.relu),
        part(width, 4 * width, 1, 1, None),
    ]


def _resnet(
    input_shape: tuple[int, int, int],
    classes: int,
    rank: float | None,
    rngs: nnx.Rngs,
    width: int,
    blocks: tuple[int, ...],
    body: Body,
) -> Feedforward:
    check_images(input_shape, halvings=len(blocks) - 1)

    def part(c_in: int, c_out: int, size: int, strides: int, activation: Activation) -> Plain:
        layer = conv(c_in, c_out, size, rank=rank, rngs=rngs, strides=strides)
        return Plain(layer, norm=batch_norm(c_out, rngs), activation=activation)

    units: list[Callable[[Array], Array]] = [_stem(input_shape, width, rank, rngs)]
    c_in = width
    for stage, count in enumerate(blocks):
        for i in range(count):
            strides = 2 if stage and not i else 1
            parts = body(part, c_in, width * 2**stage, strides)
            c_out = parts[-1].features
            changes = strides > 1 or c_in != c_out
            shortcut = part(c_in, c_out, 1, strides, None) if changes else None
            units.append(Residual(parts, shortcut=shortcut))
            c_in = c_out
    classifier = Plain(dense(c_in, classes, rank=None, rngs=rngs), average=True)
    return Feedforward([*units, classifier])


def _stem(
    input_shape: tuple[int, int, int], width: int, rank: float | None, rngs: nnx.Rngs
) -> Plain:
    small = max(input_shape[:2]) <= _SMALL
    size, strides, pool = (3, 1, None) if small else (7, 2, Pool(3, 2, 1))
    return Plain(
        conv(input_shape[2], width, size, rank=rank and 1.0, rngs=rngs, strides=strides),
        norm=batch_norm(width, rngs),
        activation=nnx.relu,
        pool=pool,
    )
