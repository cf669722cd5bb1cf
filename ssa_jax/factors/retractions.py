"""Projections to the tangent spaces of the Stiefel manifold, and retractions to it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ssa_jax.factors.linalg import eye_like, gram, mm, sym, unit_peak
from ssa_jax.factors.one_by_one import eigh, inverse_root, qr, solve
from ssa_jax.factors.polar import inverse_root_series, orthonormalize

Array = jax.Array
# 0.24 E⁷ is a rounding error of float32 there.
_SERIES_ENDS = 0.12
# Largest entry of a step; rows of E sum to at most 1e31 times the height of the matrix.
_LARGEST = 1e15


def project_stiefel(x: Array, g: Array) -> Array:
    """Orthogonal projection of g onto the tangent space of St(n, r) at x: G - X sym(XᵀG).

    The whole tangent space in the Euclidean metric: the result ξ has Xᵀξ skew, so it may
    turn X within its own span (Edelman, Arias & Smith 1998, eq. 2.4).

    Args:
      x: (..., n, r), orthonormal columns.
      g: (..., n, r).
    """
    return g - mm(x, sym(mm(x.mT, g)))


def project_horizontal(x: Array, g: Array) -> Array:
    """Projection of g onto the horizontal space at x: (I - X Xᵀ) G, so that Xᵀξ = 0.

    The projection of the SSA paper (arXiv 2510.25594). It moves only the span of X; for a
    square X it is zero.

    Args:
      x: (..., n, r), orthonormal columns.
      g: (..., n, r).
    """
    return g - mm(x, mm(x.mT, g))


def project_none(x: Array, g: Array) -> Array:
    """No projection: returns g."""
    del x
    return g


def _q_factor(y: Array) -> Array:
    """Q of the QR decomposition whose R has a positive diagonal."""
    q, r = qr(y)
    diagonal = jnp.diagonal(r, axis1=-2, axis2=-1)
    return q * jnp.where(diagonal < 0, -1, 1).astype(y.dtype)[..., None, :]


def retract_series(x: Array, xi: Array) -> Array:
    """Polar retraction Y (YᵀY)^(-1/2) of the tangent part of ξ, Y = X + P_x(ξ), by products alone.

    The inverse root is its series in E = I - YᵀY to the sixth order. That leaves 0.24 E⁷, which is
    rounding while no row of E sums to more than `_SERIES_ENDS`; a longer ξ is shortened to that
    bound, a turn of the columns by about 19 degrees. Entries of ξ beyond 1e15, whose squares could
    not be had, count as that. A drift of X from the manifold is taken back.
    Neither loop nor conditional: the same products in every step. Columns of zeros in x and ξ stay
    zeros, as those are that pad a matrix.

    Args:
      x: (..., n, r), orthonormal columns to within `_SERIES_ENDS`.
      xi: (..., n, r), a step of any size.

    References:
      Björck & Bowie, An iterative algorithm for computing the best estimate of an orthogonal
      matrix, 1971: the family of series.
    """
    # The fourth power of an entry may not overflow. A bound that a step of use never meets needs
    # no look at the whole matrix, which the largest entry would.
    xi = project_stiefel(x, jnp.clip(xi, -_LARGEST, _LARGEST))
    g = gram(x + xi)
    # The squared length of an orthonormal column is not zero: where it is, the column is padding.
    e = eye_like(g) * (g != 0) - g
    # YᵀY - I is ξᵀξ, so half of the length leaves a quarter of it.
    share = _SERIES_ENDS / jnp.maximum(_row_sum(e), _SERIES_ENDS)
    y = x + jnp.sqrt(share) * xi
    return y + mm(y, inverse_root_series(share * e))


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
    values, vectors = eigh(gram(y))
    least = jnp.maximum(values[..., -1:] * info.eps, info.tiny)
    root = jax.lax.rsqrt(jnp.maximum(values, least))[..., None, :]
    return orthonormalize(mm(y, mm(vectors * root, vectors.mT)))


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
    once = mm(y, inverse_root(gram(y)))
    g = gram(once)
    twice = mm(once, inverse_root(g))
    near = jnp.max(jnp.sum(jnp.abs(g - eye_like(g)), axis=-1)) < 0.1
    return jax.lax.cond(near, lambda: twice, lambda: _q_factor(y))


def retract_cayley(x: Array, xi: Array) -> Array:
    """Cayley retraction: Y = (I - A/2)⁻¹ (I + A/2) X with A = P ξ Xᵀ - X ξᵀ P, P = I - XXᵀ/2.

    A is skew of rank at most 2r, so the inverse is taken of a (2r, 2r) matrix by the
    Sherman-Morrison-Woodbury formula (Wen & Yin 2013). The transform conserves XᵀX with its
    rounding errors, which would pile up over many steps: an `orthonormalize` removes them.
    """
    p = xi - 0.5 * mm(x, mm(x.mT, xi))
    left = jnp.concatenate([p, x], axis=-1)
    right = jnp.concatenate([x, -p], axis=-1)
    inner = mm(right.mT, left)
    small = eye_like(inner) - 0.5 * inner
    system = jnp.concatenate([small, mm(right.mT, x)], axis=-1)
    return orthonormalize(x + mm(left, solve(system)))


def retract_none(x: Array, xi: Array) -> Array:
    """No retraction: X + ξ."""
    return x + xi


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
