"""MobileNetV2 and MobileNetV3: inverted residual blocks, one a unit."""

from collections.abc import Sequence

from flax import nnx

from ssa_jax.models.feedforward import Feedforward
from ssa_jax.models.inverted import Block, Plan, divisible, network

# (expansion, channels, blocks, stride of the first) of each stage: table 2 of the paper.
V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
# (kernel, inner, channels, squeeze-and-excitation, hard swish, stride) of each block: table 2.
V3_SMALL = (
    (3, 16, 16, True, False, 2),
    (3, 72, 24, False, False, 2),
    (3, 88, 24, False, False, 1),
    (5, 96, 40, True, True, 2),
    (5, 240, 40, True, True, 1),
    (5, 240, 40, True, True, 1),
    (5, 120, 48, True, True, 1),
    (5, 144, 48, True, True, 1),
    (5, 288, 96, True, True, 2),
    (5, 576, 96, True, True, 1),
    (5, 576, 96, True, True, 1),
)


def mobilenet_v2(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    rank: float | None,
    rngs: nnx.Rngs,
    width: float = 1.0,
    stages: Sequence[tuple[int, int, int, int]] = V2,
) -> Feedforward:
    """MobileNetV2 (Sandler et al. 2018, table 2).

    A 3x3 stem of 32 channels and stride 2, 17 inverted residual blocks with ReLU6, a pointwise
    convolution to 1280 channels, global average pooling and a linear classifier: 19 cuts. On
    images of 32 pixels or less the stem and the first block of 24 channels have stride 1, so
    that maps of 32 pixels end at 4.

    Args:
      input_shape: (height, width, channels), sides of at least 8, or 32 where one exceeds 32.
      classes: number of logits.
      rank: initial rank of the pointwise convolutions as a fraction of full rank, or None for
        dense layers. The stem, the depthwise convolutions and the classifier stay dense.
      rngs: the key ``params`` draws all weights.
      width: multiplies all channels, rounded to multiples of 8; the last ones only from one on.
      stages: (expansion, channels, blocks, stride of the first) of each.

    Raises:
      ValueError: inputs that are no images, or too small ones.
    """
    c_in, blocks = divisible(32 * width), []
    stem = c_in
    for expansion, channels, count, strides in stages:
        out = divisible(channels * width)
        for i in range(count):
            here = strides if i == 0 else 1
            blocks.append(Block(3, expansion * c_in, out, here, nnx.relu6))
            c_in = out
    plan = Plan(stem, blocks, divisible(1280 * max(1.0, width)), (), nnx.relu6)
    return network(input_shape, classes, plan, rank=rank, rngs=rngs)


def mobilenet_v3_small(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    rank: float | None,
    rngs: nnx.Rngs,
    width: float = 1.0,
    blocks: Sequence[tuple[int, int, int, bool, bool, int]] = V3_SMALL,
) -> Feedforward:
    """MobileNetV3-Small (Howard et al. 2019, table 2), as torchvision has it.

    A 3x3 stem of 16 channels and stride 2, eleven inverted residual blocks, of which nine have
    squeeze-and-excitation of a quarter of their inner channels, a pointwise convolution to 576
    channels, global average pooling, a hidden layer of 1024 and a linear classifier. On images
    of 32 pixels or less the stem and the first block have stride 1.

    Args:
      input_shape: (height, width, channels), sides of at least 8, or 32 where one exceeds 32.
      classes: number of logits.
      rank: initial rank of the pointwise convolutions and of the hidden layer as a fraction of
        full rank, or None for dense layers. The stem, depthwise convolutions, squeeze-and-
        excitation and the classifier stay dense.
      rngs: the key ``params`` draws all weights.
      width: multiplies all channels, rounded to multiples of 8.
      blocks: (kernel, inner, channels, squeeze-and-excitation, hard swish, stride) of each.

    Raises:
      ValueError: inputs that are no images, or too small ones.
    """

    def block(row: tuple[int, int, int, bool, bool, int]) -> Block:
        size, inner, out, squeezes, swish, strides = row
        inner = divisible(inner * width)
        return Block(
            size, inner, divisible(out * width), strides,
            activation=nnx.hard_swish if swish else nnx.relu,
            squeeze=divisible(inner // 4) if squeezes else 0, gate=nnx.hard_sigmoid,
        )  # fmt: skip

    found = [block(row) for row in blocks]
    hidden = divisible(1024 * width)
    plan = Plan(divisible(16 * width), found, 6 * found[-1].out, (hidden,), nnx.hard_swish, 1e-3)
    return network(input_shape, classes, plan, rank=rank, rngs=rngs)
