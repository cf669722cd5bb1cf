"""What layers on factors compute, as functions of the factors."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ssa_jax.factors import Factors, WithFeedback
from ssa_jax.layers.lowering import DIMENSIONS, conv_general_dilated

Array = jax.Array
Padding = str | int | Sequence[int | tuple[int, int]]


def forward_and_back(
    product: Callable[[Factors, Array], Array],
    weights: Factors | WithFeedback,
    x: Array,
    back: Callable[[Factors, Array], Array] | None = None,
) -> Array:
    """A layer's product with its factors, whose cotangent of x has those of its feedback, if any.

    What goes back then takes the products of their rank, and none of those of the weights.

    Args:
      product: of factors with x, linear in x.
      weights: the layer's.
      x: its input.
      back: the same map in a form that suits a low rank; the product itself by default.
    """
    if not isinstance(weights, WithFeedback):
        return product(weights, x)
    thin = back or product

    @jax.custom_vjp
    def apply(weights: WithFeedback, x: Array) -> Array:
        return product(weights.forward, x)

    def forward(weights: WithFeedback, x: Array) -> tuple[Array, Any]:
        return product(weights.forward, x), (weights, x)

    def backward(kept: Any, cotangent: Array) -> tuple[WithFeedback, Array]:
        weights, x = kept
        (own,) = jax.vjp(lambda f: product(f, x), weights.forward)[1](cotangent)
        (back,) = jax.vjp(lambda a: thin(weights.backward, a), x)[1](cotangent)
        return WithFeedback(own, jax.tree.map(jnp.zeros_like, weights.backward)), back

    apply.defvjp(forward, backward)
    return apply(weights, x)


def dense(weights: Factors | WithFeedback, x: Array) -> Array:
    """((x V) ⊙ s) Uᵀ for x (..., d_in), u (d_out, r), s (r,), v (d_in, r): (..., d_out)."""
    if isinstance(weights, WithFeedback):
        return forward_and_back(dense, weights, x)
    u, s, v = weights
    # s is folded into V: one pass over the weights instead of one over the batch.
    return (x @ (v * s[None, :])) @ u.T


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
    if isinstance(weights, WithFeedback):

        def product(f: Factors, x: Array) -> Array:
            return convolution(f, x, kernel_size, strides, padding, dilation, groups)

        return forward_and_back(product, weights, x)
    dtype = jnp.result_type(x, *weights)
    x, u, s, v = (a.astype(dtype) for a in (x, *weights))
    (kh, kw), (sh, sw), (dh, dw) = kernel_size, strides, dilation
    pad_h, pad_w = split_padding(padding)
    down = (v * s[None, :]).reshape(kh, 1, -1, s.shape[0])
    across = u.reshape(1, kw, -1, s.shape[0]).swapaxes(2, 3)
    if groups > 1:
        down = jnp.tile(down, (1, 1, 1, groups))
    options: dict[str, Any] = {
        "feature_group_count": groups, "dimension_numbers": DIMENSIONS, "lhs_dilation": None,
    }  # fmt: skip
    y = conv_general_dilated(x, down, (sh, 1), pad_h, rhs_dilation=(dh, 1), **options)
    return conv_general_dilated(y, across, (1, sw), pad_w, rhs_dilation=(1, dw), **options)


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
