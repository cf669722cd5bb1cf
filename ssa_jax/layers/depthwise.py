"""Depthwise convolution, on a CPU by its taps.

XLA's CPU backend has no fast path for as many groups as channels (RECORDS.md).
"""

import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax

from ssa_jax.factors.linalg import varying_as
from ssa_jax.layers.windows import DIMENSIONS, Pads, Strides

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def depthwise(strides: Strides, pads: Pads, x: Array, kernel: Array) -> Array:
    """y[b,p,q,c] = Σ_ij x[b, p·sh + i - top, q·sw + j - left, c] K[i,j,0,c], zeros around x.

    Differentiable once, in reverse mode; which lowering is chosen with the platform, as in
    `lowering.conv`.

    Args:
      strides: (sh, sw).
      pads: ((top, bottom), (left, right)).
      x: (batch, H, W, C).
      kernel: K (kh, kw, 1, C), of the dtype of x.

    Returns:
      y (batch, H', W', C).
    """
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(by_taps, strides, pads),
        default=functools.partial(by_groups, strides, pads),
    )


def _forwards(
    strides: Strides, pads: Pads, x: Array, kernel: Array
) -> tuple[Array, tuple[Array, Array]]:
    return depthwise(strides, pads, x, kernel), (x, kernel)


def _backwards(
    strides: Strides, pads: Pads, saved: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    def on_cpu(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
        (dx,) = jax.vjp(lambda x: by_taps(strides, pads, x, kernel), x)[1](g)
        return dx, _kernel_gradient(strides, pads, kernel, x, g)

    def elsewhere(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
        return jax.vjp(functools.partial(by_groups, strides, pads), x, kernel)[1](g)

    return lax.platform_dependent(*saved, cotangent, cpu=on_cpu, default=elsewhere)


depthwise.defvjp(_forwards, _backwards)


def by_groups(strides: Strides, pads: Pads, x: Array, kernel: Array) -> Array:
    """The convolution as XLA lowers one of as many groups as channels."""
    return lax.conv_general_dilated(
        x, kernel, strides, pads,
        dimension_numbers=DIMENSIONS, feature_group_count=kernel.shape[-1],
    )  # fmt: skip


def by_taps(strides: Strides, pads: Pads, x: Array, kernel: Array) -> Array:
    """The convolution as a sum of shifted maps, each times a row of the kernel."""
    total = jnp.promote_types(x.dtype, jnp.float32)
    wide = jnp.pad(x.astype(total), [(0, 0), *pads, (0, 0)])
    rows = kernel.astype(total).reshape(-1, 1, 1, 1, kernel.shape[-1])
    shifted = _shifted(strides, kernel.shape[:2], wide)
    return sum(part * row for part, row in zip(shifted, rows, strict=True)).astype(x.dtype)


def _kernel_gradient(strides: Strides, pads: Pads, kernel: Array, x: Array, g: Array) -> Array:
    """dK[i,j,0,c] = Σ_bpq x[b, p·sh + i - top, q·sw + j - left, c] g[b,p,q,c], by example.

    Summed over all examples at once the maps would be read again for every tap; those of one stay
    in the cache.
    """
    wide = jnp.pad(x, [(0, 0), *pads, (0, 0)])
    total = jnp.promote_types(x.dtype, jnp.float32)

    def add(so_far: Array, example: tuple[Array, Array]) -> tuple[Array, None]:
        a, of_y = (e[None].astype(total) for e in example)
        taps = [jnp.sum(part * of_y, (0, 1, 2)) for part in _shifted(strides, kernel.shape[:2], a)]
        return so_far + jnp.stack(taps), None

    start = varying_as(jnp.zeros((kernel.shape[0] * kernel.shape[1], x.shape[-1]), total), wide, g)
    return lax.scan(add, start, (wide, g))[0].reshape(kernel.shape).astype(kernel.dtype)


def _shifted(strides: Strides, size: tuple[int, ...], wide: Array) -> Iterator[Array]:
    """Of every tap the entries of the padded maps that it meets, (batch, H', W', C)."""
    ends = [n - k + 1 for n, k in zip(wide.shape[1:3], size, strict=True)]
    for i, j in itertools.product(*map(range, size)):
        stop = (wide.shape[0], i + ends[0], j + ends[1], wide.shape[3])
        yield lax.slice(wide, (0, i, j, 0), stop, (1, *strides, 1))
