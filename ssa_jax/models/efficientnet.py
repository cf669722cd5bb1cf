"""EfficientNet: inverted residual blocks with squeeze-and-excitation, one a unit."""

from collections.abc import Sequence

from flax import nnx

from ssa_jax.models.feedforward import Feedforward
from ssa_jax.models.inverted import Block, Plan, divisible, network

# (expansion, kernel, channels, blocks, stride of the first) of each stage: table 1 of the paper.
B0 = (
    (1, 3, 16, 1, 1),
    (6, 3, 24, 2, 2),
    (6, 5, 40, 2, 2),
    (6, 3, 80, 3, 2),
    (6, 5, 112, 3, 1),
    (6, 5, 192, 4, 2),
    (6, 3, 320, 1, 1),
)


def efficientnet_b0(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    rank: float | None,
    rngs: nnx.Rngs,
    width: float = 1.0,
    drop_path: float = 0.0,
    stages: Sequence[tuple[int, int, int, int, int]] = B0,
) -> Feedforward:
    """EfficientNet-B0 (Tan and Le 2019, table 1).

    A 3x3 stem of 32 channels and stride 2, 16 inverted residual blocks with swish and
    squeeze-and-excitation of a quarter of their input's channels, a pointwise convolution to
    1280 channels, global average pooling and a linear classifier. On images of 32 pixels or less
    the stem and the first block of 24 channels have stride 1.

    Args:
      input_shape: (height, width, channels), sides of at least 8, or 32 where one exceeds 32.
      classes: number of logits.
      rank: initial rank of the pointwise convolutions as a fraction of full rank, or None for
        dense layers. The stem, depthwise convolutions, squeeze-and-excitation and the classifier
        stay dense.
      rngs: the key ``params`` draws all weights, ``dropout`` what is dropped.
      width: multiplies all channels, rounded to multiples of 8.
      drop_path: the chance that an example goes around a block in training, that of the last
        block; it rises evenly with depth (Huang et al. 2016). The paper has 0.2.
      stages: (expansion, kernel, channels, blocks, stride of the first) of each.

    Raises:
      ValueError: inputs that are no images, or too small ones.
    """
    c_in, blocks = divisible(32 * width), []
    stem = c_in
    for expansion, size, channels, count, strides in stages:
        out = divisible(channels * width)
        for i in range(count):
            here = strides if i == 0 else 1
            squeeze = max(1, c_in // 4)
            blocks.append(Block(size, expansion * c_in, out, here, nnx.silu, squeeze, nnx.silu))
            c_in = out
    plan = Plan(stem, blocks, 4 * blocks[-1].out, (), nnx.silu)
    return network(input_shape, classes, plan, rank=rank, rngs=rngs, drop_path=drop_path)
