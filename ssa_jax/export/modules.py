"""The network of an export: ordinary Flax layers in a row.

`nnx.Linear`, `nnx.Conv`, `nnx.LayerNorm` and functions do the work. What Flax has no layer for is
here: a sum of branches, a scale and shift, pooling, a flattening, attention whose maps may be two
layers in a row.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ssa_jax.layers import Pool
from ssa_jax.layers.lowering import conv_general_dilated
from ssa_jax.models.blocks import average
from ssa_jax.models.vit import exact_gelu, first_token, mean_token

Array = jax.Array
Layer = Callable[[Array], Array]


class ExportError(ValueError):
    """A network that cannot be exported, or an export that cannot be read."""


class MaxPool(nnx.Module):
    """Max pooling of (batch, H, W, C); windows that would leave the padded map are left out."""

    def __init__(self, pool: Pool):
        self.pool = pool

    def __call__(self, x: Array) -> Array:
        """Maps (batch, H, W, C) to (batch, ⌊(H + 2 padding - size) / stride⌋ + 1, …, C)."""
        return nnx.max_pool(x, **self.pool.options)


class Affine(nnx.Module):
    """y = x ⊙ a + c per channel: a batch norm that no linear map precedes.

    Args:
      scale: a (features,) float32.
      bias: c (features,) float32.
    """

    def __init__(self, scale: Array, bias: Array):
        self.features = scale.shape[0]
        self.scale = nnx.Param(scale)
        self.bias = nnx.Param(bias)

    def __call__(self, x: Array) -> Array:
        """Maps x (..., features) to the same shape."""
        shape = (1,) * (x.ndim - 1) + (-1,)
        return x * self.scale.get_value().reshape(shape) + self.bias.get_value().reshape(shape)


class Add(nnx.Module):
    """The sum of branches that start from one input; a branch without layers is the identity.

    Args:
      branches: `nnx.Sequential` modules whose outputs have one shape.
    """

    def __init__(self, branches: Sequence[nnx.Sequential]):
        self.branches = nnx.List(branches)

    def __call__(self, x: Array) -> Array:
        """Runs every branch on x and adds up."""
        first, *rest = (branch(x) for branch in self.branches)
        return sum(rest, start=first)


class Attention(nnx.Module):
    """Self-attention of several heads: softmax(q kᵀ / √d) v of each, mapped by the last of `maps`.

    Args:
      heads: divides the width of what the first three maps give.
      maps: `nnx.Sequential` modules of linear layers, for query, key, value and output.
    """

    def __init__(self, heads: int, maps: Sequence[nnx.Sequential]):
        self.heads = heads
        self.maps = nnx.List(maps)

    def __call__(self, x: Array) -> Array:
        """Maps (batch, tokens, features) to (batch, tokens, width of the output)."""
        *inputs, out = self.maps
        q, k, v = (f(x).reshape(*x.shape[:2], self.heads, -1) for f in inputs)
        return out(nnx.dot_product_attention(q, k, v).reshape(*x.shape[:2], -1))


def flatten(x: Array) -> Array:
    """(batch, ...) to (batch, features)."""
    return x.reshape(x.shape[0], -1)


FUNCTIONS: dict[str, Layer] = {
    "flatten": flatten,
    "average": average,
    "relu": nnx.relu,
    "gelu": nnx.gelu,
    "silu": nnx.silu,
    "elu": nnx.elu,
    "leaky_relu": nnx.leaky_relu,
    "softplus": nnx.softplus,
    "sigmoid": nnx.sigmoid,
    "tanh": nnx.tanh,
    "relu6": nnx.relu6,
    "hard_sigmoid": nnx.hard_sigmoid,
    "hard_swish": nnx.hard_swish,
    "exact_gelu": exact_gelu,
    "first_token": first_token,
    "mean_token": mean_token,
}


class InferenceModel(nnx.Module):
    """Layers run one after the other on images of one shape.

    Args:
      input_shape: (H, W, C) of an image.
      layers: modules of this file, `nnx.Linear`, `nnx.Conv` and values of `FUNCTIONS`.
        `nnx.Sequential(*model.layers)` is the same network without the check of the shape.
    """

    def __init__(self, input_shape: Sequence[int], layers: Sequence[Layer]):
        self.input_shape = tuple(input_shape)
        self.layers = nnx.List(layers)

    def __call__(self, x: Array) -> Array:
        """Logits (batch, classes) of normalised images (batch, H, W, C).

        Raises:
          ValueError: images of another shape or of integers.
        """
        if x.shape[1:] != self.input_shape or not jnp.issubdtype(x.dtype, jnp.floating):
            wanted = ", ".join(map(str, self.input_shape))
            raise ValueError(
                f"expected normalised images (batch, {wanted}) of floats, got {x.dtype} of shape "
                f"{tuple(x.shape)}"
            )
        for layer in self.layers:
            x = layer(x)
        return x


def linear(kernel: Array, bias: Array | None) -> nnx.Linear:
    """An `nnx.Linear` of a kernel (d_in, d_out) and a bias (d_out,) or None."""
    d_in, d_out = kernel.shape
    return _filled(
        lambda: nnx.Linear(d_in, d_out, use_bias=bias is not None, rngs=nnx.Rngs(0)), kernel, bias
    )


def conv(kernel: Array, bias: Array | None, **options: Any) -> nnx.Conv:
    """An `nnx.Conv` of a kernel (*size, C / groups, N), a bias (N,) or None, and `conv_options`."""
    *size, c_in, c_out = kernel.shape
    # As JSON has them these are lists, and Flax wants tuples.
    options = {name: _tuples(value) for name, value in options.items()}
    c_in *= options.get("feature_group_count", 1)
    return _filled(
        lambda: nnx.Conv(
            c_in,
            c_out,
            tuple(size),
            use_bias=bias is not None,
            rngs=nnx.Rngs(0),
            conv_general_dilated=conv_general_dilated,
            **options,
        ),
        kernel,
        bias,
    )


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _filled(make: Callable[[], Any], kernel: Array, bias: Array | None) -> Any:
    # Made of shapes alone: drawing weights only to replace them would cost time.
    layer = nnx.eval_shape(make)
    layer.kernel.set_value(kernel)
    if bias is not None:
        layer.bias.set_value(bias)
    return layer


def conv_options(layer: nnx.Conv) -> dict[str, Any]:
    """The options that `conv` takes, as lists, strings and numbers."""
    dims = len(layer.kernel_size)

    def each(value: Any) -> list[int]:
        return [value or 1] * dims if value is None or isinstance(value, int) else list(value)

    padding: Any = layer.padding
    if not isinstance(padding, str):
        sides = [padding] * dims if isinstance(padding, int) else list(padding)
        padding = [[p, p] if isinstance(p, int) else list(p) for p in sides]
    return {
        "strides": each(layer.strides),
        "padding": padding,
        "input_dilation": each(layer.input_dilation),
        "kernel_dilation": each(layer.kernel_dilation),
        "feature_group_count": layer.feature_group_count,
    }
