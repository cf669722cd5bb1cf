"""Feedback: twins of the weights, the paths that carry the error, and how twins move.

A *twin* is a parameter tree of the shapes and ranks of the weights. A *path* D_i of shape
(classes, *shape of h_i) turns the output error into the teaching signal δ_i = e · D_i.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ssa_jax import factors
from ssa_jax.factors import Factors
from ssa_jax.forward import Tape
from ssa_jax.units import Unit

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
    return x * (jnp.linalg.norm(reference) / jnp.linalg.norm(x))


def composed_paths(
    units: Sequence[Unit], twins: Tree, mstate: Tree, shapes: Sequence[tuple[int, ...]]
) -> tuple[Array, ...]:
    """D_i for every hidden unit: the identity pushed down the twins' linear network.

    D_{n-1} = I (classes, classes) at the logits, and D_i is the vjp of unit i+1's linear path
    at D_{i+1}: one batch of `classes` rows goes down the network once a refresh.

    Args:
      units: n units.
      twins: parameter trees in place of the weights.
      mstate: model state; norms enter by scale over their running deviation.
      shapes: output shape of each unit for one example, the last one (classes,).

    Returns:
      n - 1 arrays (classes, *shapes[i]).
    """
    classes = shapes[-1][0]
    path = jnp.eye(classes, dtype=jnp.float32)
    paths: list[Array] = []
    for i in range(len(units) - 1, 0, -1):

        def linear(x: Array, i: int = i) -> Array:
            return units[i].linear(twins[i], mstate[i], x)

        _, pullback = jax.vjp(linear, jnp.zeros((classes, *shapes[i - 1]), jnp.float32))
        (path,) = pullback(path)
        paths.insert(0, path)
    return tuple(paths)


def random_paths(
    key: Array, shapes: Sequence[tuple[int, ...]], ranks: Sequence[int | None]
) -> tuple[Array, ...]:
    """Fixed random R_i for every hidden unit, Gaussian with variance 1/classes.

    Args:
      key: PRNG key.
      shapes: output shape of each unit, the last one (classes,).
      ranks: rank of R_i as a (classes, size) matrix in SVD form, or None for a full one.

    Returns:
      n - 1 arrays (classes, *shapes[i]).
    """
    classes = shapes[-1][0]
    paths = []
    for k, shape, rank in zip(jax.random.split(key, len(shapes)), shapes[:-1], ranks, strict=False):
        k, k_svd = jax.random.split(k)
        path = jax.random.normal(k, (classes, math.prod(shape))) / jnp.sqrt(classes)
        if rank is not None and rank < min(path.shape):
            path = factors.to_dense(factors.from_dense(path, rank, k_svd))
        paths.append(path.reshape(classes, *shape))
    return tuple(paths)


def send(error: Array, paths: Sequence[Array]) -> tuple[Array, ...]:
    """Teaching signals δ_i = e · D_i, and e itself for the last unit.

    Args:
      error: e (batch, classes).
      paths: n - 1 arrays (classes, *shape of h_i).

    Returns:
      n arrays (batch, *shape of h_i).
    """
    return (*(jnp.tensordot(error, path, 1) for path in paths), error)


def walk(
    units: Sequence[Unit], params: Tree, twins: Tree, tape: Tape, error: Array
) -> tuple[Array, ...]:
    """Sequential feedback: the error walks down through twins and true local derivatives.

    δ_{i-1} = (∂h_i/∂x_i with the twins' maps in place of the weights')ᵀ δ_i. With twins equal
    to the weights this is backpropagation.
    """
    signals = [error]
    for i in range(len(units) - 1, 0, -1):

        def walk_unit(x: Array, i: int = i) -> Array:
            return units[i].walk(params[i], twins[i], tape.mstate[i], x)

        _, pullback = jax.vjp(walk_unit, tape.inputs[i])
        signals.insert(0, pullback(signals[0])[0])
    return tuple(signals)


def meet(twins: Tree, params: Tree, rate: float) -> Tree:
    """One step of the twins' own descent on the alignment term: B - rate · 2 (B - W).

    Moves the `Factors` of the twins; dense kernels, which have no alignment term, follow by
    the same rule so that the whole path meets the weights.
    """
    return jax.tree.map(lambda b, w: b - 2 * rate * (b - w), twins, params)
