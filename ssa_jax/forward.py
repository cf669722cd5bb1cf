"""Runs a network's units: logits, new statistics, and the Tape that local learning reads."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from ssa_jax.units import Unit

Array = jax.Array
Tree = Any


class Tape(NamedTuple):
    """What one forward pass leaves behind, one entry a unit.

    Attributes:
      inputs: x_i, the unit's input (batch, ...).
      outputs: h_i, its output (batch, ...); the last one is the logits.
      pullbacks: h-cotangent -> (params-cotangent, x-cotangent), the unit's exact vjp.
      mstate: the model state before the pass.
    """

    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    pullbacks: tuple[Callable[[Array], tuple[Tree, Array]], ...]
    mstate: Tree


def forward(
    units: Sequence[Unit], params: Tree, mstate: Tree, x: Array
) -> tuple[Array, Tree, Tape]:
    """Training pass: each unit is differentiated by itself; nothing flows between units.

    Args:
      units: n units.
      params: tuple of n parameter trees.
      mstate: tuple of n state trees.
      x: (batch, ...) float32.

    Returns:
      logits (batch, classes), the new model state, the Tape.
    """
    inputs, outputs, pullbacks, states = [], [], [], []
    for unit, p, m in zip(units, params, mstate, strict=True):
        inputs.append(x)
        apply = functools.partial(_apply, unit, m)
        x, pullback, state = jax.vjp(apply, p, x, has_aux=True)
        x = lax.stop_gradient(x)
        outputs.append(x)
        pullbacks.append(pullback)
        states.append(state)
    return x, tuple(states), Tape(tuple(inputs), tuple(outputs), tuple(pullbacks), mstate)


def _apply(unit: Unit, mstate: Tree, params: Tree, x: Array) -> tuple[Array, Tree]:
    return unit.apply(params, mstate, x, train=True)


def predict(
    units: Sequence[Unit], params: Tree, mstate: Tree, x: Array, *, train: bool = False
) -> Array:
    """Logits (batch, classes) by a plain forward pass, differentiable from end to end."""
    for unit, p, m in zip(units, params, mstate, strict=True):
        x, _ = unit.apply(p, m, x, train=train)
    return x


def output_shapes(
    units: Sequence[Unit], params: Tree, mstate: Tree, input_shape: tuple[int, ...]
) -> list[tuple[int, ...]]:
    """Shape of each unit's output for one example, without the batch axis."""
    x = jax.ShapeDtypeStruct((1, *input_shape), "float32")
    shapes = []
    for unit, p, m in zip(units, params, mstate, strict=True):
        x, _ = jax.eval_shape(functools.partial(unit.apply, train=False), p, m, x)
        shapes.append(x.shape[1:])
    return shapes
