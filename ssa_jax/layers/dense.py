"""Dense layers on factors, of one axis or of several as attention's projections have them."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ssa_jax import factors
from ssa_jax.factors import Factors
from ssa_jax.layers import products

Array = jax.Array
he_normal = nnx.initializers.he_normal()


def init_factors(w: Array, rank: float, key: Array) -> Factors:
    """Best factors of w at a fraction of full rank."""
    return factors.from_dense(w, factors.rank_of(rank, *w.shape), key)


class SVDDense(nnx.Module):
    """Dense layer y = ((x V) ⊙ s) Uᵀ + b.

    Args:
      in_features: d_in.
      out_features: d_out.
      rank: initial rank as a fraction of min(d_in, d_out), in (0, 1].
      use_bias: adds b (d_out,).
      rngs: the key ``params`` draws the He-initialised matrix that is factored once.

    Attributes:
      in_features, out_features: as given; both stay when the rank changes.
      kernel: `nnx.Param` of `Factors` with u (d_out, r), s (r,), v (d_in, r).
      bias: `nnx.Param` (d_out,) or None.

    Raises:
      ValueError: rank outside (0, 1].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: float = 1.0,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        self.in_features = in_features
        self.out_features = out_features
        w = he_normal(rngs.params(), (in_features, out_features), jnp.float32).T
        self.kernel = nnx.Param(init_factors(w, rank, rngs.params()))
        self.bias = nnx.Param(jnp.zeros(out_features)) if use_bias else None

    def __call__(self, x: Array) -> Array:
        """Maps x (..., d_in) to (..., d_out).

        Raises:
          ValueError: x has another last axis.
        """
        check_input(self, x, self.in_features, "(..., {})")
        y = products.dense(self.kernel.get_value(), x)
        if self.bias is not None:
            y = y + self.bias.get_value().reshape((1,) * (y.ndim - 1) + (-1,))
        return y


def check_input(layer: nnx.Module, x: Array, features: int, form: str) -> None:
    """Raises ValueError, naming its shape, for an input that is not of a form."""
    form = form.format(features)
    if jnp.ndim(x) < form.count(",") or jnp.shape(x)[-1] != features:
        raise ValueError(
            f"{type(layer).__name__} takes {form}, got an input of shape {jnp.shape(x)}"
        )


class SVDLinearGeneral(nnx.Module):
    """`nnx.LinearGeneral` on factors: axes of the input are mapped to axes of the output.

    The kernel (*in, *out) is the matrix of `SVDDense` from the product of the input's sizes to
    that of the output's. Attention's projections are of this kind.

    Args:
      in_shape: sizes of the axes that are mapped.
      out_shape: sizes of those that take their place, at the end.
      axis: the axes of the input.
      rank: initial rank as a fraction of full rank, in (0, 1].
      use_bias: adds b (*out_shape).
      rngs: the key ``params`` draws the He-initialised matrix that is factored once.

    Attributes:
      kernel: `nnx.Param` of `Factors` with u (Π out, r), s (r,), v (Π in, r).
      bias: `nnx.Param` (*out_shape) or None.

    Raises:
      ValueError: rank outside (0, 1].
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        *,
        axis: Sequence[int] = (-1,),
        rank: float = 1.0,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        self.in_shape, self.out_shape, self.axis = tuple(in_shape), tuple(out_shape), tuple(axis)
        sizes = math.prod(in_shape), math.prod(out_shape)
        w = he_normal(rngs.params(), sizes, jnp.float32).T
        self.kernel = nnx.Param(init_factors(w, rank, rngs.params()))
        self.bias = nnx.Param(jnp.zeros(self.out_shape)) if use_bias else None

    def __call__(self, x: Array, out_sharding: Any = None) -> Array:
        """Maps x to an array whose last axes are `out_shape`; `out_sharding` is Flax's."""
        del out_sharding
        y = products.dense_general(self.kernel.get_value(), x, self.axis, self.out_shape)
        return (
            y
            if self.bias is None
            else y + self.bias.get_value()[(None,) * (y.ndim - len(self.out_shape))]
        )
