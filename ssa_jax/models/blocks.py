"""Unit modules: what a model lists as its units of locality.

A unit module offers ``__call__(x)``, and ``linear(x)``: the same map with the identity in place
of the activation, average in place of max pooling and a norm by its scale. Inside ``__call__``
every parametrised map goes through `through`, so that feedback weights can stand in for the
weights in the backward direction alone. After `add_mean_slopes` the mean derivative of each
activation stands in ``linear`` where otherwise the identity does.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from ssa_jax.layers import Pool, SVDConv, SVDDense, max_pool
from ssa_jax.layers.lowering import conv_general_dilated

Array = jax.Array

# Running statistics follow within some tens of steps.
MOMENTUM = 0.9


def through(
    layer: Callable[[Array], Array], twin: Callable[[Array], Array] | None, x: Array
) -> Array:
    """layer(x), differentiated with respect to x as twin(x) when there is a twin.

    The twin runs backwards alone. Nothing else than x may be differentiated.
    """
    if twin is None:
        return layer(x)

    @jax.custom_vjp
    def swapped(x: Array) -> Array:
        return layer(x)

    def forwards(x: Array) -> tuple[Array, Array]:
        return layer(x), x

    def backwards(x: Array, cotangent: Array) -> tuple[Array]:
        return jax.vjp(twin, x)[1](cotangent)

    swapped.defvjp(forwards, backwards)
    return swapped(x)


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
    strides: int = 1, use_bias: bool = False,
) -> nnx.Module:  # fmt: skip
    """`SVDConv` at a rank fraction, `nnx.Conv` (He-initialised) for rank None; odd sizes.

    Padded by size // 2 on every side. With stride one that is SAME; SAME with stride two would
    centre a 3x3 window one pixel beside the position that a 1x1 shortcut takes.
    """
    padding = size // 2
    if rank is None:
        init = nnx.initializers.he_normal()
        return nnx.Conv(
            c_in, c_out, (size, size), strides=strides, padding=padding, use_bias=use_bias,
            kernel_init=init, conv_general_dilated=conv_general_dilated, rngs=rngs,
        )  # fmt: skip
    return SVDConv(
        c_in, c_out, size, rank=rank, strides=strides, padding=padding, use_bias=use_bias,
        rngs=rngs,
    )  # fmt: skip


def batch_norm(features: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Batch norm whose running statistics follow within some tens of steps."""
    return nnx.BatchNorm(features, momentum=MOMENTUM, rngs=rngs)


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


def per_channel(x: Array, scale: Array) -> Array:
    """The product of x (..., channels) and a scale (channels,)."""
    return x * scale.reshape((1,) * (x.ndim - 1) + (-1,))


def norm_scale(norm: nnx.BatchNorm, x: Array) -> Array:
    """A batch norm as the linear map x ⊙ γ/√(σ² + ε) of its running variance."""
    var = norm.var.get_value()
    scale = 1.0 if norm.scale is None else norm.scale.get_value()
    return per_channel(x, scale * lax.rsqrt(var + norm.epsilon))


class MeanSlope(nnx.Module):
    """A running mean of an activation's derivative: m ← 0.9 m + 0.1 mean φ'(z), per channel.

    The mean is over batch and positions. m ⊙ z is then the activation's part of a linear path:
    in expectation the path carries what backpropagation's gates let through, while the identity
    carries everything. Nothing flows back through the statistics.

    Args:
      features: number of channels.

    Attributes:
      mean: `nnx.BatchStat` m (features,) float32, one at first (the identity).
      use_running_average: leaves the mean alone; `train` and `eval` of a module set it.
    """

    def __init__(self, features: int):
        self.mean = nnx.BatchStat(jnp.ones(features, jnp.float32))
        self.use_running_average = False

    def observe(self, activation: Callable[[Array], Array], z: Array) -> None:
        """In training mode takes in φ' at z (..., features), the activation's inputs."""
        if self.use_running_average:
            return
        z = lax.stop_gradient(z)
        _, slope = jax.jvp(activation, (z,), (jnp.ones_like(z),))
        new = jnp.mean(slope.astype(jnp.float32), axis=tuple(range(z.ndim - 1)))
        self.mean.set_value(MOMENTUM * self.mean.get_value() + (1 - MOMENTUM) * new)

    def __call__(self, z: Array) -> Array:
        """The product m ⊙ z for z (..., features)."""
        return per_channel(z, self.mean.get_value())


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
        self.slope: MeanSlope | None = None

    @property
    def features(self) -> int:
        """Channels of the output."""
        return self.map.out_features

    def __call__(self, x: Array, twin: "Plain | None" = None) -> Array:
        """The unit's output; with a twin, its x-derivative uses the twin's map."""
        y = through(self.map, twin.map if twin else None, self._enter(x))
        if self.norm is not None:
            # The norm of bfloat16 values is float32: its statistics are.
            y = self.norm(y).astype(y.dtype)
        if self.activation is not None:
            if self.slope is not None:
                # Of a pooled map only the maxima pass a gradient on, and a monotone activation
                # has its maxima where its inputs have theirs.
                self.slope.observe(self.activation, max_pool(y, self.pool) if self.pool else y)
            y = self.activation(y)
        if self.pool:
            y = max_pool(y, self.pool)
        return y

    def linear(self, x: Array) -> Array:
        """The linear path of the unit (biases shift it and leave its derivative alone)."""
        y = self.map(self._enter(x))
        if self.norm is not None:
            y = norm_scale(self.norm, y)
        if self.slope is not None:
            y = self.slope(y)
        if self.pool:
            y = nnx.avg_pool(y, **self.pool.options, count_include_pad=False)
        return y

    def _enter(self, x: Array) -> Array:
        if self.average:
            x = jnp.mean(x, axis=(1, 2))
        return x.reshape(x.shape[0], -1) if self.flatten else x


class _Joined(nnx.Module):
    """What ends a block: the activation of a sum, if any, and its place in the linear path."""

    activation: Callable[[Array], Array] | None
    slope: MeanSlope | None

    def _activate(self, z: Array) -> Array:
        if self.activation is None:
            return z
        if self.slope is not None:
            self.slope.observe(self.activation, z)
        return self.activation(z)

    def _activate_linear(self, z: Array) -> Array:
        return z if self.slope is None else self.slope(z)


class Residual(_Joined):
    """A residual block as one unit: activation(body(x) + shortcut(x)).

    Args:
      body: `Plain` modules run in order; the last one without activation.
      shortcut: a `Plain` module that fits the shapes, or None for the identity.
      skip: False leaves the shortcut's term out: activation(body(x)), a plain block.
      activation: applied to the sum; None for none.

    Raises:
      ValueError: a shortcut given to a block without skip.
    """

    def __init__(
        self,
        body: list[Plain],
        *,
        shortcut: Plain | None = None,
        skip: bool = True,
        activation: Callable[[Array], Array] | None = nnx.relu,
    ):
        if shortcut is not None and not skip:
            raise ValueError("a block without skip takes no shortcut")
        self.body = nnx.List(body)
        self.shortcut = shortcut
        self.skip = skip
        self.activation = activation
        self.slope: MeanSlope | None = None

    @property
    def features(self) -> int:
        """Channels of the output."""
        return self.body[-1].features

    def __call__(self, x: Array, twin: "Residual | None" = None) -> Array:
        """The block's output; with a twin, its x-derivative uses the twin's maps."""
        y = x
        for i, part in enumerate(self.body):
            y = part(y, twin.body[i] if twin else None)
        if self.skip:
            y = y + _skip(self.shortcut, x, twin.shortcut if twin else None)
        return self._activate(y)

    def linear(self, x: Array) -> Array:
        """The linear path of a sum is the sum of the paths."""
        y = x
        for part in self.body:
            y = part.linear(y)
        if self.skip:
            y = y + _skip_linear(self.shortcut, x)
        return self._activate_linear(y)


class BlockEntry(nnx.Module):
    """The first half of a residual block: x -> [first(x), shortcut(x)] along the channels.

    With `BlockExit` this is the block in two units, one convolution each. A unit maps one array
    to one array, so what skips the second convolution travels beside its input.

    Args:
      first: a `Plain` module with its activation.
      shortcut: a `Plain` module that gives maps of the same size, or None for the identity.
    """

    def __init__(self, first: Plain, *, shortcut: Plain | None = None):
        self.first = first
        self.shortcut = shortcut

    def __call__(self, x: Array, twin: "BlockEntry | None" = None) -> Array:
        """Both branches side by side; with a twin, the x-derivative uses the twin's maps."""
        y = self.first(x, twin.first if twin else None)
        rest = _skip(self.shortcut, x, twin.shortcut if twin else None)
        return jnp.concatenate([y, rest], axis=-1)

    def linear(self, x: Array) -> Array:
        """The linear paths of both branches side by side."""
        return jnp.concatenate([self.first.linear(x), _skip_linear(self.shortcut, x)], axis=-1)


class BlockExit(_Joined):
    """The second half of a residual block: [y, rest] -> activation(last(y) + rest).

    Args:
      last: a `Plain` module without activation; its input features are those of y.
      activation: applied to the sum.
    """

    def __init__(self, last: Plain, *, activation: Callable[[Array], Array] = nnx.relu):
        self.last = last
        self.activation = activation
        self.slope: MeanSlope | None = None

    @property
    def features(self) -> int:
        """Channels of the output."""
        return self.last.features

    def __call__(self, x: Array, twin: "BlockExit | None" = None) -> Array:
        """The block's output; with a twin, its x-derivative uses the twin's map."""
        y, rest = self._split(x)
        return self._activate(self.last(y, twin.last if twin else None) + rest)

    def linear(self, x: Array) -> Array:
        """The linear path of y through the map, plus the rest unchanged."""
        y, rest = self._split(x)
        return self._activate_linear(self.last.linear(y) + rest)

    def _split(self, x: Array) -> tuple[Array, Array]:
        features = self.last.map.in_features
        return x[..., :features], x[..., features:]


def _skip(shortcut: Plain | None, x: Array, twin: Plain | None) -> Array:
    return x if shortcut is None else shortcut(x, twin)


def _skip_linear(shortcut: Plain | None, x: Array) -> Array:
    return x if shortcut is None else shortcut.linear(x)


def add_mean_slopes(model: nnx.Module) -> None:
    """Puts a `MeanSlope` on every module of a model that has an activation, in place.

    From then on training passes record the mean derivative of each activation in the model's
    state and `linear` multiplies by it; outputs and gradients stay what they were. With max
    pooling after the activation, the derivative that counts is the one at the pooled maxima,
    which is right for monotone activations.

    Args:
      model: any NNX module that holds the unit modules of this file.
    """
    # Collected first: the loop changes what is iterated over.
    for _, module in list(nnx.iter_modules(model)):
        if isinstance(module, Plain | Residual | BlockExit) and module.activation is not None:
            # The attribute held None, which NNX takes for static unless told otherwise.
            module.slope = nnx.data(MeanSlope(module.features))
