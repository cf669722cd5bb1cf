"""Which networks and methods can go over stages, and which units each stage gets."""

import itertools
from collections.abc import Sequence
from typing import Any

from ssa_jax.methods import Method
from ssa_jax.networks.units import Unit
from ssa_jax.parallel.pipeline import partition
from ssa_jax.training import costs
from ssa_jax.training.losses import LossWeights
from ssa_jax.training.unitwise import Alone
from ssa_jax.types import Batch, TrainState

Tree = Any


def bounds_of(
    units: Sequence[Unit], method: Method, optimizer: Any, weights: LossWeights,
    state: TrainState, micro_batch: Batch, stages: int, memory: str,
) -> tuple[int, ...]:  # fmt: skip
    """Stages of about equal multiply-accumulates, once it is checked that there can be any.

    Of a unit count its forward passes, its signal and its gradient: the work of a micro-batch.

    Args:
      units: the network.
      method: makes the signals.
      optimizer: the chain.
      weights: of the local loss.
      state: `TrainState`, or its shapes.
      micro_batch: `Batch`, or its shapes.
      stages: their number.
      memory: ``"taped"``, or ``"streamed"``, which passes forward twice.

    Raises:
      ValueError: see `check`.
    """
    check(method, optimizer)
    if stages > len(units):
        raise ValueError(
            f"--stages must be at most {len(units)}, the number of units, got {stages}; where "
            "units are joined a smaller --unit_size makes more"
        )
    of_units = costs.step_costs(units, method, optimizer, weights, state, micro_batch)
    passes = 2 if memory == "streamed" else 1
    bounds = partition([passes * c.forward + c.signal + c.update for c in of_units], stages)
    check_shared(units, bounds)
    return bounds


def check(method: Method, optimizer: Any) -> None:
    """Checks that units can learn apart from each other.

    Raises:
      ValueError: they cannot; the message says what to do.
    """
    own = method.readouts is not None or method.direct is not None
    if not own or method.ahead:
        raise ValueError(
            "--stages and --micro_batches need signals that are made of the output error alone or "
            "by the units' own readouts, so that nothing goes back from stage to stage: dfa, drtp, "
            "local, auglocal, or ssa with --feedback_lookahead=0 and another --feedback than "
            "sequential, without --local_weight; give one of these, or --stages=1 "
            "--micro_batches=1"
        )
    if not isinstance(optimizer, Alone):
        raise ValueError(
            "--stages and --micro_batches need an optimiser that treats every unit by itself: "
            "--rank_schedule=adaptive and stable_rank look at all units together, and one of "
            "another package has to say that it does not, as a ssa_jax.training.unitwise.Alone"
        )


def check_shared(units: Sequence[Unit], bounds: Sequence[int]) -> None:
    """Raises ValueError where units of several stages share parameters."""
    of_stages = [
        frozenset().union(*(unit.shared for unit in units[a:b]))
        for a, b in itertools.pairwise(bounds)
    ]
    for s, own in enumerate(of_stages):
        both = own.intersection(*[frozenset().union(*of_stages[s + 1 :])])
        if both:
            raise ValueError(
                f"units of several stages share {', '.join(sorted(both))}; give fewer --stages, or "
                "a larger --unit_size, so that they come to lie in one"
            )
