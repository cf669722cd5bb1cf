"""Residual networks for small images, and the same networks split or without their skips."""

from collections.abc import Callable

import jax
from flax import nnx

from ssa_jax.models.blocks import (
    Plain,
    Residual,
    batch_norm,
    check_images,
    conv,
    dense,
)
from ssa_jax.models.feedforward import Feedforward

Array = jax.Array
UnitModule = Callable[[Array], Array]
# A block of its two convolutions and its projection, if it has one.
Block = Callable[[Plain, Plain, Plain | None], Residual]

WIDTHS = (16, 32, 64)


def resnet32(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    rank: float | None,
    rngs: nnx.Rngs,
    blocks: int = 5,
) -> Feedforward:
    """ResNet-32 for CIFAR, one residual block a unit (He et al. 2016, section 4.2).

    A 3x3 stem of 16 channels, three stages of five blocks with 16, 32 and 64 channels, global
    average pooling and a linear classifier; each block is two 3x3 convolutions with batch norm.
    The first block of the second and of the third stage has stride 2, and its shortcut is a
    1x1 convolution of stride 2 with batch norm (the projection form, option B of the paper,
    whose CIFAR networks pad with zeros instead), factorised like every other convolution. The
    stem starts at full rank.

    Args:
      input_shape: (height, width, channels), sides of at least 4.
      classes: number of logits.
      rank: initial rank as a fraction of full rank, or None for dense layers.
      rngs: the key ``params`` draws all weights.
      blocks: blocks a stage; the network has 6 blocks + 2 layers on its longest path.

    Raises:
      ValueError: inputs that are no images, or too small ones.
    """
    return _resnet(input_shape, classes, rank, rngs, blocks, _whole)


def resnet32_conv(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    rank: float | None,
    rngs: nnx.Rngs,
    blocks: int = 5,
) -> Feedforward:
    """`resnet32` with each convolution of a block a unit of its own: the same function.

    Arguments and errors are those of `resnet32`; one seed gives both the same weights. A
    projection belongs to the unit of the block's first convolution.
    """
    return _resnet(input_shape, classes, rank, rngs, blocks, _halves)


def resnet32_identity(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    rank: float | None,
    rngs: nnx.Rngs,
    blocks: int = 5,
) -> Feedforward:
    """`resnet32` without the activation after each sum: blocks x + body(x).

    What skips a block then reaches the next one unchanged (Gross and Wilber 2016; He et al.,
    Identity mappings in deep residual networks, 2016, have the argument). Arguments and errors are
    those of `resnet32`; one seed gives both the same weights.
    """
    return _resnet(input_shape, classes, rank, rngs, blocks, _open)


def plain32(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    rank: float | None,
    rngs: nnx.Rngs,
    blocks: int = 5,
) -> Feedforward:
    """`resnet32` without its shortcuts: the plain network of He et al. 2016, in equal units.

    Arguments and errors are those of `resnet32`; one seed gives both the same weights, the
    projections apart.
    """
    return _resnet(input_shape, classes, rank, rngs, blocks, _bare)


def _resnet(
    input_shape: tuple[int, int, int],
    classes: int,
    rank: float | None,
    rngs: nnx.Rngs,
    blocks: int,
    block: Block,
) -> Feedforward:
    check_images(input_shape, halvings=len(WIDTHS) - 1)

    def plain(
        c_in: int, c_out: int, size: int, strides: int = 1, rank: float | None = rank,
        activation: Callable[[Array], Array] | None = None,
    ) -> Plain:  # fmt: skip
        layer = conv(c_in, c_out, size, rank=rank, rngs=rngs, strides=strides)
        return Plain(layer, norm=batch_norm(c_out, rngs), activation=activation)

    c_in = WIDTHS[0]
    stem_rank = None if rank is None else 1.0
    units: list[UnitModule] = [plain(input_shape[2], c_in, 3, rank=stem_rank, activation=nnx.relu)]
    for width in WIDTHS:
        for _ in range(blocks):
            strides = 1 if width == c_in else 2
            first = plain(c_in, width, 3, strides, activation=nnx.relu)
            last = plain(width, width, 3)
            # Drawn for every kind of block, so that all of them have the same other weights.
            shortcut = None if strides == 1 else plain(c_in, width, 1, strides)
            units.append(block(first, last, shortcut))
            c_in = width
    classifier = Plain(dense(c_in, classes, rank=None, rngs=rngs), average=True)
    return Feedforward([*units, classifier])


def _whole(first: Plain, last: Plain, shortcut: Plain | None) -> Residual:
    return Residual([first, last], shortcut=shortcut)


def _open(first: Plain, last: Plain, shortcut: Plain | None) -> Residual:
    return Residual([first, last], shortcut=shortcut, activation=None)


def _halves(first: Plain, last: Plain, shortcut: Plain | None) -> Residual:
    return Residual([first, last], shortcut=shortcut, cuts=True)


def _bare(first: Plain, last: Plain, shortcut: Plain | None) -> Residual:
    del shortcut
    return Residual([first, last], skip=False)
