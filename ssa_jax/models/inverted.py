"""Networks of inverted residual blocks: widened by a pointwise convolution, filtered, narrowed.

Source: Sandler et al. 2018, MobileNetV2.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from ssa_jax.models.blocks import (
    CLASSIFIER,
    FIRST,
    Gate,
    Plain,
    Residual,
    at_rank,
    average,
    batch_norm,
    check_images,
    conv,
    dense,
)
from ssa_jax.models.feedforward import Feedforward

Array = jax.Array
Activation = Callable[[Array], Array]

# Side of the largest images of which the first two of the halvings are left out.
_SMALL = 32


class Block(NamedTuple):
    """One inverted residual block.

    Attributes:
      size: side of the depthwise kernel.
      inner: channels that it filters.
      out: channels of the output.
      strides: of the depthwise convolution.
      activation: behind the norms of the first two convolutions.
      squeeze: channels within squeeze-and-excitation, 0 for none.
      inner_activation: within squeeze-and-excitation.
      gate: what ends it.
    """

    size: int
    inner: int
    out: int
    strides: int
    activation: Activation
    squeeze: int = 0
    inner_activation: Activation = nnx.relu
    gate: Activation = nnx.sigmoid


class Plan(NamedTuple):
    """A network of such blocks.

    Attributes:
      stem: channels of the 3x3 convolution of stride 2 that begins it.
      blocks: one a unit.
      last: channels of the pointwise convolution behind the blocks.
      hidden: widths of dense layers between it and the classifier.
      activation: of all these.
      epsilon: of the batch norms.
    """

    stem: int
    blocks: Sequence[Block]
    last: int
    hidden: Sequence[int]
    activation: Activation
    epsilon: float = 1e-5


def divisible(channels: float) -> int:
    """The multiple of 8 nearest to a width, and never less than nine tenths of it."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


def network(
    input_shape: tuple[int, int, int],
    classes: int,
    plan: Plan,
    *,
    rank: float | None,
    rngs: nnx.Rngs,
    drop_path: float = 0.0,
) -> Feedforward:
    """The network of a plan, with global average pooling and a dense classifier.

    For images of 32 pixels or less the stem and the first block of stride 2 have stride 1.

    Args:
      input_shape: (height, width, channels).
      classes: number of logits.
      plan: its widths.
      rank: initial rank of the pointwise convolutions and hidden layers, as a fraction of full
        rank, or None for dense layers. What stays dense is told, by a `LeftDense` warning.
      rngs: the key ``params`` draws all weights, ``dropout`` what is dropped.
      drop_path: of the last block, the chance that an example goes around it in training;
        it rises evenly with depth (Huang et al. 2016).

    Raises:
      ValueError: inputs that are no images, or too small ones.
    """
    small = len(input_shape) == 3 and max(input_shape[:2]) <= _SMALL
    halved = [i for i, b in enumerate(plan.blocks) if b.strides > 1]
    check_images(input_shape, halvings=len(halved) - 1 if small else len(halved) + 1)
    stem = _part(input_shape[2], plan.stem, 3, plan, rngs, strides=1 if small else 2)
    units: list[Any] = [stem]
    c_in = plan.stem
    for i, block in enumerate(plan.blocks):
        if small and [i] == halved[:1]:
            block = block._replace(strides=1)
        rate = drop_path * i / len(plan.blocks)
        units.append(_inverted(c_in, block, plan.epsilon, rate, rngs))
        c_in = block.out
    units.append(_part(c_in, plan.last, 1, plan, rngs))
    sizes = [plan.last, *plan.hidden]
    for a, b in zip(sizes, plan.hidden, strict=False):
        hidden = dense(a, b, rank=None, rngs=rngs)
        units.append(Plain(hidden, activation=plan.activation, average=a is sizes[0]))
    last = dense(sizes[-1], classes, rank=None, rngs=rngs)
    units.append(Plain(last, average=not plan.hidden))
    left = {"units/0/map": FIRST, f"units/{len(units) - 1}/map": CLASSIFIER}
    if any(block.squeeze for block in plan.blocks):
        left["*/gate/*"] = "squeeze-and-excitation: a bottleneck already, once an image"
    return at_rank(Feedforward(units), rank, left)


def _part(c_in: int, c_out: int, size: int, plan: Plan, rngs: nnx.Rngs, strides: int = 1) -> Plain:
    layer = conv(c_in, c_out, size, rank=None, rngs=rngs, strides=strides)
    norm = batch_norm(c_out, rngs, plan.epsilon)
    return Plain(layer, norm=norm, activation=plan.activation)


def _inverted(c_in: int, block: Block, epsilon: float, drop: float, rngs: nnx.Rngs) -> Residual:
    def part(c_in: int, c_out: int, activation: Activation | None, **options: Any) -> Plain:
        layer = conv(c_in, c_out, options.pop("size", 1), rank=None, rngs=rngs, **options)
        return Plain(layer, norm=batch_norm(c_out, rngs, epsilon), activation=activation)

    inner, skip = block.inner, block.strides == 1 and c_in == block.out
    body: list[Any] = []
    if inner != c_in:
        body.append(part(c_in, inner, block.activation))
    depthwise = {"size": block.size, "strides": block.strides, "groups": inner}
    body.append(part(inner, inner, block.activation, **depthwise))
    if block.squeeze:
        body.append(_squeeze(block, rngs))
    body.append(part(inner, block.out, None))
    if skip and drop:
        body.append(nnx.Dropout(drop, broadcast_dims=(1, 2, 3), rngs=rngs))
    return Residual(body, skip=skip, activation=None)


def _squeeze(block: Block, rngs: nnx.Rngs) -> Gate:
    down = dense(block.inner, block.squeeze, rank=None, rngs=rngs)
    up = dense(block.squeeze, block.inner, rank=None, rngs=rngs)
    return Gate([average, down, block.inner_activation, up, block.gate])
