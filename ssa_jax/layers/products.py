"""What layers on factors compute, as functions of the factors."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssa_jax.factors import Factors, WithFeedback, linalg
from ssa_jax.layers.lowering import DIMENSIONS, conv_general_dilated

Array = jax.Array
Padding = str | int | Sequence[int | tuple[int, int]]


def forward_and_back(
    product: Callable[[Factors, Array], Array],
    weights: Factors | WithFeedback,
    x: Array,
    back: Callable[[WithFeedback, Array, Array], tuple[Any, Array]],
) -> Array:
    """A layer's product with its factors, whose cotangent of x has those of its feedback, if any.

    Args:
      product: of factors with x.
      weights: the layer's.
      x: its input.
      back: (weights, x, cotangent of the product) -> those of what passes and of x.
    """
    if not isinstance(weights, WithFeedback):
        return product(weights, x)

    @jax.custom_vjp
    def apply(given: WithFeedback, x: Array) -> Array:
        return product(given.weights, x)

    def forward(given: WithFeedback, x: Array) -> tuple[Array, Any]:
        return product(given.weights, x), (given, x)

    def backward(saved: Any, cotangent: Array) -> tuple[Any, Array]:
        given, x = saved
        (own,) = jax.vjp(lambda f: product(f, x), given.weights)[1](cotangent)
        of_passed, of_x = back(given, x, cotangent)
        return WithFeedback(own, of_passed), of_x

    apply.defvjp(forward, backward)
    return apply(weights, x)


def passing(given: WithFeedback, inner: Array) -> tuple[Any, Array, Array]:
    """What of a cotangent passes a layer's feedback.

    Args:
      given: weights and what passes.
      inner: δ U (..., r).

    Returns:
      The cotangent of `given.passed`; the coefficients that pass, (..., q); and the columns
      (d_in, q) that they go back through.
    """
    (_, s, v), passed = given
    if passed.ndim == 1:
        columns = v[:, passed] * s[None, passed]
        return np.zeros(passed.shape, jax.dtypes.float0), inner[..., passed], columns
    few = inner @ (s[:, None] * passed)
    # Squares of small signals would vanish, and a factor of the layer's own says nothing.
    all_of_it, peak = linalg.unit_peak(inner.reshape(-1, s.size).astype(jnp.float32) * s[None, :])
    part = few.reshape(-1, passed.shape[1]) / jnp.where(peak > 0, peak, 1).astype(few.dtype)
    moments = all_of_it.T @ part.astype(jnp.float32)
    return moments.astype(passed.dtype), few, v @ passed


def dense(weights: Factors | WithFeedback, x: Array) -> Array:
    """((x V) ⊙ s) Uᵀ for x (..., d_in), u (d_out, r), s (r,), v (d_in, r): (..., d_out)."""
    return forward_and_back(_dense, weights, x, _dense_back)


def dense_general(
    weights: Factors | WithFeedback, x: Array, axis: Sequence[int], out_shape: Sequence[int]
) -> Array:
    """`dense` of some axes of x together, in place of which `out_shape` comes at the end."""
    x = jnp.moveaxis(x, axis, range(-len(axis), 0))
    batch = x.shape[: x.ndim - len(axis)]
    return dense(weights, x.reshape(*batch, -1)).reshape(*batch, *out_shape)


def _dense(weights: Factors, x: Array) -> Array:
    u, s, v = weights
    # s scales what has fewer rows: those of x, all but its last axis, or V.
    if math.prod(x.shape[:-1]) < v.shape[0]:
        return (x @ v * s[(None,) * (x.ndim - 1)]) @ u.T
    return (x @ (v * s[None, :])) @ u.T


def _dense_back(given: WithFeedback, x: Array, cotangent: Array) -> tuple[Any, Array]:
    u, s, v = given.weights
    down = v * s[None, :]
    # The cotangent of x V is that which the gradient of V takes: it is computed but once.
    (inner,) = jax.vjp(lambda m: m @ u.T, x @ down)[1](cotangent)
    of_passed, few, columns = passing(given, inner)
    return of_passed, few @ columns.T


def convolution(
    weights: Factors | WithFeedback, x: Array, kernel_size: tuple[int, int],
    strides: tuple[int, int],
    padding: Padding, dilation: tuple[int, int] = (1, 1), groups: int = 1,
) -> Array:  # fmt: skip
    """A vertical convolution by V diag(s), then a horizontal one by U.

    With groups, every group of inputs goes through the same V, and every group of outputs has its
    own rows of U.

    Args:
      weights: u (kw·N, r), s (r,), v (kh·C/groups, r).
      x: (batch, H, W, C).
      kernel_size: (kh, kw).
      strides: (sh, sw).
      padding: as `split_padding` takes it.
      dilation: of the kernel, (dh, dw).
      groups: of channels.

    Returns:
      (batch, H', W', N).
    """
    (kh, kw), (sh, sw), (dh, dw) = kernel_size, strides, dilation
    pad_h, pad_w = split_padding(padding)
    options: dict[str, Any] = {
        "feature_group_count": groups, "dimension_numbers": DIMENSIONS, "lhs_dilation": None,
    }  # fmt: skip

    def down(v: Array, x: Array) -> Array:
        kernel = v.reshape(kh, 1, v.shape[0] // kh, v.shape[1])
        kernel = jnp.tile(kernel, (1, 1, 1, groups)) if groups > 1 else kernel
        return conv_general_dilated(x, kernel, (sh, 1), pad_h, rhs_dilation=(dh, 1), **options)

    def across(u: Array, y: Array) -> Array:
        kernel = u.reshape(1, kw, u.shape[0] // kw, u.shape[1]).swapaxes(2, 3)
        return conv_general_dilated(y, kernel, (1, sw), pad_w, rhs_dilation=(1, dw), **options)

    def product(f: Factors, x: Array) -> Array:
        dtype = jnp.result_type(x, *f)
        x, u, s, v = (a.astype(dtype) for a in (x, *f))
        return across(u, down(v * s[None, :], x))

    def back(given: WithFeedback, x: Array, cotangent: Array) -> tuple[Any, Array]:
        dtype = jnp.result_type(x, *given.weights)
        f = Factors(*(a.astype(dtype) for a in given.weights))
        # As in `_dense_back`.
        inner_of = jax.vjp(lambda y: across(f.u, y), down(f.v * f.s[None, :], x.astype(dtype)))[1]
        (inner,) = inner_of(cotangent)
        by_group = inner.reshape(*inner.shape[:-1], groups, f.rank)
        of_passed, few, columns = passing(WithFeedback(f, given.passed), by_group)
        thin = jax.vjp(lambda a: down(columns, a), x.astype(dtype))[1]
        of_x = thin(few.reshape(*inner.shape[:-1], -1))[0]
        return of_passed, of_x.astype(x.dtype)

    return forward_and_back(product, weights, x, back)


def split_padding(padding: Padding) -> tuple[Any, Any]:
    """Padding of the vertical and of the horizontal convolution of a pair, as Flax takes it."""
    if isinstance(padding, str):
        if padding.upper() not in ("SAME", "VALID"):
            raise ValueError(f"padding must be SAME, VALID or numbers, got {padding!r}")
        return padding.upper(), padding.upper()
    sides = [(p, p) if isinstance(p, int) else tuple(p) for p in
             ((padding, padding) if isinstance(padding, int) else padding)]  # fmt: skip
    if len(sides) != 2:
        raise ValueError(f"padding needs one entry per spatial dimension, got {padding!r}")
    return [sides[0], (0, 0)], [(0, 0), sides[1]]


def kernel_to_matrix(kernel: Array) -> Array:
    """The matrix K' (kw·N, kh·C) of a kernel K (kh, kw, C, N): K'[(j,n),(i,c)] = K[i,j,c,n]."""
    kh, kw, c, n = kernel.shape
    return kernel.transpose(1, 3, 0, 2).reshape(kw * n, kh * c)


def matrix_to_kernel(matrix: Array, kernel_size: tuple[int, int]) -> Array:
    """The kernel (kh, kw, C, N) of a matrix (kw·N, kh·C); inverse of `kernel_to_matrix`."""
    kh, kw = kernel_size
    n, c = matrix.shape[0] // kw, matrix.shape[1] // kh
    return matrix.reshape(kw, n, kh, c).transpose(2, 0, 3, 1)
