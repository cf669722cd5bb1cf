"""Unit modules: what a model lists as its units of locality.

A unit module offers ``__call__(x)``, and ``linear(x)``: the same map with the identity in place
of the activation, average in place of max pooling and a norm by its scale. Inside ``__call__``
every parametrised map goes through `through`, so that feedback weights can stand in for the
weights in the backward direction alone.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import lax

from ssa_jax.layers import SVDConv, SVDDense, max_pool

Array = jax.Array


def through(
    layer: Callable[[Array], Array], twin: Callable[[Array], Array] | None, x: Array
) -> Array:
    """layer(x), differentiated with respect to x as twin(x) when there is a twin."""
    if twin is None:
        return layer(x)
    y = twin(x)
    return lax.stop_gradient(layer(x)) + (y - lax.stop_gradient(y))


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
    """`SVDConv` at a rank fraction, `nnx.Conv` (He-initialised) for rank None; SAME padding."""
    if rank is None:
        init = nnx.initializers.he_normal()
        return nnx.Conv(
            c_in, c_out, (size, size), strides=strides, use_bias=use_bias,
            kernel_init=init, rngs=rngs,
        )  # fmt: skip
    return SVDConv(c_in, c_out, size, rank=rank, strides=strides, use_bias=use_bias, rngs=rngs)


def batch_norm(features: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Batch norm whose running statistics follow within some tens of steps."""
    return nnx.BatchNorm(features, momentum=0.9, rngs=rngs)


def norm_scale(norm: nnx.BatchNorm, x: Array) -> Array:
    """A batch norm as the linear map x ⊙ γ/√(σ² + ε) of its running variance."""
    var = norm.var.get_value()
    scale = 1.0 if norm.scale is None else norm.scale.get_value()
    return x * (scale * lax.rsqrt(var + norm.epsilon)).reshape((1,) * (x.ndim - 1) + (-1,))


class Plain(nnx.Module):
    """One parametrised map and what follows it: flatten? -> map -> norm? -> activation? -> pool?

    Args:
      map: a layer on arrays, such as `nnx.Conv` or `SVDDense`.
      norm: a batch norm or None.
      activation: an elementwise function or None.
      pool: window and stride of a 2-D max pooling, or 0.
      flatten: flattens the input to (batch, features) first.
    """

    def __init__(
        self,
        map: Any,
        *,
        norm: nnx.BatchNorm | None = None,
        activation: Callable[[Array], Array] | None = None,
        pool: int = 0,
        flatten: bool = False,
    ):
        self.map = map
        self.norm = norm
        self.activation = activation
        self.pool = pool
        self.flatten = flatten

    def __call__(self, x: Array, twin: "Plain | None" = None) -> Array:
        """The unit's output; with a twin, its x-derivative uses the twin's map."""
        y = through(self.map, twin.map if twin else None, self._flat(x))
        if self.norm is not None:
            y = self.norm(y)
        if self.activation is not None:
            y = self.activation(y)
        if self.pool:
            y = max_pool(y, self.pool)
        return y

    def linear(self, x: Array) -> Array:
        """The linear path of the unit (biases shift it and leave its derivative alone)."""
        y = self.map(self._flat(x))
        if self.norm is not None:
            y = norm_scale(self.norm, y)
        if self.pool:
            window = (self.pool, self.pool)
            y = nnx.avg_pool(y, window, strides=window)
        return y

    def _flat(self, x: Array) -> Array:
        return x.reshape(x.shape[0], -1) if self.flatten else x


class Residual(nnx.Module):
    """A residual block as one unit: activation(body(x) + shortcut(x)).

    Args:
      body: `Plain` modules run in order; the last one without activation.
      shortcut: a `Plain` module that fits the shapes, or None for the identity.
      activation: applied to the sum.
    """

    def __init__(
        self,
        body: list[Plain],
        *,
        shortcut: Plain | None = None,
        activation: Callable[[Array], Array] = nnx.relu,
    ):
        self.body = nnx.List(body)
        self.shortcut = shortcut
        self.activation = activation

    def __call__(self, x: Array, twin: "Residual | None" = None) -> Array:
        """The block's output; with a twin, its x-derivative uses the twin's maps."""
        y = x
        for i, part in enumerate(self.body):
            y = part(y, twin.body[i] if twin else None)
        if self.shortcut is not None:
            x = self.shortcut(x, twin.shortcut if twin else None)
        return self.activation(x + y)

    def linear(self, x: Array) -> Array:
        """The linear path of a sum is the sum of the paths."""
        y = x
        for part in self.body:
            y = part.linear(y)
        return y + (x if self.shortcut is None else self.shortcut.linear(x))
