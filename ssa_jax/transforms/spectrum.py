"""An optax transformation that truncates the spectra s of `Factors`, with static shapes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from ssa_jax.factors import Factors, spectra
from ssa_jax.transforms.entries import (
    at_factors,
    cut,
    dropped_by,
    keep_largest,
    map_entries,
    next_spectrum,
    spectrum,
)
from ssa_jax.transforms.manifold import check_every
from ssa_jax.transforms.selection import Mask, with_params

Array = jax.Array
Target = float | Array | Callable[[Array], Any]


class TruncateState(NamedTuple):
    """Sticky masks of the kept singular values.

    Attributes:
      count: steps done.
      masks: the parameter tree with `Factors(None, mask, None)`, mask (..., r) bool, at every
        `Factors`, and None elsewhere.
      initial_ranks: the parameter tree with an int32 scalar, the rank at init, at every
        `Factors`, and None elsewhere.
      dropped: like `masks`, the singular values (..., r) that this step set to zero, and 0 for
        the others; see `restore_dropped`.
    """

    count: chex.Array
    masks: Any
    initial_ranks: Any
    dropped: Any


def _target_at(target: Target, count: Array) -> tuple[Any, Any]:
    """(rank fraction, energy share) that a target asks for after `count` steps."""
    if not callable(target):
        return 1.0, target
    asked = target(count)
    return asked if isinstance(asked, tuple) else (asked, 1.0)


def _ranks_to_keep(s: Array, r0: Array, ask: tuple[Any, Any], floor: float, due: Array) -> Array:
    """How many (...,) of the live spectrum s (..., r) stay; the energy rule counts when due."""
    rank, energy = ask
    full = r0.astype(jnp.float32)
    by_rank = jnp.ceil(rank * full - 1e-4)
    by_energy = jnp.maximum(spectra.energy_rank(s, energy), jnp.ceil(floor * full - 1e-4))
    return jnp.where(due, jnp.minimum(by_rank, by_energy), by_rank)


def truncate_rank(
    target: Target, floor: float = 0.3, every: int = 1, least: int = 1, *, mask: Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    """Zeroes the smallest singular values of every `Factors`, for good, with static shapes.

    With r₀ the rank at init and (ρ, ε) the target, the k largest |s| of those still alive
    stay: k = ⌈ρ r₀⌉ in every step, and in the first step of every period also at most
    max(smallest k with Σ_{j≤k} s_j² >= ε Σ s_j², ⌈floor r₀⌉). A period leaves training the time
    to recover before the energy rule, which empties any spectrum in the end, bites again. The
    update of a dropped value is -s, so `optax.apply_updates` makes it exactly zero; masks
    never grow back. Slicing the zeroes away is left to the caller. `add_hoyer`, earlier in
    the chain, moves energy into the values that stay.

    Args:
      target: ε, a number; or a function of the step count after this step that gives ρ
        or a pair (ρ, ε).
      floor: the energy rule never goes below this fraction of r₀.
      every: period of the energy rule in steps.
      least: no rank goes below this number, or r₀ where that is smaller.
      mask: False at a `Factors` leaves it whole; see `ssa_jax.transforms.selection`.

    Raises:
      ValueError: floor or ε outside [0, 1], `every` or `least` below one; no params at
        update; a tree that does not fit the mask.

    References:
      Yang et al., Learning low-rank deep neural networks via singular vector orthogonality
      regularization and singular value sparsification, 2020.

    >>> import jax.numpy as jnp
    >>> from ssa_jax.factors import Factors
    >>> f = Factors(jnp.eye(4, 3), jnp.array([3.0, 0.1, 2.0]), jnp.eye(3))
    >>> cut = truncate_rank(0.95)
    >>> u, state = cut.update(jax.tree.map(jnp.zeros_like, f), cut.init(f), f)
    >>> print(optax.apply_updates(f, u).s, state.masks.s)
    [3. 0. 2.] [ True False  True]
    """
    for name, value in (("rank floor", floor), ("energy share", target)):
        if isinstance(value, int | float) and not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value}")
    check_every(every, "truncate")
    # Under `optax.inject_hyperparams` it is a traced number.
    if isinstance(least, int) and least < 1:
        raise ValueError(f"least rank must be at least 1, got {least}")

    def init(params: optax.Params) -> TruncateState:
        at = at_factors("truncate_rank", params, mask)
        masks = at(lambda f: spectrum(jnp.ones(f.s.shape, bool)))
        initial = at(lambda f: jnp.int32(f.s.shape[-1]))
        dropped = at(lambda f: spectrum(jnp.zeros(f.s.shape, f.s.dtype)))
        return TruncateState(jnp.zeros([], jnp.int32), masks, initial, dropped)

    def update(
        updates: optax.Updates, state: TruncateState, params: optax.Params
    ) -> tuple[optax.Updates, TruncateState]:
        count = optax.safe_increment(state.count)
        ask = _target_at(target, count)

        def new_mask(m: Factors | None, r0: Any, g: Any, p: Any) -> Factors | None:
            if m is None:
                return None
            s = next_spectrum(m, g, p)
            k = _ranks_to_keep(s, r0, ask, floor, count % every == 1 % every)
            return m._replace(s=keep_largest(s, m.s, jnp.maximum(k, jnp.minimum(least, r0))))

        masks = map_entries(new_mask, state.masks, state.initial_ranks, updates, params)
        dropped = map_entries(dropped_by, masks, state.masks, updates, params)
        cut_updates = map_entries(cut, masks, updates, params)
        return cut_updates, TruncateState(count, masks, state.initial_ranks, dropped)

    return with_params(init, update)
