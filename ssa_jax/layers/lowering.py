"""Convolution with the lowering that suits the platform: XLA's own, and on a CPU its weak spots.

XLA's CPU backend is slow at two things, which the matrix products here replace: the gradient
with respect to the kernel, and maps of fewer positions than the kernel has taps.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ssa_jax.factors.linalg import devices_that_share, varying_as
from ssa_jax.layers.depthwise import depthwise
from ssa_jax.layers.windows import DIMENSIONS, Pads, Strides, reverse_windows, windows_of

Array = jax.Array
# Windows of the kernel gradient that are unfolded at a time stay in the cache.
_CHUNK_BYTES = 4 * 2**20


def conv(
    x: Array, kernel: Array, strides: Sequence[int], padding: str | Sequence[tuple[int, int]]
) -> Array:
    """y[b,p,q,n] = Σ_ijc x[b, p·sh + i - top, q·sw + j - left, c] K[i,j,c,n], zeros around x.

    `lax.conv_general_dilated`, and on the CPU the same sums in another order (see `_unfolds` and
    `_kernel_gradient`). Differentiable once, in reverse mode.

    The platform is chosen when the program is lowered (`lax.platform_dependent`) and not when it
    is traced, so that one traced or exported program is right for every platform.

    Args:
      x: (batch, H, W, C).
      kernel: K (kh, kw, C, N).
      strides: (sh, sw).
      padding: ``"SAME"``, ``"VALID"``, or (low, high) of each spatial dimension.

    Returns:
      y (batch, H', W', N) of the dtype that x and K promote to.

    Raises:
      ValueError: another padding, or arrays that do not fit.
    """
    dtype = jnp.result_type(x, kernel)
    whole = _strides_and_pads(x, kernel, strides, padding)
    return _conv(*whole, x.astype(dtype), kernel.astype(dtype))


def conv_general_dilated(
    lhs: Array, rhs: Array, window_strides: Sequence[int], padding: Any, **options: Any
) -> Array:
    """`lax.conv_general_dilated` by `conv` or `depthwise` where these cover it.

    What `nnx.Conv` takes. Dilations, other groups and axes, a precision and another dtype go to
    lax, and on a mesh all groups, whose kernel gradient goes through the batch.
    """
    rest = {name: value for name, value in options.items() if not _is_default(name, value)}
    if lhs.ndim == 4 and lhs.dtype == rhs.dtype:
        if not rest:
            return conv(lhs, rhs, window_strides, padding)
        channels = {"feature_group_count": lhs.shape[-1]}
        if rest == channels and rhs.shape[-1] == lhs.shape[-1] and devices_that_share() == 1:
            strides, pads = _strides_and_pads(lhs, rhs, window_strides, padding)
            return depthwise(strides, pads, lhs, rhs)
    return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)


def _strides_and_pads(
    x: Array, kernel: Array, strides: Sequence[int], padding: str | Sequence[tuple[int, int]]
) -> tuple[Strides, Pads]:
    sh, sw = strides
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], (sh, sw), padding)
    (top, bottom), (left, right) = padding
    return (sh, sw), ((top, bottom), (left, right))


def _is_default(name: str, value: Any) -> bool:
    if name == "dimension_numbers":
        spec = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
        return value in (DIMENSIONS, spec)
    if name in ("lhs_dilation", "rhs_dilation"):
        return value is None or set(value) == {1}
    return value is None or (name.endswith("group_count") and value == 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _conv(strides: Strides, pads: Pads, x: Array, kernel: Array) -> Array:
    whole = functools.partial(by_xla, strides, pads)
    if not _unfolds(x.shape, kernel.shape):
        return whole(x, kernel)
    return lax.platform_dependent(
        x, kernel, cpu=functools.partial(product, strides, pads), default=whole
    )


def _forwards(
    strides: Strides, pads: Pads, x: Array, kernel: Array
) -> tuple[Array, tuple[Array, Array]]:
    # The windows are unfolded again on the way back: kept, they would take kh·kw times x.
    return _conv(strides, pads, x, kernel), (x, kernel)


def _backwards(
    strides: Strides, pads: Pads, saved: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    def on_cpu(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
        if _unfolds(g.shape, kernel.shape):
            dx = _spread(strides, pads, x.shape, kernel, g)
        else:
            dx = jax.vjp(lambda x: by_xla(strides, pads, x, kernel), x)[1](g)[0]
        return dx, _kernel_gradient_on_mesh(strides, pads, kernel.shape, x, g)

    def elsewhere(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
        return jax.vjp(functools.partial(by_xla, strides, pads), x, kernel)[1](g)

    return lax.platform_dependent(*saved, cotangent, cpu=on_cpu, default=elsewhere)


_conv.defvjp(_forwards, _backwards)


def by_xla(strides: Strides, pads: Pads, x: Array, kernel: Array) -> Array:
    """The convolution as XLA lowers it."""
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=DIMENSIONS)


def _unfolds(maps: tuple[int, ...], kernel: tuple[int, ...]) -> bool:
    """Whether a kernel (kh, kw, ..) has more taps than maps (batch, H, W, ..) have positions.

    XLA then takes the kernel for the map and the map for the kernel, and the CPU backend has no
    fast path for what results: a 3x3 convolution of 512 channels on 2x2 maps takes about a
    hundred times as long there as a product. For a 3x1 kernel, which has fewer taps than such
    maps have positions, a product wins nothing (RECORDS.md).
    """
    return math.prod(kernel[:2]) > math.prod(maps[1:3])


def product(strides: Strides, pads: Pads, x: Array, kernel: Array) -> Array:
    """The convolution as one matrix product of the windows of x with the kernel."""
    windows = windows_of(strides, pads, kernel.shape, x)
    return _dot(windows, kernel.reshape(-1, kernel.shape[-1]))


def _spread(strides: Strides, pads: Pads, shape: tuple[int, ...], kernel: Array, g: Array) -> Array:
    """The gradient with respect to x, as one matrix product of the windows of g."""
    windows = reverse_windows(strides, pads, kernel.shape, shape, g)
    return _dot(windows, kernel.swapaxes(2, 3).reshape(-1, kernel.shape[2]))


def _dot(x: Array, matrix: Array) -> Array:
    return lax.dot_general(x, matrix, (((x.ndim - 1,), (0,)), ((), ())))


def _kernel_gradient_on_mesh(
    strides: Strides, pads: Pads, shape: tuple[int, ...], x: Array, g: Array
) -> Array:
    """`_kernel_gradient` of the rows of every device of the active mesh, summed over them.

    Without that the parts of the batch would not be those that a device has, and devices would
    send each other all of x and g.
    """
    gradient = functools.partial(_kernel_gradient, strides, pads, shape)
    devices = devices_that_share()
    if devices < 2 or x.shape[0] % devices:
        return gradient(x, g)
    of_each = (a.reshape(devices, -1, *a.shape[1:]) for a in (x, g))
    return jax.vmap(gradient)(*of_each).sum(0)


def _kernel_gradient(
    strides: Strides, pads: Pads, shape: tuple[int, ...], x: Array, g: Array
) -> Array:
    """dK[i,j,c,n] = Σ_bpq x[b, p·sh + i - top, q·sw + j - left, c] g[b,p,q,n], as products.

    Either the windows of x meet g, or x the windows of g. The second product is mostly the faster
    one unless its windows are clearly larger, as they are at stride two. The windows are unfolded a
    part of the batch at a time, which takes both less memory and less time than the whole: the
    kernel gradient of 3x3, 64 channels on 32x32 at batch 128 is 5.6 times as fast as XLA's in 15 %
    of its memory, and of the whole products none is a quarter faster than XLA (RECORDS.md).
    """
    windows_of_x = math.prod(g.shape[1:3]) * math.prod(shape[:3])
    windows_of_g = math.prod(x.shape[1:3]) * math.prod(shape[:2]) * shape[3]
    of_x = 3 * windows_of_x < 2 * windows_of_g
    example = (windows_of_x if of_x else windows_of_g) * x.dtype.itemsize
    gradient = functools.partial(gradient_from_x if of_x else gradient_from_g, strides, pads, shape)
    # Every part reads and writes the whole sum, so the parts should not be smaller than it. Of
    # parts of one example XLA transposes all before the loop: as much memory again as x or g.
    limit = max(_CHUNK_BYTES, 2 * 4 * math.prod(shape), 2 * example)
    parts = _parts(x.shape[0], example, limit)
    if parts == 1:
        return gradient(x, g).astype(x.dtype)
    split = tuple(a.reshape(parts, -1, *a.shape[1:]) for a in (x, g))

    def add(total: Array, part: tuple[Array, ...]) -> tuple[Array, None]:
        return total + gradient(*part), None

    start = varying_as(jnp.zeros(shape, _sum_dtype(x)), *split)
    return lax.scan(add, start, split)[0].astype(x.dtype)


def _parts(batch: int, example: int, limit: int) -> int:
    """The fewest equal parts of a batch whose examples take at most `limit` bytes a part."""
    fits = (n for n in range(1, batch) if batch % n == 0 and batch // n * example <= limit)
    return next(fits, max(batch, 1))


def gradient_from_x(
    strides: Strides, pads: Pads, shape: tuple[int, ...], x: Array, g: Array
) -> Array:
    """The kernel gradient, of `_sum_dtype`, as the product of the windows of x with g."""
    return _outer(windows_of(strides, pads, shape, x, g.shape[1:3]), g).reshape(shape)


def gradient_from_g(
    strides: Strides, pads: Pads, shape: tuple[int, ...], x: Array, g: Array
) -> Array:
    """The kernel gradient, of `_sum_dtype`, as the product of x with the windows of g."""
    kh, kw, c, n = shape
    windows = reverse_windows(strides, pads, shape, x.shape, g)
    return _outer(x, windows).reshape(c, kh, kw, n).transpose(1, 2, 0, 3)


def _outer(x: Array, y: Array) -> Array:
    """Σ over batch and positions of x yᵀ, of `_sum_dtype`."""
    x, y = (a.reshape(-1, a.shape[-1]) for a in (x, y))
    return lax.dot_general(x, y, (((0,), (0,)), ((), ())), preferred_element_type=_sum_dtype(x))


def _sum_dtype(x: Array) -> Any:
    """The dtype of sums over a batch: that of x, at least float32."""
    return jnp.promote_types(x.dtype, jnp.float32)
