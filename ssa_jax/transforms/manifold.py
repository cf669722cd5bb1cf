"""Optax transformations that keep the U and V of `Factors` on the Stiefel manifold."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from ssa_jax import linalg
from ssa_jax.factors import Factors, map_factors


class RetractState(NamedTuple):
    """Steps done."""

    count: chex.Array


def _choose(table: dict[str, Any], name: str, what: str) -> Any:
    if name not in table:
        raise ValueError(f"{what} must be one of {', '.join(table)}, got {name!r}")
    return table[name]


def project_to_tangent(projection: str = "stiefel") -> optax.GradientTransformation:
    """Projects the updates of U and V to the tangent space at the parameters.

    ``stiefel``: G - U sym(UᵀG); ``horizontal``: G - U(UᵀG); ``none``: G. Applied once before
    an adaptive rescaling, which leaves the tangent space, and once after it.

    Args:
      projection: a name in `linalg.PROJECTIONS`.

    Returns:
      A stateless transformation; leaves outside `Factors` pass unchanged.

    Raises:
      ValueError: an unknown projection; or no params at update.
    """
    project = _choose(linalg.PROJECTIONS, projection, "projection")

    def one(g: Factors, w: Factors) -> Factors:
        return Factors(project(w.u, g.u), g.s, project(w.v, g.v))

    def update(updates: optax.Updates, params: optax.Params | None = None) -> optax.Updates:
        if params is None:
            raise ValueError(optax.NO_PARAMS_MSG)
        return map_factors(one, updates, params)

    return optax.stateless(update)


def retract(retraction: str = "newton_schulz", every: int = 1) -> optax.GradientTransformation:
    """Rewrites the updates of U and V to R(x + u) - x, so that they land on the manifold.

    The last link of a chain: `optax.apply_updates` then adds the difference back.

    Args:
      retraction: a name in `linalg.RETRACTIONS`.
      every: retract in every k-th step only.

    Raises:
      ValueError: an unknown retraction, `every` below one; or no params at update.
    """
    retraction_fn = _choose(linalg.RETRACTIONS, retraction, "retraction")
    if every < 1:
        raise ValueError(f"retract every must be at least 1, got {every}")

    def init(params: optax.Params) -> RetractState:
        del params
        return RetractState(jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates, state: RetractState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, RetractState]:
        if params is None:
            raise ValueError(optax.NO_PARAMS_MSG)
        count = optax.safe_increment(state.count)

        def one(g: Factors, w: Factors) -> Factors:
            return Factors(retraction_fn(w.u, g.u) - w.u, g.s, retraction_fn(w.v, g.v) - w.v)

        if every == 1:
            return map_factors(one, updates, params), RetractState(count)
        due = count % every == 0
        landed = jax.lax.cond(due, lambda: map_factors(one, updates, params), lambda: updates)
        return landed, RetractState(count)

    return optax.GradientTransformation(init, update)
