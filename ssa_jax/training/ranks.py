"""Rank schedules, and compaction: slicing truncated ranks out of every array.

A schedule says how much rank to keep at a fraction of training; the transforms that `optim` puts
behind it zero the rest inside the step, and `compact` removes the zeroes between epochs.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssa_jax.factors import PAYS, bucket, is_factors, named_leaves, path_name

Array = jax.Array
Tree = Any

# The phase of the paper in which the rank falls linearly under the Hoyer term, and what it
# leaves of the initial rank unless a run says otherwise.
LINEAR_PHASE = 0.3
LINEAR_TARGET = 0.7
# From here on ranks rest: at a vanishing learning rate no cut can be mended.
REST_PHASE = 0.8
# The learning rate's warm-up, before which the energy rule alone does not cut: random spectra
# say nothing.
WARM_UP = 0.05
# Where the budget of adaptive ranks falls, as in AdaLoRA: after the first gradients, and early
# enough for what is left to recover.
ANNEAL_START, ANNEAL_END = 0.1, 0.6
# No rank is truncated below it: the smallest that saves anything where it is stored.
LEAST = 8


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


def none(fraction: Array, energy: float, final: float = LINEAR_TARGET) -> Target:
    """Ranks stay, or a rule of its own moves them (`stable_rank`, `adaptive`)."""
    del fraction, energy, final
    return _target(1, 1, 0)


def linear(fraction: Array, energy: float, final: float = LINEAR_TARGET) -> Target:
    """Falls linearly to final r₀ over the first 30 % of training and stays."""
    del energy
    done = jnp.clip(fraction / LINEAR_PHASE, 0, 1)
    return _target(1 - (1 - final) * done, 1, 0)


def hoyer(fraction: Array, energy: float, final: float = LINEAR_TARGET) -> Target:
    """Ranks stay under the Hoyer term for 30 % of training, the energy rule to 80 %, then rest.

    `hybrid` without its linear fall: sparsity alone decides what the energy rule finds.
    """
    del final
    first = fraction <= LINEAR_PHASE
    cutting = ~first & (fraction <= REST_PHASE)
    return _target(1, jnp.where(cutting, energy, 1.0), jnp.where(first, 1.0, 0.0))


def hybrid(fraction: Array, energy: float, final: float = LINEAR_TARGET) -> Target:
    """`linear` under the Hoyer term for 30 % of training, the energy rule to 80 %, then rest."""
    return hoyer(fraction, energy)._replace(rank=linear(fraction, energy, final).rank)


def energy_alone(fraction: Array, energy: float, final: float = LINEAR_TARGET) -> Target:
    """The energy rule from the end of the warm-up to 80 % of training, then rest."""
    del final
    cutting = (fraction > WARM_UP) & (fraction <= REST_PHASE)
    return _target(1, jnp.where(cutting, energy, 1.0), 0)


# Those whose factor of the Hoyer term is always zero.
WITHOUT_HOYER = (none, linear, energy_alone)

# `stable_rank` and `adaptive` ask `truncate_rank` for nothing: `optim.RULES` has their rules.
SCHEDULES: dict[str, Callable[..., Target]] = {
    "none": none,
    "linear": linear,
    "hybrid": hybrid,
    "hoyer": hoyer,
    "energy": energy_alone,
    "stable_rank": none,
    "adaptive": none,
}


def annealed(fraction: Array) -> Array:
    """Share of the way from the final budget up to the first: 1, then a cubic fall to 0.

    Source: Zhang et al., AdaLoRA, 2023, eq. 12.
    """
    done = jnp.clip((fraction - ANNEAL_START) / (ANNEAL_END - ANNEAL_START), 0, 1)
    return (1 - done) ** 3


def lowest(fraction: float, rank: int) -> int:
    """⌈fraction r₀⌉, or `LEAST` (or r₀ where that is smaller): as low as a floor lets r₀ fall."""
    return max(math.ceil(fraction * rank - 1e-4), min(LEAST, rank))


def energy_to_reach(
    schedule: str, energy: float, floor: float, period: float, target: float = LINEAR_TARGET
) -> float:
    """The largest share up to `energy` with which the energy rule surely reaches a floor.

    Of a flat spectrum one cut by the share ε keeps ε of the rank, of any other one less; so n
    cuts from ρ r₀ reach floor r₀ where ρ εⁿ <= floor.

    Args:
      schedule: a name in `SCHEDULES`; of those without an energy rule `energy` is kept.
      energy: the share that is asked for.
      floor: fraction of r₀.
      period: fraction of training between cuts.
      target: fraction of r₀ that a linear fall leaves, where that is more than the floor.
    """
    # A rule that is due in the first step of a period cuts just after its beginning.
    moments = [period * i + 1e-4 for i in range(math.ceil(1 / period))]
    asked = [SCHEDULES[schedule](jnp.float32(t), 0.5, max(target, floor)) for t in moments]
    cuts = sum(float(t.energy) < 1 for t in asked)
    if not cuts or not floor:
        return energy
    start = min(float(t.rank) for t in asked)
    return min(energy, (floor / start) ** (1 / cuts))


def selection(params: Tree, multiple: int | None = None) -> dict[str, np.ndarray]:
    """Indices to keep of every factorised layer, by its path; empty where slicing does not pay.

    The non-zero singular values, largest first, filled up with zero ones to the bucket; all, in
    their order, of a layer that cannot shrink. Every change of a stored rank costs a compilation
    of the step, so while training goes on ranks are sliced only where that leaves at most `PAYS`
    of the numbers that the factors hold: in geometric steps.

    Args:
      params: with `Factors`.
      multiple: of `bucket`; 1 once training is over and nothing will be compiled any more, and
        whatever can be sliced is.
    """
    chosen, stored, kept = {}, 0, 0
    for name, f in named_leaves(params).items():
        s = np.abs(np.asarray(f.s))
        keep = bucket(max(1, int(np.count_nonzero(s))), s.size, multiple)
        order = np.argsort(-s, kind="stable") if keep < s.size else np.arange(s.size)
        chosen[name] = order[:keep]
        size = f.u.shape[0] + f.v.shape[0] + 1
        stored, kept = stored + size * s.size, kept + size * keep
    pays = kept < stored if multiple == 1 else kept <= PAYS * stored
    return chosen if pays else {}


def _take(index: np.ndarray, name: str, ndim: int, x: Array) -> Array:
    # A scalar, or a last axis of one, is a moment that the whole factor shares.
    if x.ndim == 0 or x.shape[-1] == 1:
        return x
    if x.ndim < ndim or x.shape[-1] <= index.max():
        raise ValueError(
            f"{name}: an array of shape {x.shape} in the state of a factor does not end in its "
            f"rank, so it cannot be compacted; use an optimiser whose moments have the "
            f"parameters' shapes"
        )
    return x[..., index]


def compact(tree: Tree, chosen: Mapping[str, np.ndarray]) -> Tree:
    """Slices every `Factors` of a tree whose path ends with a chosen layer's path.

    Works alike on parameters, twins, masks and optimiser moments, all of which hold
    `Factors` of the parameters' shapes at paths that end as the parameters' do, however many
    wrappers they lie in.

    Args:
      tree: any tree.
      chosen: of `selection`, every layer in it.

    Raises:
      ValueError: a `Factors` holds an array that has no axis of the rank, as a factored second
        moment has none.
    """
    # One layer's path may end with another's: "1/body/0/map/kernel" with "0/map/kernel".
    layers = sorted(chosen, key=len, reverse=True)

    def slice_node(path: tuple[Any, ...], node: Any) -> Any:
        name = path_name(path)
        layer = next((x for x in layers if f"/{name}".endswith(f"/{x}")), None)
        if not is_factors(node) or layer is None:
            return node
        take = functools.partial(_take, chosen[layer], name)
        matrix, vector = functools.partial(take, 2), functools.partial(take, 1)
        return type(node)(
            jax.tree.map(matrix, node.u), jax.tree.map(vector, node.s), jax.tree.map(matrix, node.v)
        )

    return jax.tree_util.tree_map_with_path(slice_node, tree, is_leaf=is_factors)


def make_compaction(chosen: Mapping[str, np.ndarray]) -> Callable[[Tree], Tree]:
    """The jitted `compact` of a whole tree to chosen ranks."""
    return jax.jit(lambda tree: compact(tree, chosen))


def at_ranks(tree: Tree, params: Tree, stored: Mapping[str, int]) -> Tree:
    """A tree with its factors sliced to stored ranks, by layers of `params`, where they can be."""
    layers = named_leaves(params)
    smaller = {k: np.arange(min(stored.get(k, f.rank), f.rank)) for k, f in layers.items()}
    chosen = {k: i for k, i in smaller.items() if len(i) < layers[k].rank}
    return make_compaction(chosen)(tree) if chosen else tree
