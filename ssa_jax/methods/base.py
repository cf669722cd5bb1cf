"""The interface of a learning method: it makes teaching signals and nothing else."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from ssa_jax.forward import Tape
from ssa_jax.units import Unit

Array = jax.Array
Tree = Any


def _keep(feedback: Tree, params: Tree, *_: Tree) -> Tree:
    del params
    return feedback


def _no_twins(feedback: Tree) -> None:
    del feedback


class Method(NamedTuple):
    """A learning method on one network.

    Attributes:
      init: (key, params, mstate) -> feedback, its own state, any pytree.
      signals: (feedback, params, tape, error, batch) -> one cotangent per unit output.
      update: (feedback, params) -> feedback, in every step, after the weights moved.
      refresh: (feedback, params, mstate) -> feedback, every `refresh_every` steps; runs
        outside the step, so it may be costly.
      refresh_every: 0 for never.
      twins: feedback -> parameter trees that the alignment term pulls towards, or None.
    """

    init: Callable[[Array, Tree, Tree], Tree]
    signals: Callable[[Tree, Tree, Tape, Array, Any], Sequence[Array]]
    update: Callable[[Tree, Tree], Tree] = _keep
    refresh: Callable[[Tree, Tree, Tree], Tree] = _keep
    refresh_every: int = 0
    twins: Callable[[Tree], Tree | None] = _no_twins


class Network(NamedTuple):
    """What a method may know of its network when it is made.

    Attributes:
      units: the units.
      shapes: output shape of each unit for one example, the last one (classes,).
    """

    units: Sequence[Unit]
    shapes: Sequence[tuple[int, ...]]


class FeedbackOptions(NamedTuple):
    """How a method's feedback is built and moved (see `methods.ssa`).

    Attributes:
      path: ``"composed"``, ``"sequential"`` or ``"random"``.
      update: ``"fixed"``, ``"mutual"`` or ``"tracked"``.
      every: steps between refreshes of tracked twins and of composed paths that move.
      rate: the twins' own rate under ``"mutual"``.
    """

    path: str = "composed"
    update: str = "tracked"
    every: int = 10
    rate: float = 0.01
