"""Networks without skips: a perceptron, a small convolutional network, VGG-13."""

import itertools
import math
from collections.abc import Callable, Sequence

import jax
from flax import nnx

from ssa_jax.layers import Pool
from ssa_jax.models.blocks import Plain, batch_norm, check_images, conv, dense
from ssa_jax.networks.cut import cut

Array = jax.Array


class Feedforward(nnx.Module):
    """Units run one after the other, with a cut after each but the last."""

    def __init__(self, units: Sequence[Callable[[Array], Array]]):
        self.units = nnx.List(units)

    def __call__(self, x: Array) -> Array:
        """Logits (batch, classes) of images (batch, H, W, C)."""
        *hidden, last = self.units
        for unit in hidden:
            x = cut(unit(x))
        return last(x)


def _classifier(d_in: int, classes: int, rngs: nnx.Rngs) -> Plain:
    """The last unit is always dense: at ten classes its factors would be larger than itself."""
    return Plain(dense(d_in, classes, rank=None, rngs=rngs), flatten=True)


def mlp(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    rank: float | None,
    rngs: nnx.Rngs,
    hidden: tuple[int, ...] = (512, 512),
) -> Feedforward:
    """Three-layer perceptron: two hidden ReLU layers of 512 and a linear classifier.

    A first layer of fewer inputs than outputs starts at full rank: below it, inputs are lost to
    all that follows, and few parameters saved.
    """
    sizes = (math.prod(input_shape), *hidden)
    ranks = [rank] * len(hidden)
    if rank is not None and sizes[0] < sizes[1]:
        ranks[0] = 1.0
    units = [
        Plain(dense(a, b, rank=r, rngs=rngs), activation=nnx.relu, flatten=True)
        for (a, b), r in zip(itertools.pairwise(sizes), ranks, strict=True)
    ]
    return Feedforward([*units, _classifier(sizes[-1], classes, rngs)])


def _conv_stack(
    input_shape: tuple[int, int, int], plan: Sequence[int | str], rank: float | None,
    rngs: nnx.Rngs, spare: int = 0,
) -> tuple[list[Plain], int]:  # fmt: skip
    """3x3 conv + batch norm + ReLU units; "M" after a width pools 2x2. Units and features out.

    So many of the last poolings as `spare` says are left out where there is one position left.

    The first convolution starts at full rank (9 for colour images): half of it would save
    less than a thousandth of the parameters and starve all that follows.
    """
    check_images(input_shape, halvings=plan.count("M") - spare)
    height, width, c_in = input_shape
    units: list[Plain] = []
    for here, after in zip(plan, [*plan[1:], None], strict=True):
        if here == "M":
            continue
        pool = Pool(2, 2) if after == "M" and min(height, width) > 1 else None
        if pool:
            height, width = height // 2, width // 2
        c_out = int(here)
        units.append(
            Plain(
                conv(c_in, c_out, 3, rank=1.0 if rank and not units else rank, rngs=rngs),
                norm=batch_norm(c_out, rngs),
                activation=nnx.relu,
                pool=pool,
            )
        )
        c_in = c_out
    return units, height * width * c_in


def smallconv(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    rank: float | None,
    rngs: nnx.Rngs,
    width: int = 1,
) -> Feedforward:
    """Three 3x3 convolutions of 32, 64, 128 channels, each with norm, ReLU and 2x2 pooling,
    a hidden layer of 512 and a linear classifier; `width` multiplies channels and hidden layer.
    """
    plan = (32 * width, "M", 64 * width, "M", 128 * width, "M")
    units, features = _conv_stack(input_shape, plan, rank, rngs)
    size = 512 * width
    hidden = Plain(dense(features, size, rank=rank, rngs=rngs), activation=nnx.relu, flatten=True)
    return Feedforward([*units, hidden, _classifier(size, classes, rngs)])


def vgg11(
    input_shape: tuple[int, int, int], classes: int, *, rank: float | None, rngs: nnx.Rngs
) -> Feedforward:
    """VGG-11 with batch norm and one linear classifier (Simonyan & Zisserman 2015, net A).

    Of small images as `vgg13`.
    """
    return _vgg(_VGG11, input_shape, classes, rank, rngs)


def vgg13(
    input_shape: tuple[int, int, int], classes: int, *, rank: float | None, rngs: nnx.Rngs
) -> Feedforward:
    """VGG-13 with batch norm and one linear classifier (Simonyan & Zisserman 2015, net B).

    Of images below 32 pixels a side, which have one position left before it, without the last
    pooling; its parameters are the same.
    """
    return _vgg(_VGG13, input_shape, classes, rank, rngs)


_VGG11 = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")
_VGG13 = (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")


def _vgg(
    plan: Sequence[int | str], input_shape: tuple[int, int, int], classes: int,
    rank: float | None, rngs: nnx.Rngs,
) -> Feedforward:  # fmt: skip
    units, features = _conv_stack(input_shape, plan, rank, rngs, spare=1)
    return Feedforward([*units, _classifier(features, classes, rngs)])
