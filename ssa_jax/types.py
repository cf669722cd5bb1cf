"""What passes between the rooms: a batch, and the state of a training."""

from typing import Any, NamedTuple

import jax
import optax

Array = jax.Array
Tree = Any


class Batch(NamedTuple):
    """Inputs and targets.

    Attributes:
      images: the model's inputs (batch, ...), such as normalised images (batch, H, W, C) float32.
      labels: targets (batch, ...), such as labels (batch,) int32.
      weight: (batch,), zero for examples that are padding; None where none is, or where labels
        of -1 say so.
    """

    images: Array
    labels: Array
    weight: Array | None = None


class TrainState(NamedTuple):
    """All that training carries from step to step.

    Attributes:
      step: int32 scalar, steps done.
      params: one parameter tree a unit, with `Factors` nodes.
      mstate: one state tree a unit (batch statistics).
      feedback: the method's own state.
      opt_state: the optimiser's.
      key: typed PRNG key of the run.
    """

    step: Array
    params: Tree
    mstate: Tree
    feedback: Tree
    opt_state: optax.OptState
    key: Array
