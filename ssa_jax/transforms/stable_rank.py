"""An optax transformation that truncates spectra once, when their stable ranks have settled."""

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


class StableRankState(NamedTuple):
    """Sticky masks, and the stable ranks that decide when and how much to cut.

    Attributes:
      count: steps done.
      masks: the parameter tree with `Factors(None, mask, None)`, mask (..., r) bool, at every
        `Factors`, and None elsewhere.
      initial_ranks: the same with the rank at init, an int32 scalar.
      initial: the same with the stable rank of the first step, (...,) float32.
      latest: the same with the stable rank of the last look.
      settled: bool scalar, whether the cut was made.
      dropped: like `masks`, the singular values that this step set to zero, and 0 elsewhere.
    """

    count: chex.Array
    masks: Any
    initial_ranks: Any
    initial: Any
    latest: Any
    settled: chex.Array
    dropped: Any


def truncate_stable_rank(
    every: int = 1,
    tolerance: float = 0.05,
    floor: float = 0.3,
    least: int = 1,
    *,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Truncates every `Factors` once, to its scaled stable rank, when these have settled.

    With ρ(s) = Σ s² / max s² the stable rank, r₀ the rank at init and ρ₀ the stable rank in the
    first step, k = ⌈r₀ ρ(s) / ρ₀⌉ of the largest |s| stay, at least ⌈floor r₀⌉ and at most r₀.
    All are cut in the first look at which no ρ differs from that of the look before by more
    than the tolerance, relative to it; never, if they never settle.

    Args:
      every: steps between looks.
      tolerance: largest relative change between two looks of a settled stable rank.
      floor: lowest rank as a fraction of r₀.
      least: no rank goes below this number, or r₀ where that is smaller.
      mask: False at a `Factors` leaves it whole; see `ssa_jax.transforms.selection`.

    Raises:
      ValueError: floor outside [0, 1], `every` or `least` below one; no params at update; a tree
        that does not fit the mask.

    References:
      Wang et al., Cuttlefish: low-rank model training without all the tuning, 2023.

    >>> import jax.numpy as jnp
    >>> f = Factors(jnp.eye(4, 4), jnp.ones(4), jnp.eye(4))
    >>> rule = truncate_stable_rank()
    >>> state, still = rule.init(f), jax.tree.map(jnp.zeros_like, f)
    >>> for s in ([1.0, 1, 1, 1], [1, 0.9, 0.2, 0.1], [1, 0.9, 0.2, 0.1]):
    ...     u, state = rule.update(still, state, f._replace(s=jnp.array(s)))
    >>> print(state.masks.s)
    [ True  True False False]
    """
    if isinstance(floor, int | float) and not 0 <= floor <= 1:
        raise ValueError(f"rank floor must lie in [0, 1], got {floor}")
    check_every(every, "look at the stable rank")
    if isinstance(least, int) and least < 1:
        raise ValueError(f"least rank must be at least 1, got {least}")

    def init(params: optax.Params) -> StableRankState:
        at = at_factors("truncate_stable_rank", params, mask)

        def unknown(f: Factors) -> Array:
            return jnp.zeros(f.s.shape[:-1], jnp.float32)

        return StableRankState(
            count=jnp.zeros([], jnp.int32),
            masks=at(lambda f: spectrum(jnp.ones(f.s.shape, bool))),
            initial_ranks=at(lambda f: jnp.int32(f.s.shape[-1])),
            initial=at(unknown),
            latest=at(unknown),
            settled=jnp.zeros([], bool),
            dropped=at(lambda f: spectrum(jnp.zeros(f.s.shape, f.s.dtype))),
        )

    def update(
        updates: optax.Updates, state: StableRankState, params: optax.Params
    ) -> tuple[optax.Updates, StableRankState]:
        count = optax.safe_increment(state.count)
        first, look = count == 1, count % every == 1 % every
        spectra = map_entries(_spectrum_after, state.masks, updates, params)
        now = map_entries(lambda s: None if s is None else _stable_rank(s), spectra)
        initial = jax.tree.map(lambda old, new: jnp.where(first, new, old), state.initial, now)
        latest = jax.tree.map(lambda old, new: jnp.where(look, new, old), state.latest, now)
        moved = jax.tree.leaves(
            jax.tree.map(lambda a, b: jnp.any(jnp.abs(b - a) > tolerance * a), state.latest, now)
        )
        still = ~jnp.any(jnp.stack(moved)) if moved else jnp.zeros([], bool)
        due = look & ~first & ~state.settled & still

        def new_mask(m: Factors | None, s: Any, r0: Any, rho0: Any, rho: Any) -> Factors | None:
            if m is None:
                return None
            full = r0.astype(jnp.float32)
            k = jnp.maximum(full * rho / rho0, floor * full)
            k = jnp.maximum(jnp.ceil(k - 1e-4), jnp.minimum(least, r0))
            return m._replace(s=jnp.where(due, keep_largest(s, m.s, k), m.s))

        masks = map_entries(new_mask, state.masks, spectra, state.initial_ranks, initial, now)
        dropped = map_entries(dropped_by, masks, state.masks, updates, params)
        cut_updates = map_entries(cut, masks, updates, params)
        settled = state.settled | due
        return cut_updates, StableRankState(
            count, masks, state.initial_ranks, initial, latest, settled, dropped
        )

    return with_params(init, update)


def _spectrum_after(mask: Factors | None, update: Any, params: Any) -> Array | None:
    return None if mask is None else next_spectrum(mask, update, params)


def _stable_rank(s: Array) -> Array:
    return spectra.stable_rank(s).astype(jnp.float32)
