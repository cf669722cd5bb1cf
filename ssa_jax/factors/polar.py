"""The polar factor of a matrix, its nearest orthonormal one, by products alone."""

import jax
import jax.numpy as jnp

from ssa_jax.factors.linalg import eye_like, gram, mm, platform_of_trace, sym, unit_peak
from ssa_jax.factors.one_by_one import eigh

Array = jax.Array
# Each iteration of `orthonormalize` multiplies a small singular value by 2.19, so these span 1e-4
# to one; twice as many as a rounding error of float64 needs may follow.
_COMPLETED_AFTER = 12
_MOST_STEPS = 100


def _bjorck_bowie(y: Array, g: Array) -> tuple[Array, Array]:
    """One step from y with Gram matrix g, and a bound (...,) of max|YᵀY - I| after it.

    With E = I - G and while the eigenvalues of E lie in [-1, 1], the new residual is
    E² q(E) E² with |q| <= 1: no entry exceeds the largest squared row norm of E².
    """
    eye = eye_like(g)
    e = eye - g
    e2 = mm(e, e)
    series = 0.5 * e + mm(e2, 0.375 * eye + 0.3125 * e)
    return y + mm(y, series), _largest_row(e2)


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
    values, vectors = eigh(sym(mm(q.mT, y)))
    inside = mm(q.mT, dy)
    turned = mm(vectors.mT, mm(inside - inside.mT, vectors))
    turn = turned / (values[..., :, None] + values[..., None, :])
    normal = mm(mm(dy - mm(q, inside), vectors) / values[..., None, :], vectors.mT)
    return q, mm(q, mm(vectors, mm(turn, vectors.mT))) + normal


def inverse_root_series(e: Array) -> Array:
    """(I - E)^(-1/2) - I of symmetric (..., r, r), to the sixth order of E, by three products."""
    e2 = mm(e, e)
    if platform_of_trace() == "cpu":
        # Horner's rule, which single steps and several in one program round alike here.
        high = 35 / 128 * e2 + mm(e2, 63 / 256 * e + 231 / 1024 * e2)
        return 1 / 2 * e + 3 / 8 * e2 + mm(e2, 5 / 16 * e + high)
    # Sums of three terms each are a kernel less.
    e3 = mm(e2, e)
    low = 1 / 2 * e + 3 / 8 * e2 + 5 / 16 * e3
    return low + mm(e3, 35 / 128 * e + 63 / 256 * e2 + 231 / 1024 * e3)


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
        m = 3.4445 * m + mm(m, -4.7750 * g + 2.0315 * mm(g, g))
    return m
