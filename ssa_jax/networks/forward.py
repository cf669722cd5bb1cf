"""Runs a network's units: logits, new statistics, and the Tape that local learning reads."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ssa_jax.networks.units import Unit, expect

Array = jax.Array
Tree = Any
Pullback = Callable[[Array], tuple[Tree, Array]]


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
    pullbacks: tuple[Pullback, ...]
    mstate: Tree


class Visited(NamedTuple):
    """Unit i after its forward pass: what its gradient, and a signal on its way down, need.

    Fields as those of `Tape`, each of this unit alone.
    """

    i: int
    params: Tree
    mstate: Tree
    input: Array
    output: Array
    pullback: Pullback


def visited(tape: Tape, params: Tree) -> list[Visited]:
    """What a tape that was made at `params` holds of every unit."""
    of_units = zip(params, tape.mstate, tape.inputs, tape.outputs, tape.pullbacks, strict=True)
    return [Visited(i, *of_unit) for i, of_unit in enumerate(of_units)]


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
    expect(units, params)
    inputs, outputs, pullbacks, states = [], [], [], []
    for unit, p, m in zip(units, params, mstate, strict=True):
        inputs.append(x)
        x, pullback, state = visit(unit, p, m, x)
        outputs.append(x)
        pullbacks.append(pullback)
        states.append(state)
    return x, tuple(states), Tape(tuple(inputs), tuple(outputs), tuple(pullbacks), mstate)


def visit(unit: Unit, params: Tree, mstate: Tree, x: Array) -> tuple[Array, Pullback, Tree]:
    """One unit in training mode: its output, its pullback as in `Tape`, its new state."""

    def apply(params: Tree, x: Array) -> tuple[Array, Tree]:
        return unit.apply(params, mstate, x, train=True)

    y, pullback, state = jax.vjp(apply, params, x, has_aux=True)
    return lax.stop_gradient(y), pullback, state


def after(x: Tree, *values: Tree) -> Tree:
    """The real arrays of x unchanged, but not to be had before all of the values are computed.

    Compilers merge equal computations and order independent ones as they like. A
    `lax.optimization_barrier` keeps them from it, but XLA:CPU drops it before it merges and
    schedules (jax 0.10). There zero times a sum of the values is added, a dependency that it has to
    respect; a value that is not finite makes x NaN.
    """

    def by_sum(x: Tree, values: Tree) -> Tree:
        total = sum((jnp.sum(v) for v in jax.tree.leaves(values)), start=jnp.float32(0))

        def wait(a: Array) -> Array:
            return a + (0 * total).astype(a.dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a

        return jax.tree.map(wait, x)

    def by_barrier(x: Tree, values: Tree) -> Tree:
        return lax.optimization_barrier((x, values))[0]

    return lax.platform_dependent(x, values, cpu=by_sum, default=by_barrier)


def predict(
    units: Sequence[Unit], params: Tree, mstate: Tree, x: Array, *, train: bool = False
) -> Array:
    """Logits (batch, classes) by a plain forward pass, differentiable from end to end."""
    expect(units, params)
    for unit, p, m in zip(units, params, mstate, strict=True):
        x, _ = unit.apply(p, m, x, train=train)
    return x


def predict_in_turn(units: Sequence[Unit], params: Tree, mstate: Tree, x: Array) -> Array:
    """The logits of `predict` in training mode, each unit's parameters met when it is its turn.

    A compiler may else begin with what needs parameters alone, such as the product of U, s or V
    of every unit, and hold all of it until it is used. Costs a sum over every unit's input.
    """
    expect(units, params)
    for unit, p, m in zip(units, params, mstate, strict=True):
        x, _ = unit.apply(after(p, x), m, x, train=True)
    return x


def output_shapes(
    units: Sequence[Unit],
    params: Tree,
    mstate: Tree,
    input_shape: tuple[int, ...],
    dtype: Any = "float32",
) -> list[tuple[int, ...]]:
    """Shape of each unit's output for one example, without the batch axis."""
    x = jax.ShapeDtypeStruct((1, *input_shape), dtype)
    return [h.shape[1:] for h in outputs_of(units, params, mstate, x, train=False)]


def outputs_of(
    units: Sequence[Unit], params: Tree, mstate: Tree, x: Tree, *, train: bool
) -> list[Any]:
    """Shape and dtype of each unit's output; nothing is computed.

    Args:
      units: n units.
      params, mstate: a tree a unit, or their shapes.
      x: of a batch, (batch, ...), or its shape.
      train: the mode.
    """
    found: list[Any] = []
    expect(units, params)
    for unit, p, m in zip(units, params, mstate, strict=True):
        x, _ = jax.eval_shape(functools.partial(unit.apply, train=train), p, m, x)
        found.append(x)
    return found
