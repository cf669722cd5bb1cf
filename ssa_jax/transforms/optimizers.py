"""Momentum and Muon whose momentum lives in the tangent space of the Stiefel manifold.

Their updates are tangent; `retract`, at the end of the chain, makes a step on the manifold of
them. Leaves that are not orthonormal get the ordinary Euclidean rule.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from ssa_jax.factors import linalg, polar, retractions
from ssa_jax.transforms.manifold import choose
from ssa_jax.transforms.mapping import each, map_matrices
from ssa_jax.transforms.selection import Mask, kinds_at_init, kinds_of, with_params

Array = jax.Array


class TraceState(NamedTuple):
    """Steps done and the tangent momentum, shaped like the parameters."""

    count: chex.Array
    trace: optax.Updates


class StiefelMuonState(NamedTuple):
    """Steps done and the tangent momentum, shaped like the parameters."""

    count: chex.Array
    mu: optax.Updates


def accumulate(moment: Any, decay: Any, updates: Any, weight: Any) -> Any:
    """The sum decay · moment + weight · updates in the moment's dtype."""
    return jax.tree.map(lambda m, g: (decay * m + weight * g).astype(m.dtype), moment, updates)


def trace(
    decay: float = 0.9, nesterov: bool = False, metric: str = "stiefel", *, mask: Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    """Momentum in the tangent space, carried from point to point by projection.

    m <- P_x(d m + g), the update is m, or P_x(d m + g) with the new m for Nesterov. P_x is the
    projection to the tangent space at the present x: applied to the old m it is a vector
    transport.

    Args:
      decay: d.
      nesterov: whether to look ahead.
      metric: a name in `retractions.PROJECTIONS`.
      mask: which leaves outside `Factors` are orthonormal, (..., n, r) by columns or
        (..., r, n) by rows; see `ssa_jax.transforms.selection`.

    Raises:
      ValueError: an unknown metric; no params at update; a leaf that does not fit its label.

    References:
      Absil, Mahony & Sepulchre, Optimization algorithms on matrix manifolds, 2008, section 8.1.

    >>> import jax.numpy as jnp
    >>> x = jnp.eye(3, 2)
    >>> momentum = trace(0.9, mask=True)
    >>> m, state = momentum.update(jnp.ones((3, 2)), momentum.init(x), x)
    >>> print(m)
    [[0. 0.]
     [0. 0.]
     [1. 1.]]
    """
    project = choose(retractions.PROJECTIONS, metric, "metric")

    def init(params: optax.Params) -> TraceState:
        kinds_at_init("trace", params, mask)
        return TraceState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params))

    def update(
        updates: optax.Updates, state: TraceState, params: optax.Params
    ) -> tuple[optax.Updates, TraceState]:
        kinds = kinds_of(params, mask)
        m = map_matrices(each(project), kinds, accumulate(state.trace, decay, updates, 1), params)
        out = m
        if nesterov:
            ahead = accumulate(m, decay, updates, 1)
            out = map_matrices(each(project), kinds, ahead, params)
        out = jax.tree.map(lambda o, g: o.astype(g.dtype), out, updates)
        return out, TraceState(optax.safe_increment(state.count), m)

    return with_params(init, update)


def scale_by_stiefel_muon(
    decay: float = 0.95,
    nesterov: bool = True,
    steps: int = 5,
    metric: str = "stiefel",
    *,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon on the tangent space: the orthogonalised momentum, projected to be tangent.

    m <- P_x(d m + g), the update is P_x(msign(m)), with msign(U Σ Vᵀ) ≈ U Vᵀ by Newton-Schulz.
    Since m is tangent and P_x self-adjoint, ⟨P_x(msign(m)), m⟩ = ⟨msign(m), m⟩ = ‖m‖_* up to
    Newton-Schulz: a descent direction. Its singular values are at most about one, so the
    learning rate bounds the angle by which a step turns the columns. Leaves that are not
    orthonormal get plain momentum: put them under another rule with `optax.partition`.

    Args:
      decay: d.
      nesterov: whether to orthogonalise P_x(d m + g) with the new m instead.
      steps: Newton-Schulz iterations.
      metric: a name in `retractions.PROJECTIONS`.
      mask: which leaves outside `Factors` are orthonormal, (..., n, r) by columns or
        (..., r, n) by rows; see `ssa_jax.transforms.selection`.

    Raises:
      ValueError: an unknown metric, `steps` below one; no params at update; a leaf that does
        not fit its label.

    References:
      Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024.
      Bernstein, Modular manifolds, 2025.

    >>> import jax.numpy as jnp
    >>> x = jnp.eye(3, 2)
    >>> muon = scale_by_stiefel_muon(mask=True)
    >>> u, state = muon.update(100 * jnp.eye(3, 2, k=-1), muon.init(x), x)
    >>> bool(jnp.linalg.norm(u, 2) < 1.3)
    True
    """
    project = choose(retractions.PROJECTIONS, metric, "metric")
    if steps < 1:
        raise ValueError(f"muon steps must be at least 1, got {steps}")

    def init(params: optax.Params) -> StiefelMuonState:
        kinds_at_init("scale_by_stiefel_muon", params, mask)
        return StiefelMuonState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params))

    def update(
        updates: optax.Updates, state: StiefelMuonState, params: optax.Params
    ) -> tuple[optax.Updates, StiefelMuonState]:
        kinds = kinds_of(params, mask)

        def tangent(x: Array, m: Array) -> Array:
            # Products of the smallest and sums of the largest entries of float32 are lost.
            unit, peak = linalg.unit_peak(m)
            return project(x, unit) * peak

        mu = map_matrices(each(tangent), kinds, accumulate(state.mu, decay, updates, 1), params)
        ahead = accumulate(mu, decay, updates, 1) if nesterov else mu

        def orthogonalised(x: Array, m: Array) -> Array:
            return project(x, polar.msign(tangent(x, m) if nesterov else m, steps))

        out = map_matrices(each(orthogonalised), kinds, ahead, params)
        out = jax.tree.map(lambda o, g: o.astype(g.dtype), out, updates)
        return out, StiefelMuonState(optax.safe_increment(state.count), mu)

    return with_params(init, update)
