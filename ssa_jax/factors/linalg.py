"""Array mathematics on factors: projections, retractions, truncated SVD, spectra, angles.

Every function is pure, works on plain arrays and is safe inside ``jax.jit`` unless it says
otherwise. Matrices on the Stiefel manifold St(n, r) are tall: shape (..., n, r), n >= r,
XᵀX = I, with any leading axes of one matrix each, in float32 or float64.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


# Accelerators round the factors of a float32 product to fewer bits unless told otherwise.
_PRECISION = jax.lax.Precision.HIGHEST
# Rows that are added up in one running sum, at most, and partial sums, at least.
_SUMMED_AT_ONCE = 128
_PARTIAL_SUMS = 8
# Each iteration of `orthonormalize` multiplies a small singular value by 2.19, so these span 1e-4
# to one; twice as many as a rounding error of float64 needs may follow.
_COMPLETED_AFTER = 12
_MOST_STEPS = 100
# 0.4 E⁸ is a rounding error of float32 there.
_SERIES_ENDS = 0.15


def _mm(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=_PRECISION)


def gram(x: Array) -> Array:
    """XᵀX of (..., n, r), shape (..., r, r), summed in blocks of rows.

    One running float32 sum of hundreds of squares loses the digit that a retraction needs to land
    within a few 1e-7. All blocks are one batched product.
    """
    n = x.shape[-2]
    if n < _SUMMED_AT_ONCE // 2:
        return _mm(x.mT, x)
    blocks = max(_PARTIAL_SUMS, -(-n // _SUMMED_AT_ONCE))
    size = -(-n // blocks)
    padding = [(0, 0)] * (x.ndim - 2) + [(0, blocks * size - n), (0, 0)]
    y = jnp.pad(x, padding).reshape(*x.shape[:-2], blocks, size, x.shape[-1])
    return jnp.sum(_mm(y.mT, y), axis=-3)


def _eye_like(a: Array) -> Array:
    return jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)


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


def project_stiefel(x: Array, g: Array) -> Array:
    """Orthogonal projection of g onto the tangent space of St(n, r) at x: G - X sym(XᵀG).

    The whole tangent space in the Euclidean metric: the result ξ has Xᵀξ skew, so it may
    turn X within its own span (Edelman, Arias & Smith 1998, eq. 2.4).

    Args:
      x: (..., n, r), orthonormal columns.
      g: (..., n, r).
    """
    return g - _mm(x, sym(_mm(x.mT, g)))


def project_horizontal(x: Array, g: Array) -> Array:
    """Projection of g onto the horizontal space at x: (I - X Xᵀ) G, so that Xᵀξ = 0.

    The projection of the SSA paper (arXiv 2510.25594). It moves only the span of X; for a
    square X it is zero.

    Args:
      x: (..., n, r), orthonormal columns.
      g: (..., n, r).
    """
    return g - _mm(x, _mm(x.mT, g))


def project_none(x: Array, g: Array) -> Array:
    """No projection: returns g."""
    del x
    return g


def _bjorck_bowie(y: Array, g: Array) -> tuple[Array, Array]:
    """One step from y with Gram matrix g, and a bound (...,) of max|YᵀY - I| after it.

    With E = I - G and while the eigenvalues of E lie in [-1, 1], the new residual is
    E² q(E) E² with |q| <= 1: no entry exceeds the largest squared row norm of E².
    """
    eye = _eye_like(g)
    e = eye - g
    e2 = _mm(e, e)
    series = 0.5 * e + _mm(e2, 0.375 * eye + 0.3125 * e)
    return y + _mm(y, series), _largest_row(e2)


def _largest_row(a: Array) -> Array:
    """Largest squared norm of a row of (..., r, r), shape (...,)."""
    return jnp.max(jnp.sum(jnp.square(a), axis=-1), axis=-1)


@jax.custom_jvp
@jax.jit
def orthonormalize(y: Array) -> Array:
    """Polar factor Y (YᵀY)^(-1/2) of (..., n, r), n >= r, by a Newton-Schulz iteration.

    Y <- Y (I + E/2 + 3E²/8 + 5E³/16) with E = I - YᵀY, the fourth-order member of the family
    of Björck & Bowie (1971): as accurate as two classical steps Y (3I - YᵀY)/2 at half of
    their products with the tall matrix. Y is scaled by its entries where they are far from one, and
    by an eigenvalue bound where that is needed for the iteration to converge. One step is enough
    for singular values within about 1 % of one; further ones run only while the bound on what is
    left exceeds rounding. A Y without full rank is completed: its polar factor is that of Y + εI
    with an ε of one rounding error, which what converges in `_COMPLETED_AFTER` steps never sees.

    Differentiable in both modes where Y has full rank (Higham 2008, section 8.2).
    """
    tolerance = jnp.finfo(y.dtype).eps
    eye = jnp.eye(y.shape[-2], y.shape[-1], dtype=y.dtype)
    completion = tolerance * jnp.broadcast_to(eye, y.shape)
    scaled, peak = unit_peak(y, (-2, -1))
    y = jnp.where((peak > 1e3) | (peak < 1e-3), scaled, y)

    def more(carry: tuple[Array, Array, Array]) -> Array:
        count, _, bound = carry
        return (count < _MOST_STEPS) & jnp.any(bound > tolerance)

    def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        count, z, bound = carry
        stuck = (count == _COMPLETED_AFTER) & (bound > tolerance)
        g = gram(z)
        largest = jnp.max(jnp.sum(jnp.abs(g), axis=-1), axis=-1)[..., None, None]
        outside = (largest > 2) | (largest < 0.5)
        scale = jnp.where(outside, jax.lax.rsqrt(jnp.maximum(largest, 1e-12)), 1.0)
        z, bound = _bjorck_bowie(z, g * jnp.square(scale))
        return count + 1, z * scale + stuck[..., None, None] * completion, bound

    # Made of the data, for a loop's values must vary over devices as those it starts from.
    start = (jnp.int32(0), y, peak[..., 0, 0] + jnp.inf)
    return jax.lax.while_loop(more, step, start)[1]


@orthonormalize.defjvp
def _orthonormalize_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """The differential QΩ + (I - QQᵀ) dY P⁻¹ of Q with P = QᵀY and PΩ + ΩP = QᵀdY - dYᵀQ."""
    (y,), (dy,) = primals, tangents
    q = orthonormalize(y)
    values, vectors = _eigh(sym(_mm(q.mT, y)))
    inside = _mm(q.mT, dy)
    turned = _mm(vectors.mT, _mm(inside - inside.mT, vectors))
    turn = turned / (values[..., :, None] + values[..., None, :])
    normal = _mm(_mm(dy - _mm(q, inside), vectors) / values[..., None, :], vectors.mT)
    return q, _mm(q, _mm(vectors, _mm(turn, vectors.mT))) + normal


def _one_by_one(factorise: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """A factorisation of (..., n, r) that takes one matrix after the other on the CPU.

    jaxlib splits a batched LAPACK routine over XLA's thread pool and waits for the parts on one
    of its threads; several at once can occupy every thread, and the program hangs (seen with
    jaxlib 0.10.2 on two CPUs within some hundred calls). Elsewhere the batch stays a batch.
    """

    @jax.custom_batching.custom_vmap
    def single(matrix: Array) -> Any:
        return factorise(matrix)

    @single.def_vmap
    def batched(size: int, is_batched: list[bool], matrices: Array) -> tuple[Any, Any]:
        del size, is_batched
        out = jax.lax.platform_dependent(
            matrices, cpu=functools.partial(jax.lax.map, single), default=jax.vmap(factorise)
        )
        return out, jax.tree.map(lambda _: True, out)

    # A rule of batching has no reverse mode, so a derivative is that of the factorisation itself.
    @jax.custom_jvp
    def differentiable(matrix: Array) -> Any:
        return single(matrix)

    @differentiable.defjvp
    def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Any, Any]:
        return jax.jvp(factorise, primals, tangents)

    def over_leading_axes(matrices: Array) -> Any:
        function: Callable[[Array], Any] = differentiable
        for _ in range(matrices.ndim - 2):
            function = jax.vmap(function)
        return function(matrices)

    return over_leading_axes


_qr = _one_by_one(jnp.linalg.qr)
_eigh = _one_by_one(jnp.linalg.eigh)


@_one_by_one
def _solve(system: Array) -> Array:
    """A⁻¹B (n, m) of the system [A B] (n, n + m)."""
    n = system.shape[0]
    return jnp.linalg.solve(system[:, :n], system[:, n:])


@_one_by_one
def _inverse_root(g: Array) -> Array:
    """L⁻ᵀ (r, r) of the Cholesky factorisation G = LLᵀ."""
    lower = jnp.linalg.cholesky(g)
    return jax.scipy.linalg.solve_triangular(lower, _eye_like(g), lower=True).mT


def _q_factor(y: Array) -> Array:
    """Q of the QR decomposition whose R has a positive diagonal."""
    q, r = _qr(y)
    diagonal = jnp.diagonal(r, axis1=-2, axis2=-1)
    return q * jnp.where(diagonal < 0, -1, 1).astype(y.dtype)[..., None, :]


def retract_series(x: Array, xi: Array) -> Array:
    """Polar retraction Y (YᵀY)^(-1/2) of the tangent part of ξ, Y = X + P_x(ξ), by products alone.

    The inverse root is its series in E = I - YᵀY to the seventh order. That leaves 0.4 E⁸, which is
    rounding while no row of E sums to more than `_SERIES_ENDS`; a longer ξ is shortened to that
    bound, a turn of the columns by about 20 degrees. A drift of X from the manifold is taken back.
    Neither loop nor conditional: the same products in every step.

    Args:
      x: (..., n, r), orthonormal columns to within `_SERIES_ENDS`.
      xi: (..., n, r), a step of any size.

    References:
      Björck & Bowie, An iterative algorithm for computing the best estimate of an orthogonal
      matrix, 1971: the family of series.
    """
    y, e = series_start(x, xi)
    return series_end(y, inverse_root_series(e))


def series_start(x: Array, xi: Array) -> tuple[Array, Array]:
    """Y = X + P_x(ξ), shortened, and E = I - YᵀY (..., r, r) of `retract_series`."""
    # No step with an entry above one stays as long as it is, and its square may not overflow.
    xi = xi / jnp.maximum(1, jnp.max(jnp.abs(xi), axis=(-2, -1), keepdims=True))
    xi = project_stiefel(x, xi)
    g = gram(x + xi)
    e = _eye_like(g) - g
    # YᵀY - I is ξᵀξ, so half of the length leaves a quarter of it.
    share = _SERIES_ENDS / jnp.maximum(_row_sum(e), _SERIES_ENDS)
    return x + jnp.sqrt(share) * xi, share * e


def inverse_root_series(e: Array) -> Array:
    """(I - E)^(-1/2) - I of symmetric (..., r, r), to the seventh order of E, by four products."""
    e2 = _mm(e, e)
    e3 = _mm(e2, e)
    low = 1 / 2 * e + 3 / 8 * e2 + 5 / 16 * e3
    high = 35 / 128 * _eye_like(e) + 63 / 256 * e + 231 / 1024 * e2 + 429 / 2048 * e3
    return low + _mm(_mm(e2, e2), high)


def series_end(y: Array, root: Array) -> Array:
    """Y (I + root), of which `retract_series` returns that."""
    return y + _mm(y, root)


def _row_sum(a: Array) -> Array:
    """Largest sum of moduli of a row of (..., r, r), a bound on its norm, shape (..., 1, 1)."""
    return jnp.max(jnp.sum(jnp.abs(a), axis=-1), axis=-1)[..., None, None]


def retract_newton_schulz(x: Array, xi: Array) -> Array:
    """Polar retraction by matrix products alone: `orthonormalize` of X + ξ, in a loop.

    Args:
      x: (..., n, r), of any entries.
      xi: (..., n, r), a step of any size.
    """
    return orthonormalize(x + xi)


def retract_polar(x: Array, xi: Array) -> Array:
    """Polar retraction (X + ξ)(I + ξᵀξ)^(-1/2) by the eigenvalues of the Gram matrix.

    The nearest orthonormal matrix to X + ξ (Absil & Malick 2012). An `orthonormalize` after
    it removes what a large condition number leaves.
    """
    y, _ = unit_peak(x + xi, (-2, -1))
    info = jnp.finfo(y.dtype)
    values, vectors = _eigh(gram(y))
    least = jnp.maximum(values[..., -1:] * info.eps, info.tiny)
    root = jax.lax.rsqrt(jnp.maximum(values, least))[..., None, :]
    return orthonormalize(_mm(y, _mm(vectors * root, vectors.mT)))


def retract_qr(x: Array, xi: Array) -> Array:
    """QR retraction: the Q factor of X + ξ with the signs that make diag(R) positive."""
    return _q_factor(x + xi)


@jax.jit
def retract_cholesky_qr2(x: Array, xi: Array) -> Array:
    """QR retraction by Cholesky factors of the Gram matrix, applied twice (Fukaya et al. 2014).

    Equals `retract_qr` to rounding while the condition number of X + ξ stays below about
    1e3 in float32. Beyond it the first pass fails or leaves a matrix far from orthonormal;
    the Gram matrix of the second pass shows that, and Householder QR takes over.
    """
    y = x + xi
    once = _mm(y, _inverse_root(gram(y)))
    g = gram(once)
    twice = _mm(once, _inverse_root(g))
    near = jnp.max(jnp.sum(jnp.abs(g - _eye_like(g)), axis=-1)) < 0.1
    return jax.lax.cond(near, lambda: twice, lambda: _q_factor(y))


def retract_cayley(x: Array, xi: Array) -> Array:
    """Cayley retraction: Y = (I - A/2)⁻¹ (I + A/2) X with A = P ξ Xᵀ - X ξᵀ P, P = I - XXᵀ/2.

    A is skew of rank at most 2r, so the inverse is taken of a (2r, 2r) matrix by the
    Sherman-Morrison-Woodbury formula (Wen & Yin 2013). The transform conserves XᵀX with its
    rounding errors, which would pile up over many steps: an `orthonormalize` removes them.
    """
    p = xi - 0.5 * _mm(x, _mm(x.mT, xi))
    left = jnp.concatenate([p, x], axis=-1)
    right = jnp.concatenate([x, -p], axis=-1)
    inner = _mm(right.mT, left)
    small = _eye_like(inner) - 0.5 * inner
    system = jnp.concatenate([small, _mm(right.mT, x)], axis=-1)
    return orthonormalize(x + _mm(left, _solve(system)))


def retract_none(x: Array, xi: Array) -> Array:
    """No retraction: X + ξ."""
    return x + xi


def msign(m: Array, steps: int = 5) -> Array:
    """Approximate orthogonal factor of (..., n, r): singular values pulled towards one.

    Quintic Newton-Schulz iteration of Muon (Jordan et al. 2024): five steps take every
    singular value above about 1e-3 of the Frobenius norm into [0.7, 1.2]; zero stays zero,
    unlike in `orthonormalize`. The scale of m does not matter.
    """
    m, _ = unit_peak(m, (-2, -1))
    m = m / jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(m), axis=(-2, -1), keepdims=True)), 1)
    for _ in range(steps):
        g = gram(m)
        m = 3.4445 * m + _mm(m, -4.7750 * g + 2.0315 * _mm(g, g))
    return m


PROJECTIONS: dict[str, Callable[[Array, Array], Array]] = {
    "stiefel": project_stiefel,
    "horizontal": project_horizontal,
    "none": project_none,
}

RETRACTIONS: dict[str, Callable[[Array, Array], Array]] = {
    "series": retract_series,
    "newton_schulz": retract_newton_schulz,
    "cholesky_qr2": retract_cholesky_qr2,
    "qr": retract_qr,
    "polar": retract_polar,
    "cayley": retract_cayley,
    "none": retract_none,
}

# Above this many entries `truncated_svd` uses the randomised range finder.
EXACT_SVD_LIMIT = 512 * 512


def randomized_svd(
    w: Array, rank: int, key: Array, *, oversampling: int = 10, power_iterations: int = 2
) -> tuple[Array, Array, Array]:
    """Randomised truncated SVD (Halko, Martinsson & Tropp 2011, algorithms 4.4 and 5.1).

    Args:
      w: (m, n) float.
      rank: number of singular triplets, 1 <= rank <= min(m, n).
      key: PRNG key of the Gaussian test matrix.
      oversampling: extra columns of the test matrix.
      power_iterations: subspace iterations, each with a QR on both sides.

    Returns:
      u (m, rank), s (rank,) descending, v (n, rank) with w ≈ u diag(s) vᵀ.
    """
    width = min(rank + oversampling, min(w.shape))
    q = jnp.linalg.qr(w @ jax.random.normal(key, (w.shape[1], width), w.dtype))[0]
    for _ in range(power_iterations):
        q = jnp.linalg.qr(w @ jnp.linalg.qr(w.T @ q)[0])[0]
    u, s, vt = jnp.linalg.svd(q.T @ w, full_matrices=False)
    return q @ u[:, :rank], s[:rank], vt[:rank].T


def truncated_svd(w: Array, rank: int, key: Array | None = None) -> tuple[Array, Array, Array]:
    """Leading singular triplets of w: exact for small matrices, randomised for large ones.

    Args:
      w: (m, n) float.
      rank: 1 <= rank <= min(m, n).
      key: PRNG key, needed above `EXACT_SVD_LIMIT` entries when rank < min(m, n).

    Returns:
      u (m, rank), s (rank,) descending, v (n, rank).

    Raises:
      ValueError: w is no matrix, the rank does not fit, or a needed key is missing.
    """
    if w.ndim != 2 or not 1 <= rank <= min(w.shape):
        raise ValueError(f"rank {rank} does not fit a matrix of shape {w.shape}")
    if w.size > EXACT_SVD_LIMIT and rank < min(w.shape):
        if key is None:
            raise ValueError(f"a matrix of shape {w.shape} needs a PRNG key for its SVD")
        return randomized_svd(w, rank, key)
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank].T


def hoyer(s: Array) -> Array:
    """Hoyer ratio ‖s‖₁ / ‖s‖₂ of spectra (..., r), between 1 and √r; 0 for a zero spectrum.

    Its gradient is sign(s)/‖s‖₂ - ‖s‖₁ s/‖s‖₂³ (Yang et al. 2020, eq. 5).
    """
    s, _ = unit_peak(s, -1)
    norm2 = jnp.sum(jnp.square(s), axis=-1)
    safe = jnp.where(norm2 > 0, norm2, 1.0)
    return jnp.where(norm2 > 0, jnp.sum(jnp.abs(s), axis=-1) * jax.lax.rsqrt(safe), 0.0)


def smaller_than(s: Array) -> Array:
    """Which entries follow which in descending order of |s|, ties by index.

    Compared pair by pair: at the ranks of layers as fast as a sort, which takes the compiler a
    second.

    Args:
      s: (..., r).

    Returns:
      (..., r, r) bool; entry (i, j) says that s_j follows s_i.
    """
    size, index = jnp.abs(s), jnp.arange(s.shape[-1])
    one, other = size[..., :, None], size[..., None, :]
    later = jnp.broadcast_to(index[None, :] > index[:, None], one.shape[:-1] + index.shape)
    return (other < one) | ((other == one) & later)


def energy_rank(s: Array, energy: Array | float) -> Array:
    """Smallest k >= 1 whose k largest entries of s (..., r) hold `energy` of Σ s²; int32 (...,)."""
    power = jnp.square(unit_peak(s, -1)[0])
    # What is lost when the entry of this row is the last one kept.
    lost = jnp.sum(jnp.where(smaller_than(s), power[..., None, :], 0), axis=-1)
    too_much = lost > (1 - energy) * jnp.sum(power, axis=-1, keepdims=True)
    k = jnp.minimum(1 + jnp.sum(too_much, axis=-1), s.shape[-1])
    return k.astype(jnp.int32)


def stable_rank(s: Array) -> Array:
    """Σ s² / max s² over the last axis of s (..., r), between 1 and r; 0 of zeros."""
    return jnp.sum(jnp.square(unit_peak(s, -1)[0]), axis=-1)


def orthogonality_error(x: Array) -> Array:
    """Max |XᵀX - I| over (..., n, r): the distance from the Stiefel manifold, a scalar."""
    g = gram(x)
    return jnp.max(jnp.abs(g - _eye_like(g)))


def orthogonality_gradient(x: Array) -> Array:
    """Gradient 4 X(XᵀX - I) of ‖XᵀX - I‖² at (..., n, r)."""
    g = gram(x)
    return 4 * _mm(x, g - _eye_like(g))


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
