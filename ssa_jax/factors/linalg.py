"""Products, norms and angles of matrices, and how far one is from the Stiefel manifold.

Every function of these modules is pure, works on plain arrays and is safe inside ``jax.jit``
unless it says otherwise. Matrices on the Stiefel manifold St(n, r) are tall: shape (..., n, r),
n >= r, XᵀX = I, with any leading axes of one matrix each, in float32 or float64.
"""

import contextlib
import contextvars
import functools
import math
import operator
from collections.abc import Iterator

import jax
import jax.numpy as jnp

Array = jax.Array

# Accelerators round the factors of a float32 product to fewer bits unless told otherwise.
_PRECISION = jax.lax.Precision.HIGHEST

# Of what is traced for devices that are not here.
_platform: contextvars.ContextVar[str] = contextvars.ContextVar("platform")
# Of what is traced for a mesh, which does not tell where arrays lie on it.
_whole: contextvars.ContextVar[bool] = contextvars.ContextVar("whole", default=False)

# Rows that are added up in one running sum, at most, and partial sums, at least.
_SUMMED_AT_ONCE = 128
_PARTIAL_SUMS = 8
# Columns of Gram matrices that XLA batches on a CPU at no loss.
_BATCHED_ON_CPU = 128


def mm(a: Array, b: Array) -> Array:
    """The product AB at the full precision of its dtype."""
    return jnp.matmul(a, b, precision=_PRECISION)


def gram(x: Array) -> Array:
    """XᵀX of (..., n, r), shape (..., r, r), summed in blocks of rows.

    One running float32 sum of hundreds of squares loses the digit that a retraction needs to land
    within a few 1e-7. All blocks are one batched product, but for wide matrices on a CPU, where XLA
    computes a batch of them far slower than one after the other.
    """
    if x.shape[-2] < _SUMMED_AT_ONCE // 2:
        return mm(x.mT, x)
    # Rows that lie on several devices are summed where they are.
    if x.shape[-1] <= _BATCHED_ON_CPU or devices_that_share() > 1:
        return _gram_at_once(x)
    return jax.lax.platform_dependent(x, cpu=_gram_in_turn, default=_gram_at_once)


def _gram_at_once(x: Array) -> Array:
    """The sum of a batched product."""
    n = x.shape[-2]
    blocks = max(_PARTIAL_SUMS, -(-n // _SUMMED_AT_ONCE))
    size = -(-n // blocks)
    padding = [(0, 0)] * (x.ndim - 2) + [(0, blocks * size - n), (0, 0)]
    y = jnp.pad(x, padding).reshape(*x.shape[:-2], blocks, size, x.shape[-1])
    return jnp.sum(mm(y.mT, y), axis=-3)


def _gram_in_turn(x: Array) -> Array:
    """The sum of products of twice as many rows: so many large matrices take time to add up."""
    starts = range(0, x.shape[-2], 2 * _SUMMED_AT_ONCE)
    blocks = [x[..., i : i + 2 * _SUMMED_AT_ONCE, :] for i in starts]
    return functools.reduce(operator.add, [mm(y.mT, y) for y in blocks])


def eye_like(a: Array) -> Array:
    """Identities (..., r, r) of the shape and dtype of a."""
    return jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)


def devices_that_share() -> int:
    """Devices over which the compiler spreads what is traced here, one without a mesh.

    Those of a `shard_map` do not count: each runs a program of its own.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(n for axis, n in mesh.shape.items() if axis not in mesh.manual_axes)


@contextlib.contextmanager
def traced_for(platform: str) -> Iterator[None]:
    """What is traced within is for a platform, ``"cpu"`` or another, that may not be this one.

    JAX keeps what it has traced, whatever it was for: where the platform changes, all of it goes.
    """
    changes = platform != platform_of_trace()
    token = _platform.set(platform)
    try:
        if changes:
            jax.clear_caches()
        yield
    finally:
        _platform.reset(token)
        if changes:
            jax.clear_caches()


@contextlib.contextmanager
def traced_whole() -> Iterator[None]:
    """What is traced within has factors whole on every device of the mesh.

    Of a program that is traced with and without it, jax keeps the first: runs have their own each.
    """
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)


def are_whole() -> bool:
    """Whether factors are known to lie whole on every device of the mesh, see `traced_whole`."""
    return _whole.get()


def platform_of_trace() -> str:
    """For which platform this is traced: jax's default one, or that of `traced_for`."""
    return _platform.get(None) or jax.default_backend()


def varying_as(x: Array, *like: Array) -> Array:
    """x, of a type that varies over the devices of a `shard_map` as the others do.

    Loops and conditionals ask for values of one type from their start, or from either branch.
    """
    for other in like:
        # The compiler takes the choice away. Of one entry, since a sharded array flat is gathered.
        if other.size:
            x = jnp.where(other[(0,) * other.ndim] == 0, x, x)
    return x


def unit_peak(x: Array, axis: int | tuple[int, ...] | None = None) -> tuple[Array, Array]:
    """An array over its largest entry by modulus, and that with axes kept; zeros stay zeros.

    What does not depend on the scale of x is computed from the first: squares of float32 below
    1e-19 are zero, and above 1e19 infinite. To a derivative the second is a constant.
    """
    peak = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True))
    return x / jnp.where(peak > 0, peak, 1), peak


def norm(x: Array) -> Array:
    """Euclidean norm of all entries, a scalar, wherever it can be represented."""
    scaled, peak = unit_peak(x)
    return jnp.linalg.norm(scaled.ravel()) * jnp.squeeze(peak)


def sym(a: Array) -> Array:
    """Symmetric part (A + Aᵀ) / 2 of (..., r, r)."""
    return (a + a.mT) / 2


def orthogonality_error(x: Array) -> Array:
    """Max |XᵀX - I| over (..., n, r): the distance from the Stiefel manifold, a scalar."""
    g = gram(x)
    return jnp.max(jnp.abs(g - eye_like(g)))


def orthogonality_gradient(x: Array) -> Array:
    """Gradient 4 X(XᵀX - I) of ‖XᵀX - I‖² at (..., n, r)."""
    g = gram(x)
    return 4 * mm(x, g - eye_like(g))


def angle(a: Array, b: Array) -> Array:
    """Angle in degrees between two arrays of one shape, as flat vectors; NaN if one is zero."""
    (a, _), (b, _) = unit_peak(a.ravel()), unit_peak(b.ravel())
    cosine = a @ b / (jnp.linalg.norm(a) * jnp.linalg.norm(b))
    return jnp.degrees(jnp.arccos(jnp.clip(cosine, -1, 1)))


def principal_angles(x: Array, y: Array) -> Array:
    """Principal angles in degrees, ascending, between the spans of two orthonormal bases.

    Args:
      x: (n, p), orthonormal columns.
      y: (n, q), orthonormal columns.

    Returns:
      (min(p, q),): arccos of the singular values of xᵀy (Björck & Golub 1973).
    """
    cosines = jnp.linalg.svd(x.T @ y, compute_uv=False)
    return jnp.degrees(jnp.arccos(jnp.clip(cosines, -1, 1)))
