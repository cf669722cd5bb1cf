"""Replicas of a run: training states of equal shapes, stacked on a leading axis.

Every replica keeps its own key, and with it its own weights, order of examples and augmentation;
what it computes is what it would compute alone, to the rounding of batched products.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from ssa_jax.data import Epoch
from ssa_jax.training.dispatch import Dispatch
from ssa_jax.types import Batch, TrainState

Array = jax.Array

# The training examples are the same array for all.
_EPOCH_AXES = Epoch(source=None, rows=0, key=0)  # type: ignore[arg-type]


def stack(states: Sequence[TrainState]) -> TrainState:
    """States of equal shapes as one, whose every array has a leading axis of the replicas.

    Raises:
      ValueError: the states differ in their shapes.
    """
    shapes = [jax.tree.map(jnp.shape, state) for state in states]
    if any(other != shapes[0] for other in shapes[1:]):
        raise ValueError("only states of equal shapes can be stacked")
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *states)


def unstack(state: TrainState) -> list[TrainState]:
    """The states of `stack`."""
    return [jax.tree.map(lambda x, i=i: x[i], state) for i in range(len(state.step))]


def is_stacked(state: TrainState) -> bool:
    """Whether a state is one of `stack`."""
    return state.step.ndim == 1


def epoch(make: Callable[[Array], Epoch], keys: Array) -> Epoch:
    """The epochs of several runs as one, for a program of `vectorized`.

    Args:
      make: key of a run -> its epoch.
      keys: (replicas,), of the runs.
    """
    each = [make(key) for key in keys]
    rows, augmentation = (jnp.stack(x) for x in zip(*(e[1:] for e in each), strict=True))
    return Epoch(each[0].source, rows, augmentation)


def vectorized(dispatch: Dispatch) -> Dispatch:
    """The program of `dispatch.make_dispatch` for all replicas at once; its state is donated.

    Returns:
      (stacked state, stacked epoch) -> (stacked state, metrics), every metric of shape
      (replicas, length).
    """
    return jax.jit(jax.vmap(dispatch, in_axes=(0, _EPOCH_AXES)), donate_argnums=0)


def vectorized_measure(
    measure: Callable[[TrainState, Batch], dict[str, Array]],
) -> Callable[[TrainState, Batch], dict[str, Array]]:
    """A measure of a state on a batch, of all replicas on the same batch."""
    return jax.jit(jax.vmap(measure, in_axes=(0, None)))


def vectorized_refresh(
    refresh: Callable[[TrainState], TrainState],
) -> Callable[[TrainState], TrainState]:
    """The program of `train.make_refresh` for all replicas at once."""
    return jax.jit(jax.vmap(refresh))
