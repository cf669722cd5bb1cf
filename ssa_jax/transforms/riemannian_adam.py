"""Adam whose moments live in the tangent space of the Stiefel manifold."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from ssa_jax.factors import retractions
from ssa_jax.transforms.manifold import choose
from ssa_jax.transforms.mapping import each, is_matrix, map_matrices
from ssa_jax.transforms.optimizers import accumulate
from ssa_jax.transforms.selection import ROWS, Mask, kinds_at_init, kinds_of, with_params

Array = jax.Array
SECOND_MOMENTS = ("elementwise", "column", "matrix")


class RiemannianAdamState(NamedTuple):
    """Moments of the tangent gradient.

    Attributes:
      count: steps done.
      mu: first moment, tangent, shaped like the parameters.
      nu: second moment: elementwise, or with axes of length one where it is shared.
    """

    count: chex.Array
    mu: optax.Updates
    nu: optax.Updates


def _shared_axes(kind: str, second_moment: str) -> tuple[int, ...]:
    """Axes over which entries of one leaf share a second moment."""
    if not is_matrix(kind) or second_moment == "elementwise":
        return ()
    if second_moment == "matrix":
        return (-2, -1)
    return (-1,) if kind == ROWS else (-2,)


def scale_by_riemannian_adam(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    second_moment: str = "elementwise",
    metric: str = "stiefel",
    *,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam whose first moment and update are tangent.

    With ξ = P_x(g): μ <- P_x(b₁ μ + (1 - b₁) ξ), ν <- b₂ ν + (1 - b₂) ⟨ξ²⟩ and the update
    P_x(μ̂ / (√ν̂ + ε)), hats for the usual correction of the bias. The projection P_x at the
    present x carries μ along. ν is a scale, no tangent vector, and is never transported. The mean
    ⟨·⟩ is over nothing, a column, or the whole matrix: one scalar a matrix keeps the direction
    of μ̂, so that the update needs no second projection (and does not depend on a rotation of
    the coordinates); the others are projected again.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: ε.
      second_moment: ``elementwise``, ``column`` (of the tall matrix) or ``matrix``.
      metric: a name in `retractions.PROJECTIONS`.
      mask: which leaves outside `Factors` are orthonormal, (..., n, r) by columns or
        (..., r, n) by rows; see `ssa_jax.transforms.selection`. ν has shape (..., 1, r) or
        (..., r, 1) by column and (..., 1, 1) by matrix.

    Raises:
      ValueError: an unknown metric or second moment; no params at update; a leaf that does
        not fit its label.

    References:
      Bécigneul & Ganea, Riemannian adaptive optimization methods, 2019.
      Li, Li & Todorovic, Efficient Riemannian optimization on the Stiefel manifold via the
      Cayley transform, 2020.

    >>> import jax.numpy as jnp
    >>> x = jnp.eye(3, 2)
    >>> adam = scale_by_riemannian_adam(second_moment="column", mask=True)
    >>> state = adam.init(x)
    >>> state.nu.shape
    (1, 2)
    >>> u, state = adam.update(jnp.ones((3, 2)), state, x)
    >>> print((u**2).round(2))
    [[0. 0.]
     [0. 0.]
     [3. 3.]]
    """
    project = choose(retractions.PROJECTIONS, metric, "metric")
    if second_moment not in SECOND_MOMENTS:
        raise ValueError(
            f"second moment must be one of {', '.join(SECOND_MOMENTS)}, got {second_moment!r}"
        )

    def init(params: optax.Params) -> RiemannianAdamState:
        def second(kind: str, x: Array) -> Array:
            return jnp.mean(
                jnp.zeros_like(x), axis=_shared_axes(kind, second_moment), keepdims=True
            )

        kinds = kinds_at_init("scale_by_riemannian_adam", params, mask)
        nu = jax.tree.map(second, kinds, params)
        return RiemannianAdamState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params), nu)

    def update(
        updates: optax.Updates, state: RiemannianAdamState, params: optax.Params
    ) -> tuple[optax.Updates, RiemannianAdamState]:
        kinds = kinds_of(params, mask)
        count = optax.safe_increment(state.count)
        xi = map_matrices(each(project), kinds, updates, params)
        moved = accumulate(state.mu, b1, xi, 1 - b1)
        mu = map_matrices(each(project), kinds, moved, params)

        def second(kind: str, n: Array, g: Array) -> Array:
            power = jnp.mean(jnp.square(g), axis=_shared_axes(kind, second_moment), keepdims=True)
            return (b2 * n + (1 - b2) * power).astype(n.dtype)

        nu = jax.tree.map(second, kinds, state.nu, xi)
        # The corrections stay outside the moments' dtype: 1 - b2 is lost in bfloat16.
        correct1 = 1 - jnp.asarray(b1, float) ** count
        correct2 = 1 - jnp.asarray(b2, float) ** count

        def scaled(m: Array, n: Array, g: Array) -> Array:
            return (m / correct1 / (jnp.sqrt(n / correct2) + eps)).astype(g.dtype)

        out = jax.tree.map(scaled, mu, nu, updates)
        if second_moment != "matrix":
            out = map_matrices(each(project), kinds, out, params)
        return out, RiemannianAdamState(count, mu, nu)

    return with_params(init, update)
