"""Optax transformations that keep orthonormal matrices on the Stiefel manifold."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from ssa_jax.factors import retractions
from ssa_jax.transforms.mapping import each, map_matrices
from ssa_jax.transforms.selection import Mask, kinds_at_init, kinds_of, with_params

Array = jax.Array


class RetractState(NamedTuple):
    """Steps done."""

    count: chex.Array


def choose(table: dict[str, Any], name: str, what: str) -> Any:
    """The entry of a table by name.

    Raises:
      ValueError: no such entry; names those there are.
    """
    if name not in table:
        raise ValueError(f"{what} must be one of {', '.join(table)}, got {name!r}")
    return table[name]


def check_every(every: int, what: str) -> None:
    """Raises ValueError unless a period in steps is at least one."""
    if every < 1:
        raise ValueError(f"{what} every must be at least 1, got {every}")


def when_due(count: Array, every: int, due: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    """due() in every k-th step, otherwise() in the others; static when k is one."""
    if every == 1:
        return due()
    return jax.lax.cond(count % every == 0, due, otherwise)


def project_to_tangent(
    metric: str = "stiefel", *, mask: Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    """Projects the updates of orthonormal matrices to the tangent space at the parameters.

    ``stiefel``: ξ = G - X sym(XᵀG), the orthogonal projection to {ξ: Xᵀξ skew};
    ``horizontal``: ξ = G - X(XᵀG), which moves only the span of X; ``none``: G. Apply it
    before an adaptive rescaling, so that its moments see tangent gradients, and once more
    after it, since an elementwise rescaling leaves the tangent space.

    Args:
      metric: a name in `retractions.PROJECTIONS`.
      mask: which leaves outside `Factors` are orthonormal, (..., n, r) by columns or
        (..., r, n) by rows; see `ssa_jax.transforms.selection`.

    Returns:
      A stateless transformation; other leaves pass unchanged.

    Raises:
      ValueError: an unknown metric; no params at update; a leaf that does not fit its label.

    References:
      Edelman, Arias & Smith, The geometry of algorithms with orthogonality constraints, 1998.

    >>> import jax.numpy as jnp
    >>> x = jnp.eye(3, 2)
    >>> tangent = project_to_tangent(mask=True)
    >>> xi, _ = tangent.update(jnp.arange(6.0).reshape(3, 2), tangent.init(x), x)
    >>> print(x.T @ xi)
    [[ 0.  -0.5]
     [ 0.5  0. ]]
    """
    project = choose(retractions.PROJECTIONS, metric, "metric")

    def init(params: optax.Params) -> optax.EmptyState:
        kinds_at_init("project_to_tangent", params, mask)
        return optax.EmptyState()

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params
    ) -> tuple[optax.Updates, optax.EmptyState]:
        return map_matrices(each(project, pad=True), kinds_of(params, mask), updates, params), state

    return with_params(init, update)


def retract(
    method: str = "series", every: int = 1, *, mask: Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    """Rewrites the updates of orthonormal matrices so that they land on the manifold.

    u <- R_x(u) - x, the last link of a chain: `optax.apply_updates` adds x back. R_x(u) is

    ``series``: the polar factor of x + P_x(u) by a fixed number of matrix products, with a u that
    turns the columns by more than about 19 degrees shortened to that;
    ``newton_schulz``: the polar factor of x + u by matrix products in a loop, from any x;
    ``polar``: the same by an eigendecomposition of the Gram matrix;
    ``qr``, ``cholesky_qr2``: the Q factor of x + u, by Householder or by Cholesky;
    ``cayley``: (I - A/2)⁻¹(I + A/2) x with the skew A that u defines;
    ``none``: x + u.

    All agree with x + u to first order in a tangent u, and land for a u of any size. Where
    `every` is above one, more drifts than a series takes back: ``newton_schulz`` stands in for it.

    Args:
      method: a name in `retractions.RETRACTIONS`.
      every: retract in every k-th step only.
      mask: which leaves outside `Factors` are orthonormal, (..., n, r) by columns or
        (..., r, n) by rows; see `ssa_jax.transforms.selection`.

    Raises:
      ValueError: an unknown method, `every` below one; no params at update; a leaf that does not
        fit its label.

    References:
      Absil & Malick, Projection-like retractions on matrix manifolds, 2012.
      Björck & Bowie, An iterative algorithm for computing the best estimate of an orthogonal
      matrix, 1971.
      Wen & Yin, A feasible method for optimization with orthogonality constraints, 2013.

    >>> import jax.numpy as jnp
    >>> import optax
    >>> x = jnp.eye(3, 2)
    >>> landing = retract("qr", mask=True)
    >>> u, state = landing.update(jnp.ones((3, 2)), landing.init(x), x)
    >>> y = optax.apply_updates(x, u)
    >>> bool(jnp.allclose(y.T @ y, jnp.eye(2), atol=1e-6))
    True
    """
    retraction = choose(retractions.RETRACTIONS, method, "retraction method")
    check_every(every, "retract")
    if every > 1 and method == "series":
        retraction = retractions.retract_newton_schulz
    pad = retraction is retractions.retract_series
    landing = each(lambda x, u: retraction(x, u) - x, pad=pad)

    def init(params: optax.Params) -> RetractState:
        kinds_at_init("retract", params, mask)
        return RetractState(jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates, state: RetractState, params: optax.Params
    ) -> tuple[optax.Updates, RetractState]:
        kinds = kinds_of(params, mask)
        count = optax.safe_increment(state.count)

        landed = when_due(
            count, every, lambda: map_matrices(landing, kinds, updates, params), lambda: updates
        )
        return landed, RetractState(count)

    return with_params(init, update)
