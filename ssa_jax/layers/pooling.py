"""Pooling that is as fast backwards as forwards."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Pool(NamedTuple):
    """Windows of a pooling: their size, the stride between them, the padding of each side."""

    size: int
    stride: int
    padding: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """What Flax's poolings take."""
        return {
            "window_shape": (self.size, self.size),
            "strides": (self.stride, self.stride),
            "padding": ((self.padding, self.padding),) * 2,
        }


def max_pool(x: Array, pool: Pool) -> Array:
    """Max pooling of x (batch, H, W, C); windows that would leave the padded map are left out.

    Written as a fold of selections over the window's entries: the backward pass of
    `lax.reduce_window` is a scatter that costs the CPU several times the convolution before
    it. The gradient goes to the first of equal entries. One predicate serves both branches, so
    exactly one receives it however the compiler fuses (an equality test with the maximum may
    miss both).
    """
    size, stride, padding = pool
    if padding:
        sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))
        x = jnp.pad(x, sides, constant_values=-jnp.inf)
    # From the first window's start to the last one's.
    height, width = ((n - size) // stride * stride + 1 for n in x.shape[1:3])
    best = x[:, 0:height:stride, 0:width:stride]
    for i, j in itertools.product(range(size), range(size)):
        if i or j:
            other = x[:, i : i + height : stride, j : j + width : stride]
            best = jnp.where(best >= other, best, other)
    return best
