"""What the models are made of: maps with norm and activation, residual blocks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ssa_jax.layers import Pool, SVDConv, SVDDense, max_pool
from ssa_jax.layers.lowering import conv_general_dilated
from ssa_jax.layers.norm import BatchNorm
from ssa_jax.networks.cut import cut
from ssa_jax.networks.factorize import factorize

Array = jax.Array

# Running statistics follow within some tens of steps.
MOMENTUM = 0.9
# Why such layers stay dense.
FIRST = "the first layer: what it drops is lost to all that follows"
CLASSIFIER = "the classifier: few directions, each of them a class"


def dense(
    d_in: int, d_out: int, *, rank: float | None, rngs: nnx.Rngs, use_bias: bool = True
) -> nnx.Module:
    """`SVDDense` at a rank fraction, `nnx.Linear` (He-initialised) for rank None."""
    if rank is None:
        init = nnx.initializers.he_normal()
        return nnx.Linear(d_in, d_out, use_bias=use_bias, kernel_init=init, rngs=rngs)
    return SVDDense(d_in, d_out, rank=rank, use_bias=use_bias, rngs=rngs)


def conv(
    c_in: int, c_out: int, size: int, *, rank: float | None, rngs: nnx.Rngs,
    strides: int = 1, use_bias: bool = False, groups: int = 1,
) -> nnx.Module:  # fmt: skip
    """`SVDConv` at a rank fraction, `nnx.Conv` (He-initialised) for rank None; odd sizes.

    One of `groups` is of either kind, and a depthwise one is for rank None.

    Padded by size // 2 on every side. With stride one that is SAME; SAME with stride two would
    centre a 3x3 window one pixel beside the position that a 1x1 shortcut takes.
    """
    padding = size // 2
    if rank is None:
        init = nnx.initializers.he_normal()
        return nnx.Conv(
            c_in, c_out, (size, size), strides=strides, padding=padding, use_bias=use_bias,
            kernel_init=init, conv_general_dilated=conv_general_dilated,
            feature_group_count=groups, rngs=rngs,
        )  # fmt: skip
    return SVDConv(
        c_in, c_out, size, rank=rank, strides=strides, padding=padding, use_bias=use_bias,
        feature_group_count=groups, rngs=rngs,
    )  # fmt: skip


def batch_norm(features: int, rngs: nnx.Rngs, epsilon: float = 1e-5) -> BatchNorm:
    """Batch norm whose running statistics follow within some tens of steps."""
    return BatchNorm(features, momentum=MOMENTUM, epsilon=epsilon, rngs=rngs)


def at_rank(model: nnx.Module, rank: float | None, dense: Mapping[str, str]) -> Any:
    """The model with its layers on factors, or as it is for rank None.

    Args:
      model: of stock layers.
      rank: fraction of full rank.
      dense: patterns of layers that stay dense, each with the reason, which is told.
    """
    # A run, which knows how far its ranks fall, makes those dense that factors make dearer.
    return model if rank is None else factorize(model, rank=rank, lowest=0.0, exclude=dense)


def average(x: Array) -> Array:
    """The mean over positions: (batch, H, W, C) to (batch, C)."""
    return jnp.mean(x, axis=(1, 2))


def check_images(input_shape: tuple[int, ...], halvings: int) -> None:
    """Checks that inputs are images whose maps can be halved that often.

    Raises:
      ValueError: `input_shape` is not (height, width, channels), or a side is below 2^halvings.
    """
    if len(input_shape) != 3:
        raise ValueError(
            "convolutions need images (height, width, channels), not inputs of shape "
            f"{input_shape}; use another model, such as mlp"
        )
    if min(input_shape[:2]) < 2**halvings:
        raise ValueError(
            f"images of shape {input_shape} are too small to be halved {halvings} times; "
            "use a smaller model, such as mlp"
        )


class Plain(nnx.Module):
    """One parametrised map and what surrounds it.

    average? -> flatten? -> map -> norm? -> activation? -> pool?

    Args:
      map: a layer on arrays, such as `nnx.Conv` or `SVDDense`.
      norm: a batch norm or None.
      activation: an elementwise function or None.
      pool: windows of a 2-D max pooling, or None.
      average: averages the input (batch, H, W, C) over its positions first: (batch, C).
      flatten: flattens the input to (batch, features) first.
    """

    def __init__(
        self,
        map: Any,
        *,
        norm: nnx.BatchNorm | None = None,
        activation: Callable[[Array], Array] | None = None,
        pool: Pool | None = None,
        average: bool = False,
        flatten: bool = False,
    ):
        self.map = map
        self.norm = norm
        self.activation = activation
        self.pool = pool
        self.average = average
        self.flatten = flatten

    @property
    def features(self) -> int:
        """Channels of the output."""
        return self.map.out_features

    def __call__(self, x: Array) -> Array:
        """The output of all parts in a row."""
        if self.average:
            x = average(x)
        y = self.map(x.reshape(x.shape[0], -1) if self.flatten else x)
        if self.norm is not None:
            # The norm of bfloat16 values is float32: its statistics are.
            y = self.norm(y).astype(y.dtype)
        if self.activation is not None:
            y = self.activation(y)
        return max_pool(y, self.pool) if self.pool else y


class Gate(nnx.Module):
    """x ⊙ gate(x), a number for each example and channel: squeeze-and-excitation.

    Source: Hu, Shen and Sun 2018.

    Args:
      gate: layers run in order, from (batch, H, W, C) to (batch, C).
    """

    def __init__(self, gate: Sequence[Callable[[Array], Array]]):
        self.gate = nnx.Sequential(*gate)

    def __call__(self, x: Array) -> Array:
        """Maps (batch, H, W, C) to the same shape."""
        return x * self.gate(x)[:, None, None, :]


class Residual(nnx.Module):
    """A residual block: activation(body(x) + shortcut(x)).

    Args:
      body: modules run in order; the last one without activation.
      shortcut: a `Plain` module that fits the shapes, or None for the identity.
      skip: False leaves the shortcut's term out: activation(body(x)), a plain block.
      activation: applied to the sum; None for none.
      cuts: makes each module of the body a unit of its own; the shortcut belongs to the first.

    Raises:
      ValueError: a shortcut given to a block without skip.
    """

    def __init__(
        self,
        body: Sequence[Any],
        *,
        shortcut: Plain | None = None,
        skip: bool = True,
        activation: Callable[[Array], Array] | None = nnx.relu,
        cuts: bool = False,
    ):
        if shortcut is not None and not skip:
            raise ValueError("a block without skip takes no shortcut")
        self.body = nnx.List(body)
        self.shortcut = shortcut
        self.skip = skip
        self.activation = activation
        self.cuts = cuts

    @property
    def features(self) -> int:
        """Channels of the output."""
        return self.body[-1].features

    def __call__(self, x: Array) -> Array:
        """The block's output."""
        rest = x if self.shortcut is None else self.shortcut(x)
        y = x
        for i, part in enumerate(self.body):
            y = part(cut(y) if self.cuts and i else y)
        if self.skip:
            y = y + rest
        return y if self.activation is None else self.activation(y)
