"""The passes of a training step: the error, and the gradient of every unit's local loss.

Two ways share one interface: *taped* keeps what the units' gradients need until the error is
known; *streamed* runs the network once more instead, and holds one unit at a time.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssa_jax.methods import Method
from ssa_jax.methods.base import Through
from ssa_jax.networks.forward import (
    Pullback,
    Tape,
    Visited,
    after,
    forward,
    predict,
    predict_in_turn,
    visit,
    visited,
)
from ssa_jax.networks.units import Unit
from ssa_jax.training import losses, tasks
from ssa_jax.training.losses import LossWeights
from ssa_jax.transforms.mapping import on_mesh

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
    loss, error = tasks.output_error(weights.task, logits, batch.labels)
    if method.direct is None or method.ahead:
        signals = method.signals(feedback, params, tape, error, batch)
        of_units = local_gradients(params, method.twins(feedback), tape, signals, weights)
        return Pass(logits, loss, mstate, of_units, tape)
    twins = method.twins(feedback)
    last, seen = len(units) - 1, visited(tape, params)
    gradients: list[Tree] = []
    waited_error = error
    # Each signal is made when its unit's turn comes: all at once would weigh as much as the tape.
    # On a mesh that would send each unit's gradient by itself, since the wait is for the sum over
    # all devices; there the compiler's own order has to do.
    in_turn = not on_mesh()
    for i in reversed(range(len(units))):
        signal = waited_error if i == last else method.direct(feedback, waited_error, batch, i)
        gradients.insert(0, _gradient_of(seen[i], twins, signal, weights, last=i == last))
        waited_error = after(error, gradients[0]) if in_turn else error
    return Pass(logits, loss, mstate, tuple(gradients), tape)


def _gradient_of(
    unit: Visited, twins: Tree | None, signal: Array, weights: LossWeights, *, last: bool
) -> Tree:
    twin = None if twins is None else twins[unit.i]
    return _unit_gradient(unit.params, twin, unit.pullback, unit.output, signal, weights, last=last)


def streamed(
    units: Sequence[Unit], method: Method, weights: LossWeights, params: Tree, mstate: Tree,
    feedback: Tree, batch: Any, take: Take = _keep,
) -> Pass:  # fmt: skip
    """Two forward passes: one for the error, one that takes each unit's gradient as it passes.

    Where signals walk down it is `_in_segments`. Else the second
    holds the activations of one unit at a time, for one forward pass more, and of the
    `method.ahead` units below it: a unit's signal is pulled back through as many. It may not begin
    before the error is known, nor a unit before all is done that the one below it made possible:
    `forward.after` sees to both.

    Args:
      units: the network.
      method: with direct signals, or with ones that walk down.
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
    if method.down is not None:
        return _in_segments(
            units, method, method.down, weights, params, mstate, feedback, batch, take
        )
    if method.direct is None:
        raise ValueError(
            "a streamed step needs a method whose signals need the error alone or walk down"
        )
    logits = predict_in_turn(units, params, mstate, batch.images)
    loss, error = tasks.output_error(weights.task, logits, batch.labels)
    twins, last = method.twins(feedback), len(units) - 1
    x, waited_error = after(batch.images, error), error
    gradients: dict[int, Tree] = {}
    states = []
    waiting: list[Visited] = []
    for j, unit in enumerate(units):
        # What the first pass made of the parameters alone is made again: kept, it would add up.
        own = after(params[j], waited_error)
        entered = x
        x, pullback, state = visit(unit, own, mstate[j], entered)
        states.append(state)
        waiting.append(Visited(j, own, mstate[j], entered, x, pullback))
        signal = waited_error if j == last else method.direct(feedback, waited_error, batch, j)
        # Down through the units that wait: each but the lowest of a full row only hands it on.
        for v in reversed(list(waiting)):
            if j == last or v.i == j - method.ahead:
                gradient = _gradient_of(v, twins, signal, weights, last=v.i == last)
                gradients[v.i], done = take(v.i, v.params, gradient)
                # The error waits for one unit at a time: in a chain of waits sums would add up.
                x, waited_error = after((x, error), done)
            if v.i > max(0, j - method.ahead):
                signal = v.pullback(signal)[1]
        waiting = [v for v in waiting if v.i not in gradients]
    return Pass(logits, loss, tuple(states), tuple(gradients[i] for i in range(len(units))), None)


def _in_segments(
    units: Sequence[Unit], method: Method, down: Callable[[Tree, Tree], Through],
    weights: LossWeights, params: Tree, mstate: Tree, feedback: Tree, batch: Any, take: Take,
) -> Pass:  # fmt: skip
    """Two forward passes, the second of them segment by segment from the last one down.

    Of n units the first keeps the inputs of about √n segments. Each segment is run again when the
    signal of its last unit is known, and its tape held until that has walked down through it: √n
    activations and the tape of √n units (Chen et al., Training deep nets with sublinear memory
    cost, 2016). The last segment is run once.
    """
    size = math.isqrt(len(units) - 1) + 1
    starts = range(0, len(units), size)
    x, entered = batch.images, []
    for start, end in itertools.pairwise(starts):
        entered.append(x)
        run = slice(start, end)
        x = predict_in_turn(units[run], params[run], mstate[run], x)
    entered.append(x)
    twins, through, last = method.twins(feedback), down(feedback, params), len(units) - 1
    found: dict[int, tuple[Tree, Tree]] = {}
    signal = None
    for start, x in zip(reversed(starts), reversed(entered), strict=True):
        seen = []
        for i in range(start, min(start + size, len(units))):
            before = x if signal is None else after(x, signal)
            own = after(params[i], before)
            x, pullback, state = visit(units[i], own, mstate[i], before)
            seen.append((Visited(i, own, mstate[i], before, x, pullback), state))
        if signal is None:
            logits = x
            loss, signal = tasks.output_error(weights.task, logits, batch.labels)
        for unit, state in reversed(seen):
            gradient = _gradient_of(unit, twins, signal, weights, last=unit.i == last)
            gradient, done = take(unit.i, unit.params, gradient)
            found[unit.i] = gradient, state
            if unit.i:
                signal = after(through(unit, signal), done)
    gradients, states = zip(*(found[i] for i in range(len(units))), strict=True)
    return Pass(logits, loss, states, gradients, None)


MEMORY_MODES: dict[str, Callable[..., Pass]] = {"taped": taped, "streamed": streamed}
# Logits in training mode, as the passes of each mode make them.
PREDICTIONS: dict[str, Callable[..., Array]] = {
    "taped": functools.partial(predict, train=True),
    "streamed": predict_in_turn,
}
