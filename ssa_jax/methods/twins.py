"""Twins: parameter trees that stand in for the weights on the error's way down.

A twin has the shapes and ranks of the weights. Every function here is a pure map from trees to
a tree; which of them a method applies, and when, is the method's own affair.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ssa_jax import factors
from ssa_jax.factors import Factors, linalg

Array = jax.Array
Tree = Any


def init_twins(key: Array, params: Tree) -> Tree:
    """Independent random twins of a parameter tree.

    The twin of `Factors` is the truncated SVD, of the same rank, of an independent Gaussian
    matrix, scaled to the Frobenius norm of the weights: for He-initialised weights that is
    He initialisation. A dense kernel gets an independent Gaussian of its own norm. Biases
    and the scales of norms carry no random feedback and are copied.
    """
    flat, tree = jax.tree.flatten(params, is_leaf=factors.is_factors)
    keys = jax.random.split(key, len(flat))
    return jax.tree.unflatten(tree, [_twin(k, x) for k, x in zip(keys, flat, strict=True)])


def _twin(key: Array, weight: Factors | Array) -> Factors | Array:
    if isinstance(weight, Factors):
        key, key_svd = jax.random.split(key)
        w = jax.random.normal(key, (weight.u.shape[0], weight.v.shape[0]), weight.u.dtype)
        twin = factors.from_dense(w, weight.rank, key_svd)
        return twin._replace(s=_scale_to(twin.s, weight.s))
    if weight.ndim > 1:
        return _scale_to(jax.random.normal(key, weight.shape, weight.dtype), weight)
    return jnp.copy(weight)


def _scale_to(x: Array, reference: Array) -> Array:
    x, _ = linalg.unit_peak(x)
    return x * (linalg.norm(reference) / jnp.maximum(jnp.linalg.norm(x), 1))


def meet(twins: Tree, params: Tree, rate: float) -> Tree:
    """One step of the twins' own descent on the alignment term: B - rate · 2 (B - W).

    Moves the `Factors` of the twins; dense kernels, which have no alignment term, follow by
    the same rule so that the whole path meets the weights.
    """
    return jax.tree.map(lambda b, w: b - 2 * rate * (b - w), twins, params)


def accompany(twins: Tree, before: Tree, after: Tree, decay: float) -> Tree:
    """Kolen-Pollack: B + (W' - W) - decay (B - W), so that B' - W' = (1 - decay) (B - W).

    The twins repeat every update of the weights, and the difference decays. Kolen & Pollack
    (1994) let both sides decay to zero; here only their difference does, which is the same
    motion in the frame that shrinks with the weights and leaves the trained objective alone.
    """
    return jax.tree.map(lambda b, w, v: b + (v - w) - decay * (b - w), twins, before, after)


def follow_ranks(twins: Tree, params: Tree) -> Tree:
    """Zeroes every singular value of a twin that truncation has zeroed in the weights."""

    def follow(twin: Factors, weight: Factors) -> Factors:
        return twin._replace(s=jnp.where(weight.s == 0, 0, twin.s))

    return factors.map_factors(follow, twins, params)


def sign_concordant(params: Tree, magnitudes: Tree) -> Tree:
    """B = |M| ⊙ sign(W) for every kernel, scaled to the Frobenius norm of W.

    A factorised layer is two maps after one another; U, s and V each keep their signs.

    Args:
      params: the weights.
      magnitudes: M, a tree of their shapes; ones for uniform magnitudes.
    """

    def concord(path: tuple[Any, ...], weight: Array, magnitude: Array) -> Array:
        is_kernel = weight.ndim > 1 or getattr(path[-1], "name", "") == "s"
        return _scale_to(jnp.abs(magnitude) * jnp.sign(weight), weight) if is_kernel else weight

    return jax.tree_util.tree_map_with_path(concord, params, magnitudes)


def random_magnitudes(key: Array, params: Tree) -> Tree:
    """Independent standard Gaussians of the shapes of a parameter tree."""
    flat, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(flat))
    drawn = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, flat, strict=True)]
    return jax.tree.unflatten(tree, drawn)
