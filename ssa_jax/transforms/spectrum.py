"""Optax transformations on the spectra s of `Factors`: Hoyer sparsity and rank truncation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from ssa_jax import linalg
from ssa_jax.factors import Factors, is_factors, map_factors

Array = jax.Array
ScalarOrSchedule = float | Callable[[Array], Array]


class HoyerState(NamedTuple):
    """Steps done."""

    count: chex.Array


class TruncateState(NamedTuple):
    """Sticky masks of the kept singular values.

    Attributes:
      count: steps done.
      masks: the parameter tree with `Factors(None, mask, None)`, mask (r,) bool, at every
        `Factors`, and None elsewhere.
      initial_ranks: a list of int32 scalars, the rank at init of every `Factors`.
    """

    count: chex.Array
    masks: Any
    initial_ranks: Any


def add_hoyer(weight: ScalarOrSchedule) -> optax.GradientTransformation:
    """Adds w ∇(‖s‖₁/‖s‖₂) to the gradient of every spectrum (Yang et al. 2020).

    Args:
      weight: w, a number or a function of the step count.
    """

    def init(params: optax.Params) -> HoyerState:
        del params
        return HoyerState(jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates, state: HoyerState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, HoyerState]:
        if params is None:
            raise ValueError(optax.NO_PARAMS_MSG)
        w = weight(state.count) if callable(weight) else weight

        def one(g: Factors, p: Factors) -> Factors:
            return g._replace(s=g.s + jnp.asarray(w * jax.grad(linalg.hoyer)(p.s), g.s.dtype))

        return map_factors(one, updates, params), HoyerState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def _is_mask(node: Any) -> bool:
    return node is None or is_factors(node)


def keep_largest(s: Array, mask: Array, k: Array) -> Array:
    """Mask (r,) of the k largest |s| among those `mask` keeps; ties go to the first."""
    # The dropped ones are zero and come last, so that they never displace a kept one.
    larger = jnp.sum(linalg.smaller_than(jnp.where(mask, s, 0)), axis=0)
    return mask & (larger < k)


def truncate_rank(
    target: Callable[[Array], tuple[Array, Array]],
    floor: float = 0.3,
    every: int = 1,
    least: int = 1,
) -> optax.GradientTransformation:
    """Zeroes the smallest singular values, for good, with static shapes.

    With r₀ the rank at init and (ρ, ε) = target(step), the k largest |s| of those still alive
    stay: k = ⌈ρ r₀⌉ in every step, and in the first step of every period also at most
    max(smallest k with Σ_{j≤k} s_j² ≥ ε Σ s_j², ⌈floor r₀⌉). A period leaves training the time
    to recover before the energy rule, which empties any spectrum in the end, bites again. The
    update of a dropped value is -s, so `optax.apply_updates` makes it exactly zero; masks
    never grow back. Slicing the zeroes away is left to the caller.

    Args:
      target: step count after this step -> (rank as a fraction of r₀, energy share).
      floor: the energy rule never goes below this fraction of r₀.
      every: period of the energy rule in steps.
      least: no rank goes below this number, or r₀ where that is smaller.

    Raises:
      ValueError: floor outside [0, 1], `every` below one; or no params at update.
    """
    if not 0 <= floor <= 1:
        raise ValueError(f"rank floor must lie in [0, 1], got {floor}")
    if every < 1:
        raise ValueError(f"truncate every must be at least 1, got {every}")

    def init(params: optax.Params) -> TruncateState:
        masks = jax.tree.map(
            lambda p: Factors(None, jnp.ones(p.s.shape, bool), None) if is_factors(p) else None,  # type: ignore[arg-type]
            params,
            is_leaf=is_factors,
        )
        initial = [
            jnp.int32(p.s.shape[0])
            for p in jax.tree.leaves(params, is_leaf=is_factors)
            if is_factors(p)
        ]
        return TruncateState(jnp.zeros([], jnp.int32), masks, initial)

    def update(
        updates: optax.Updates, state: TruncateState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, TruncateState]:
        if params is None:
            raise ValueError(optax.NO_PARAMS_MSG)
        count = optax.safe_increment(state.count)
        rank, energy = target(count)
        initial = iter(state.initial_ranks)

        def new_mask(mask: Factors | None, g: Any, p: Any) -> Factors | None:
            if mask is None:
                return None
            r0 = next(initial).astype(jnp.float32)
            s = jnp.where(mask.s, p.s + g.s, 0)
            k = jnp.ceil(rank * r0 - 1e-4)
            lowest = jnp.maximum(linalg.energy_rank(s, energy), jnp.ceil(floor * r0))
            k = jnp.where(count % every == 1 % every, jnp.minimum(k, lowest), k)
            return mask._replace(s=keep_largest(s, mask.s, jnp.maximum(k, jnp.minimum(least, r0))))

        def cut(mask: Factors | None, g: Any, p: Any) -> Any:
            return g if mask is None else g._replace(s=jnp.where(mask.s, g.s, -p.s))

        masks = jax.tree.map(new_mask, state.masks, updates, params, is_leaf=_is_mask)
        cut_updates = jax.tree.map(cut, masks, updates, params, is_leaf=_is_mask)
        return cut_updates, TruncateState(count, masks, state.initial_ranks)

    return optax.GradientTransformation(init, update)
