"""Array mathematics on factors: projections, retractions, truncated SVD, spectra, angles.

Every function is pure, works on plain arrays and is safe inside ``jax.jit`` unless it says
otherwise. Matrices on the Stiefel manifold St(n, r) are tall: shape (n, r), n >= r, XᵀX = I.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array


def sym(a: Array) -> Array:
    """Symmetric part (A + Aᵀ) / 2 of a square matrix (r, r)."""
    return (a + a.T) / 2


def skew(a: Array) -> Array:
    """Skew-symmetric part (A - Aᵀ) / 2 of a square matrix (r, r)."""
    return (a - a.T) / 2


def project_stiefel(x: Array, g: Array) -> Array:
    """Orthogonal projection of g onto the tangent space of St(n, r) at x: G - X sym(XᵀG).

    The whole tangent space in the Euclidean metric: the result ξ has Xᵀξ skew, so it may
    turn X within its own span (Edelman, Arias & Smith 1998, eq. 2.4).

    Args:
      x: (n, r), orthonormal columns.
      g: (n, r).
    """
    return g - x @ sym(x.T @ g)


def project_horizontal(x: Array, g: Array) -> Array:
    """Projection of g onto the horizontal space at x: (I - X Xᵀ) G, so that Xᵀξ = 0.

    The projection of the SSA paper (arXiv 2510.25594). It moves only the span of X; for a
    square X it is zero.

    Args:
      x: (n, r), orthonormal columns.
      g: (n, r).
    """
    return g - x @ (x.T @ g)


def project_none(x: Array, g: Array) -> Array:
    """No projection: returns g."""
    del x
    return g


def retract_newton_schulz(x: Array, xi: Array, steps: int = 2) -> Array:
    """Newton-Schulz iteration towards the polar factor of X + ξ: Y <- Y (3I - YᵀY) / 2.

    Matrix products only. Converges quadratically when every singular value lies in
    (0, √3). For a tangent ξ, (X + ξ)ᵀ(X + ξ) = I + ξᵀξ, so dividing first by
    √(1 + ‖ξ‖_F²) (an upper bound of the largest singular value) when ‖ξ‖_F > 1/2 keeps the
    iteration inside its basin for any step; the number of steps then grows with the step
    only through the next calls.

    Args:
      x: (n, r), orthonormal columns.
      xi: (n, r), a small step.
      steps: number of iterations.
    """
    y = x + xi
    norm2 = jnp.sum(jnp.square(xi))
    y = y * jnp.where(norm2 > 0.25, jax.lax.rsqrt(1 + norm2), 1.0)
    eye = jnp.eye(x.shape[1], dtype=x.dtype)
    for _ in range(steps):
        y = y @ (1.5 * eye - 0.5 * (y.T @ y))
    return y


def retract_qr(x: Array, xi: Array) -> Array:
    """QR retraction: the Q factor of X + ξ with the signs that make diag(R) positive."""
    q, r = jnp.linalg.qr(x + xi)
    sign = jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0).astype(x.dtype)
    return q * sign[None, :]


def _cholesky_qr(y: Array) -> Array:
    lower = jnp.linalg.cholesky(y.T @ y)
    return jax.scipy.linalg.solve_triangular(lower, y.T, lower=True).T


def retract_cholesky_qr2(x: Array, xi: Array) -> Array:
    """QR retraction by Cholesky factors of the Gram matrix, applied twice (Fukaya et al. 2014).

    Equals `retract_qr` to rounding while the condition number of X + ξ stays below about
    1e3 in float32; beyond it the Cholesky factor does not exist and the result is NaN.
    """
    return _cholesky_qr(_cholesky_qr(x + xi))


def retract_cayley(x: Array, xi: Array) -> Array:
    """Cayley retraction: Y = (I - A/2)⁻¹ (I + A/2) X with A = P ξ Xᵀ - X ξᵀ P, P = I - XXᵀ/2.

    A is skew of rank at most 2r, so the inverse is taken of a (2r, 2r) matrix by the
    Sherman-Morrison-Woodbury formula (Wen & Yin 2013).
    """
    p = xi - 0.5 * x @ (x.T @ xi)
    left = jnp.concatenate([p, x], axis=1)
    right = jnp.concatenate([x, -p], axis=1)
    small = jnp.eye(left.shape[1], dtype=x.dtype) - 0.5 * right.T @ left
    return x + left @ jnp.linalg.solve(small, right.T @ x)


def retract_none(x: Array, xi: Array) -> Array:
    """No retraction: X + ξ."""
    return x + xi


PROJECTIONS: dict[str, Callable[[Array, Array], Array]] = {
    "stiefel": project_stiefel,
    "horizontal": project_horizontal,
    "none": project_none,
}

RETRACTIONS: dict[str, Callable[[Array, Array], Array]] = {
    "newton_schulz": retract_newton_schulz,
    "cholesky_qr2": retract_cholesky_qr2,
    "qr": retract_qr,
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
    """Hoyer ratio ‖s‖₁ / ‖s‖₂ of a spectrum (r,), between 1 and √r; 0 for a zero spectrum.

    Its gradient is sign(s)/‖s‖₂ - ‖s‖₁ s/‖s‖₂³ (Yang et al. 2020, eq. 5).
    """
    norm2 = jnp.sum(jnp.square(s))
    safe = jnp.where(norm2 > 0, norm2, 1.0)
    return jnp.where(norm2 > 0, jnp.sum(jnp.abs(s)) * jax.lax.rsqrt(safe), 0.0)


def smaller_than(s: Array) -> Array:
    """Which entries come after which in descending order of |s|, ties by index: (r, r) bool.

    Entry (i, j) says that s_j comes after s_i. Compared pair by pair: at the ranks of layers as
    fast as a sort, which takes the compiler a second.
    """
    power, index = jnp.abs(s), jnp.arange(s.size)
    return (power[None, :] < power[:, None]) | (
        (power[None, :] == power[:, None]) & (index[None, :] > index[:, None])
    )


def energy_rank(s: Array, energy: Array | float) -> Array:
    """Smallest k whose k largest entries hold the share `energy` of Σ s²; int32 scalar, >= 1."""
    power = jnp.square(s)
    # What is lost when the entry of this row is the last one kept.
    lost = jnp.sum(jnp.where(smaller_than(s), power[None, :], 0), axis=1)
    too_much = lost > (1 - energy) * jnp.sum(power)
    return jnp.minimum(1 + jnp.sum(too_much), s.size).astype(jnp.int32)


def orthogonality_error(x: Array) -> Array:
    """Max |XᵀX - I| of a matrix (n, r): the distance from the Stiefel manifold, a scalar."""
    return jnp.max(jnp.abs(x.T @ x - jnp.eye(x.shape[1], dtype=x.dtype)))


def angle(a: Array, b: Array) -> Array:
    """Angle in degrees between two arrays of one shape, as flat vectors; NaN if one is zero."""
    a, b = a.ravel(), b.ravel()
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
