"""Local learning in a pipeline of stages: forward passes flow up, and nothing flows back.

Stage s of S holds some neighbouring units. A batch goes through in M micro-batches: in tick t stage
s takes micro-batch t - s, whose input came from the stage below in the tick before. The outputs of
a micro-batch, all that a local gradient needs from elsewhere, go from the last stage to all of them
in the tick in which they are made, and every stage takes its gradient at once. So M + S - 1 ticks
do it all, and stages wait for S - 1 forward passes of one micro-batch, where a pipeline of
backpropagation waits for as many backward passes too. What a stage keeps of a forward pass until
the gradient it keeps of at most S micro-batches.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ssa_jax.parallel.mesh import STAGE

Array = jax.Array
Tree = Any


def partition(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """Cuts units into stages of neighbours so that the costliest stage costs least.

    By dynamic programming over where the last stage begins, O(units² · stages).

    Args:
      costs: of each unit, not negative.
      stages: S, at least one.

    Returns:
      S + 1 bounds: stage s has the units bounds[s], ..., bounds[s + 1] - 1, at least one.

    Raises:
      ValueError: fewer units than stages.
    """
    n = len(costs)
    if not 1 <= stages <= n:
        raise ValueError(f"{n} units cannot be cut into {stages} stages of at least one each")
    sums = [0.0, *itertools.accumulate(costs)]
    # Of the first k units in a number of stages: the cost of the costliest, and the bounds.
    best: dict[int, tuple[float, tuple[int, ...]]] = {k: (sums[k], (0, k)) for k in range(1, n + 1)}
    for parts in range(2, stages + 1):
        best = {
            k: min(
                (max(best[j][0], sums[k] - sums[j]), (*best[j][1], k)) for j in range(parts - 1, k)
            )
            for k in range(parts, n + 1)
        }
    return best[n][1]


class Work(NamedTuple):
    """What a device does in a tick, inside of a `shard_map` over the axis of stages.

    Attributes:
      forward: (micro-batch, x, own) -> (y, outputs, own, kept): of what came from the stage below
        what goes to the one above, of one shape everywhere, the network's outputs, which are zeros
        but on the last stage, the stage's own state, and what its gradient will need. A micro-batch
        below zero is none: zeros.
      gradient: (micro-batch, kept, outputs, total) -> total: adds what the stage learns from a
        micro-batch. Below zero: nothing.
    """

    forward: Callable[[Array, Array, Tree], tuple[Array, Array, Tree, Tree]]
    gradient: Callable[[Array, Tree, Array, Tree], Tree]


def flow(
    work: Work, stages: int, micro_batches: int, x: Array, own: Tree, kept: Tree, total: Tree
) -> tuple[Tree, Tree, Array]:
    """All micro-batches through all stages.

    Args:
      work: of one tick.
      stages: S, the size of the mesh's axis of them.
      micro_batches: M.
      x: zeros, of the shape of what goes from stage to stage.
      own: the stage's own state, which its forward passes move.
      kept: zeros, of the shapes of what is kept of a micro-batch.
      total: what gradients are added to.

    Returns:
      own and total after the last tick, and the outputs of all micro-batches (M, ...), on every
      stage.
    """
    stage = lax.axis_index(STAGE)
    up = [(s, s + 1) for s in range(stages - 1)]

    def tick(carry: tuple[Tree, ...], t: Array) -> tuple[tuple[Tree, ...], Array]:
        x, own, kept, total = carry
        arriving, known = t - stage, t - (stages - 1)
        arriving = jnp.where(arriving < micro_batches, arriving, -1)
        y, outputs, own, new = work.forward(arriving, x, own)
        # The place is free: the micro-batch that had it, S before, was learned from a tick ago.
        kept = _put(new, kept, (t - stage) % stages)
        outputs = lax.psum(outputs, STAGE)
        total = work.gradient(known, _take(kept, known % stages), outputs, total)
        return (lax.ppermute(y, STAGE, up), own, kept, total), outputs

    places = jax.tree.map(lambda a: jnp.zeros((stages, *a.shape), a.dtype), kept)
    ticks = jnp.arange(micro_batches + stages - 1)
    (_, own, _, total), outputs = lax.scan(tick, (x, own, places, total), ticks)
    return own, total, outputs[stages - 1 :]


def _put(values: Tree, places: Tree, i: Array) -> Tree:
    return jax.tree.map(lambda v, p: lax.dynamic_update_index_in_dim(p, v, i, 0), values, places)


def _take(places: Tree, i: Array) -> Tree:
    return jax.tree.map(lambda p: lax.dynamic_index_in_dim(p, i, 0, keepdims=False), places)
