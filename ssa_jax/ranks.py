"""Rank schedules, and compaction: slicing truncated ranks out of every array.

A schedule says how much rank to keep at a fraction of training; `transforms.truncate_rank`
zeroes the rest inside the step, and `compact` removes the zeroes between epochs.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssa_jax.factors import is_factors, named_leaves

Array = jax.Array
Tree = Any

# The phase of the paper in which the rank falls linearly under the Hoyer term, and what it
# leaves of the initial rank.
LINEAR_PHASE = 0.3
LINEAR_TARGET = 0.7
# From here on ranks rest: at a vanishing learning rate no cut can be mended.
REST_PHASE = 0.8
# Stored ranks are multiples of this, so no rank is truncated below it.
BUCKET = 8


class Target(NamedTuple):
    """What a schedule asks for at one moment.

    Attributes:
      rank: most rank to keep, as a fraction of the initial one.
      energy: share of Σ s² that the energy rule keeps; 1 switches the rule off.
      hoyer: factor of the Hoyer term's coefficient.
    """

    rank: Array
    energy: Array
    hoyer: Array


def _target(rank: Any, energy: Any, hoyer: Any) -> Target:
    return Target(jnp.float32(rank), jnp.float32(energy), jnp.float32(hoyer))


def none(fraction: Array, energy: float) -> Target:
    """Ranks stay."""
    del fraction, energy
    return _target(1, 1, 0)


def linear(fraction: Array, energy: float) -> Target:
    """Falls linearly to 0.7 r₀ over the first 30 % of training and stays."""
    del energy
    done = jnp.clip(fraction / LINEAR_PHASE, 0, 1)
    return _target(1 - (1 - LINEAR_TARGET) * done, 1, 0)


def hybrid(fraction: Array, energy: float) -> Target:
    """`linear` under the Hoyer term for 30 % of training, the energy rule to 80 %, then rest."""
    first = fraction <= LINEAR_PHASE
    cutting = ~first & (fraction <= REST_PHASE)
    ramp = linear(fraction, energy).rank
    return _target(ramp, jnp.where(cutting, energy, 1.0), jnp.where(first, 1.0, 0.0))


SCHEDULES: dict[str, Callable[[Array, float], Target]] = {
    "none": none,
    "linear": linear,
    "hybrid": hybrid,
}


def bucket(rank: int, stored: int) -> int:
    """The rank rounded up to an eighth of what is stored, in multiples of `BUCKET`.

    Every change of a stored rank costs a compilation of the step; eighths bound them to a few
    for each halving.
    """
    width = BUCKET * -(-stored // (8 * BUCKET))
    return min(-(-rank // width) * width, stored)


def selection(params: Tree) -> dict[str, np.ndarray]:
    """Indices to keep of every factorised layer, by its path; empty if none can shrink.

    The non-zero singular values, largest first, filled up with zero ones to the bucket; all, in
    their order, of a layer that cannot shrink.
    """
    chosen, shrinks = {}, False
    for name, f in named_leaves(params).items():
        s = np.abs(np.asarray(f.s))
        keep = bucket(max(1, int(np.count_nonzero(s))), s.size)
        order = np.argsort(-s, kind="stable") if keep < s.size else np.arange(s.size)
        chosen[name] = order[:keep]
        shrinks |= keep < s.size
    return chosen if shrinks else {}


def _take(index: np.ndarray, x: Array) -> Array:
    # A last axis of one is a moment that the whole factor shares. Sliced on the host: on the
    # device every new shape would be compiled for.
    return x if x.shape[-1] == 1 else jnp.asarray(np.asarray(x)[..., index])


def compact(tree: Tree, chosen: dict[str, np.ndarray]) -> Tree:
    """Slices every `Factors` of a tree whose path ends with a chosen layer's path.

    Works alike on parameters, twins, masks and optimiser moments, all of which hold
    `Factors` of the parameters' shapes at paths that end as the parameters' do.

    Args:
      tree: any tree.
      chosen: of `selection`, every layer in it.
    """
    # One layer's path may end with another's: "1/body/0/map/kernel" with "0/map/kernel".
    layers = sorted(chosen, key=len, reverse=True)

    def index_of(path: tuple[Any, ...]) -> np.ndarray | None:
        name = "/" + jax.tree_util.keystr(path, simple=True, separator="/")
        return next((chosen[layer] for layer in layers if name.endswith("/" + layer)), None)

    def slice_node(path: tuple[Any, ...], node: Any) -> Any:
        index = index_of(path) if is_factors(node) else None
        return node if index is None else jax.tree.map(functools.partial(_take, index), node)

    return jax.tree_util.tree_map_with_path(slice_node, tree, is_leaf=is_factors)
