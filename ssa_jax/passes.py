"""The passes of a training step: the error, and the gradient of every unit's local loss.

Two ways share one interface: *taped* keeps what the units' gradients need until the error is
known; *streamed* runs the network once more instead, and holds one unit at a time.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssa_jax import losses
from ssa_jax.forward import Pullback, Tape, after, forward, predict, predict_in_turn, visit
from ssa_jax.losses import LossWeights
from ssa_jax.methods import Method
from ssa_jax.units import Unit

Array = jax.Array
Tree = Any


def local_gradients(
    params: Tree, twins: Tree | None, tape: Tape, signals: Sequence[Array], weights: LossWeights
) -> Tree:
    """Gradient of each unit's local loss (see `losses`), the Hoyer term left out.

    Args:
      params: one parameter tree a unit.
      twins: their twins, or None for a method without any.
      tape: of the forward pass at `params`.
      signals: δ_i, one a unit, of the shapes of `tape.outputs`.
      weights: its coefficients.
    """
    last = len(signals) - 1
    twins = [None] * len(signals) if twins is None else twins
    of_units = zip(params, twins, tape.pullbacks, tape.outputs, signals, strict=True)
    return tuple(
        _unit_gradient(*of_unit, weights, last=i == last) for i, of_unit in enumerate(of_units)
    )


def _unit_gradient(
    params: Tree, twin: Tree | None, pullback: Pullback, h: Array, signal: Array,
    weights: LossWeights, *, last: bool,
) -> Tree:  # fmt: skip
    task = pullback(losses.cotangent(h, signal, weights, last=last))[0]
    rest = jax.grad(losses.regulariser)(params, twin, weights)
    return jax.tree.map(jnp.add, task, rest)


class Pass(NamedTuple):
    """What the forward passes of a step find at the parameters before it.

    Attributes:
      logits: (batch, classes).
      loss: the output loss.
      mstate: the new model state.
      gradients: of every unit's local loss, or what `take` of a streamed pass made of each.
      tape: the Tape, or None of a streamed pass, whose method leaves it unread.
    """

    logits: Array
    loss: Array
    mstate: Tree
    gradients: Tree
    tape: Any


Take = Callable[[int, Tree, Tree], tuple[Tree, Tree]]


def _keep(i: int, params: Tree, gradient: Tree) -> tuple[Tree, Tree]:
    del i, params
    return gradient, gradient


def taped(
    units: Sequence[Unit], method: Method, weights: LossWeights, params: Tree, mstate: Tree,
    feedback: Tree, batch: Any,
) -> Pass:  # fmt: skip
    """One forward pass that keeps every unit's pullback until the error is known."""
    logits, mstate, tape = forward(units, params, mstate, batch.images)
    loss, error = losses.output_error(logits, batch.labels, weights.smoothing)
    if method.direct is None:
        signals = method.signals(feedback, params, tape, error, batch)
        gradients = local_gradients(params, method.twins(feedback), tape, signals, weights)
        return Pass(logits, loss, mstate, gradients, tape)
    gradient = functools.partial(_direct_gradient, len(units), method, weights, feedback, batch)
    found: list[Tree] = []
    here = error
    # Each signal is made when its unit's turn comes: all at once would weigh as much as the tape.
    for i in reversed(range(len(units))):
        found.insert(0, gradient(params[i], here, i, tape.outputs[i], tape.pullbacks[i]))
        here = after(error, found[0])
    return Pass(logits, loss, mstate, tuple(found), tape)


def _direct_gradient(
    units: int, method: Method, weights: LossWeights, feedback: Tree, batch: Any, params: Tree,
    error: Array, i: int, h: Array, pullback: Pullback,
) -> Tree:  # fmt: skip
    """The gradient of unit i, with its parameters, of a method with `direct` signals."""
    assert method.direct is not None
    last = i == units - 1
    signal = error if last else method.direct(feedback, error, batch, i)
    twins = method.twins(feedback)
    twin = None if twins is None else twins[i]
    return _unit_gradient(params, twin, pullback, h, signal, weights, last=last)


def streamed(
    units: Sequence[Unit], method: Method, weights: LossWeights, params: Tree, mstate: Tree,
    feedback: Tree, batch: Any, take: Take = _keep,
) -> Pass:  # fmt: skip
    """Two forward passes: one for the error, one that takes each unit's gradient as it passes.

    The second holds the activations of one unit at a time, for one forward pass more. It may
    not begin before the error is known, nor a unit before all of the one below it is done:
    `forward.after` sees to both.

    Args:
      units: the network.
      method: with direct signals.
      weights: coefficients of the local loss.
      params: one parameter tree a unit.
      mstate: one state tree a unit.
      feedback: of the method.
      batch: images and labels.
      take: (i, parameters and gradient of unit i) -> what is kept of it, such as the unit after
        its update, and what of that the next unit waits for.

    Raises:
      ValueError: the method's signals need a tape.
    """
    if method.direct is None:
        raise ValueError("a streamed step needs a method whose signals need the error alone")
    logits = predict_in_turn(units, params, mstate, batch.images)
    loss, error = losses.output_error(logits, batch.labels, weights.smoothing)
    gradient = functools.partial(_direct_gradient, len(units), method, weights, feedback, batch)
    x, here = after(batch.images, error), error
    gradients, states = [], []
    for i, unit in enumerate(units):
        # What the first pass made of the parameters alone is made again: kept, it would add up.
        own = after(params[i], here)
        x, pullback, state = visit(unit, own, mstate[i], x)
        kept, done = take(i, own, gradient(own, here, i, x, pullback))
        # The error waits for one unit at a time: in a chain of waits the sums would add up.
        x, here = after((x, error), done)
        gradients.append(kept)
        states.append(state)
    return Pass(logits, loss, tuple(states), tuple(gradients), None)


MEMORY_MODES: dict[str, Callable[..., Pass]] = {"taped": taped, "streamed": streamed}
# Logits in training mode, as the passes of each mode make them.
PREDICTIONS: dict[str, Callable[..., Array]] = {
    "taped": functools.partial(predict, train=True),
    "streamed": predict_in_turn,
}
