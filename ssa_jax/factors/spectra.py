"""Ranks and sparsity of a spectrum of singular values."""

import jax
import jax.numpy as jnp

from ssa_jax.factors.linalg import unit_peak

Array = jax.Array


def hoyer(s: Array) -> Array:
    """Hoyer ratio ‖s‖₁ / ‖s‖₂ of spectra (..., r), between 1 and √r; 0 for a zero spectrum.

    Its gradient is sign(s)/‖s‖₂ - ‖s‖₁ s/‖s‖₂³ (Yang et al. 2020, eq. 5).
    """
    s, _ = unit_peak(s, -1)
    norm2 = jnp.sum(jnp.square(s), axis=-1)
    safe = jnp.where(norm2 > 0, norm2, 1.0)
    return jnp.where(norm2 > 0, jnp.sum(jnp.abs(s), axis=-1) * jax.lax.rsqrt(safe), 0.0)


def smaller_than(s: Array) -> Array:
    """Which entries follow which in descending order of |s|, ties by index.

    Compared pair by pair: at the ranks of layers as fast as a sort, which takes the compiler a
    second.

    Args:
      s: (..., r).

    Returns:
      (..., r, r) bool; entry (i, j) says that s_j follows s_i.
    """
    size, index = jnp.abs(s), jnp.arange(s.shape[-1])
    one, other = size[..., :, None], size[..., None, :]
    later = jnp.broadcast_to(index[None, :] > index[:, None], one.shape[:-1] + index.shape)
    return (other < one) | ((other == one) & later)


def energy_rank(s: Array, energy: Array | float) -> Array:
    """Smallest k >= 1 whose k largest entries of s (..., r) hold `energy` of Σ s²; int32 (...,)."""
    power = jnp.square(unit_peak(s, -1)[0])
    # What is lost when the entry of this row is the last one kept.
    lost = jnp.sum(jnp.where(smaller_than(s), power[..., None, :], 0), axis=-1)
    too_much = lost > (1 - energy) * jnp.sum(power, axis=-1, keepdims=True)
    k = jnp.minimum(1 + jnp.sum(too_much, axis=-1), s.shape[-1])
    return k.astype(jnp.int32)


def stable_rank(s: Array) -> Array:
    """Σ s² / max s² over the last axis of s (..., r), between 1 and r; 0 of zeros."""
    return jnp.sum(jnp.square(unit_peak(s, -1)[0]), axis=-1)
