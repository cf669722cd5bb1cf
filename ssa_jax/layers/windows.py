"""Windows of maps, unfolded side by side: convolutions and their gradients as matrix products."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
Pads = tuple[tuple[int, int], tuple[int, int]]
Strides = tuple[int, int]
DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def windows_of(
    strides: Strides, pads: Pads, kernel: tuple[int, ...], x: Array,
    out: tuple[int, ...] | None = None,
) -> Array:  # fmt: skip
    """What each position of the output sees: (batch, H', W', kh·kw·C) of x (batch, H, W, C)."""
    size = kernel[:2]
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (*pads[0], 0), (*pads[1], 0), (0, 0, 0)))
    out = out or tuple(
        (n - k) // s + 1 for n, k, s in zip(x.shape[1:3], size, strides, strict=True)
    )
    ends = [(n - 1) * s + 1 for n, s in zip(out, strides, strict=True)]
    return _side_by_side(
        x[:, i : i + ends[0] : strides[0], j : j + ends[1] : strides[1]]
        for i, j in itertools.product(range(size[0]), range(size[1]))
    )


def reverse_windows(
    strides: Strides, pads: Pads, kernel: tuple[int, ...], shape: tuple[int, ...], g: Array
) -> Array:
    """Which outputs each position of the input reached: (batch, H, W, kh·kw·N) of g."""
    padding = [(0, 0, 0)]
    for n, m, k, s, (low, _) in zip(
        shape[1:3], g.shape[1:3], kernel[:2], strides, pads, strict=True
    ):
        before = k - 1 - low
        # Negative where outputs saw padding alone: these are cut off.
        after = n + k - 1 - before - ((m - 1) * s + 1)
        padding.append((before, after, s - 1))
    g = lax.pad(g, jnp.zeros((), g.dtype), (*padding, (0, 0, 0)))
    kh, kw = kernel[:2]
    return _side_by_side(
        g[:, kh - 1 - i : kh - 1 - i + shape[1], kw - 1 - j : kw - 1 - j + shape[2]]
        for i, j in itertools.product(range(kh), range(kw))
    )


def _side_by_side(arrays: Any) -> Array:
    return jnp.concatenate(list(arrays), axis=-1)
