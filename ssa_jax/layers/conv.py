"""Convolutions on factors."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ssa_jax import factors
from ssa_jax.factors import Factors, WithFeedback
from ssa_jax.factors.linalg import devices_that_share, platform_of_trace
from ssa_jax.layers import products
from ssa_jax.layers.dense import check_input, he_normal, init_factors
from ssa_jax.layers.lowering import conv
from ssa_jax.layers.products import Padding, kernel_to_matrix, matrix_to_kernel, split_padding

Array = jax.Array
# How many multiply-accumulates a core of a CPU does while it reads or writes one float32, and an
# accelerator: by their data sheets (`parallel.ahead.RATES`) an H100 295 and a TPU v5e 480.
_CPU, _ACCELERATOR = 30, 300


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2:
        raise ValueError(f"expected one int or two, got {value!r}")
    return pair


class SVDConv(nnx.Module):
    """2-D convolution on factors: a vertical one by V, scaled by s, then a horizontal one by U.

    The kernel K (kh, kw, C, N) in HWIO is the matrix K'[(j,n),(i,c)] = K[i,j,c,n] of shape
    (kw·N, kh·C). V is run as a (kh, 1, C, r) kernel with stride (sh, 1), U as a (1, kw, r, N)
    kernel with stride (1, sw); the bias is added once, after the second. At full rank this is
    the dense convolution. In training, where that takes less work (`kernel_pays`), K is put
    together in every call and run instead, to the same result. With groups K is (kh, kw,
    C/groups, N): every group of inputs goes through the same V (see `products.convolution`).

    Args:
      in_features: C.
      out_features: N.
      kernel_size: (kh, kw).
      rank: initial rank as a fraction of min(kw·N, kh·C), in (0, 1].
      strides: one int or (sh, sw).
      padding: ``"SAME"``, ``"VALID"``, an int, or an int or (low, high) per dimension.
      kernel_dilation: one int or (dh, dw).
      feature_group_count: groups of channels, which divide C and N.
      use_bias: adds b (N,).
      rngs: the key ``params`` draws the He-initialised kernel that is factored once.

    Attributes:
      in_features, out_features: as given; both stay when the rank changes.
      kernel: `nnx.Param` of `Factors` with u (kw·N, r), s (r,), v (kh·C/groups, r).
      bias: `nnx.Param` (N,) or None.
      deterministic: keeps to the pair; `train` and `eval` of a module set it.

    Raises:
      ValueError: rank outside (0, 1], or a kernel size, stride or padding of another form.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        *,
        rank: float = 1.0,
        strides: int | Sequence[int] = 1,
        padding: Padding = "SAME",
        kernel_dilation: int | Sequence[int] = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size = _pair(kernel_size)
        self.strides = _pair(strides)
        split_padding(padding)
        self.padding = padding if isinstance(padding, str | int) else tuple(padding)
        self.kernel_dilation = _pair(kernel_dilation)
        self.feature_group_count = feature_group_count
        if in_features % feature_group_count or out_features % feature_group_count:
            raise ValueError(
                f"{feature_group_count} groups do not divide {in_features} and {out_features} "
                "channels"
            )
        self.deterministic = False
        shape = (*self.kernel_size, in_features // feature_group_count, out_features)
        kernel = he_normal(rngs.params(), shape, jnp.float32)
        self.kernel = nnx.Param(init_factors(kernel_to_matrix(kernel), rank, rngs.params()))
        self.bias = nnx.Param(jnp.zeros(out_features)) if use_bias else None

    def __call__(self, x: Array) -> Array:
        """Maps x (..., H, W, C) to (..., H', W', N), over any batch axes or none.

        Raises:
          ValueError: x has another last axis, or fewer than three.
        """
        check_input(self, x, self.in_features, "(..., H, W, {})")
        *batch, height, width, channels = x.shape
        y = self._convolve(x.reshape(math.prod(batch), height, width, channels))
        return y.reshape(*batch, *y.shape[1:])

    @property
    def is_plain(self) -> bool:
        """Whether it has neither groups nor dilation."""
        return self.feature_group_count == 1 and self.kernel_dilation == (1, 1)

    def _convolve(self, x: Array) -> Array:
        """Maps x (batch, H, W, C) to (batch, H', W', N)."""
        weights = self.kernel.get_value()
        if self._takes_kernel(weights, x):
            y = products.forward_and_back(self._by_kernel, weights, x, self._thin_back)
        else:
            y = self._pair(weights, x)
        if self.bias is not None:
            y = y + self.bias.get_value().reshape(1, 1, 1, -1)
        return y

    def _takes_kernel(self, weights: Factors | WithFeedback, x: Array) -> bool:
        if not self.is_plain or self.deterministic:
            return False
        f = weights.weights if isinstance(weights, WithFeedback) else weights
        return kernel_pays(f, x.shape, self.kernel_size, self.strides)

    def _by_kernel(self, weights: Factors, x: Array) -> Array:
        pad_h, pad_w = split_padding(self.padding)
        kernel = matrix_to_kernel(factors.to_dense(weights), self.kernel_size)
        both = pad_h if isinstance(pad_h, str) else (pad_h[0], pad_w[1])
        return conv(x, kernel, self.strides, both)

    def _thin_back(self, given: WithFeedback, x: Array, cotangent: Array) -> tuple[Any, Array]:
        # Where the layer is one kernel, nothing of its way back is there to be shared.
        thin = factors.narrowed(given)
        of_x = jax.vjp(lambda a: self._pair(thin, a), x)[1](cotangent)[0]
        (own,) = jax.vjp(lambda given: self._pair(given, x), given)[1](cotangent)
        return own.passed, of_x

    def _pair(self, weights: Factors | WithFeedback, x: Array) -> Array:
        return products.convolution(
            weights,
            x,
            self.kernel_size,
            self.strides,
            self.padding,
            self.kernel_dilation,
            self.feature_group_count,
        )


def macs_per_float() -> int:
    """Multiply-accumulates that count as much as an entry read or written, where this will run."""
    return _CPU if platform_of_trace() == "cpu" else _ACCELERATOR


def kernel_pays(
    weights: Factors, shape: Sequence[int], kernel_size: tuple[int, int], strides: tuple[int, int]
) -> bool:
    """Whether an `SVDConv` takes less work by its kernel than by its pair.

    Counted are the output and the gradients of U, s and V, what a local step needs of a layer:
    multiply-accumulates, and `macs_per_float` of them for each entry of a map that is read or
    written. For P output positions of all examples, a = kh·C, b = kw·N and maps of X, M and Y
    entries before, within and after the pair, that is P r (2 sw a + 3 b) products, since the
    first of the two has the width of the input, and 2 X + 5 M + 3 Y entries. The kernel takes
    2 P a b, and 3 r a b for putting it together and taking its gradient apart, and 2 (X + Y)
    entries. With one stride, many positions and channels it pays on a CPU from two fifths of full
    rank where a = b, with few channels from less; on an accelerator at a quarter of full rank up to
    128 channels.

    On a mesh of devices never: what they sum would be the gradients of kernels. Nor in less than
    float32, where rounding K and its gradient turns the gradients of the factors by degrees.

    Args:
      weights: u (b, r), s (r,), v (a, r).
      shape: of the input, (batch, H, W, C).
      kernel_size: (kh, kw).
      strides: (sh, sw).
    """
    if weights.u.dtype != jnp.float32 or devices_that_share() > 1:
        return False
    batch, height, width, _ = shape
    (b, r), a = weights.u.shape, weights.v.shape[0]
    positions = batch * -(-height // strides[0]) * -(-width // strides[1])
    # Of the entries only those that the pair moves more: 2 X + 2 Y are moved by both.
    within, after = positions * strides[1] * r, positions * b // kernel_size[1]
    pair = positions * r * (2 * strides[1] * a + 3 * b) + macs_per_float() * (5 * within + after)
    return 2 * positions * a * b + 3 * r * a * b < pair
