"""Analytic costs: multiply-accumulates from the traced program, sizes from shapes alone.

Nothing here computes; arrays may be `jax.ShapeDtypeStruct`.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax

from ssa_jax.methods import Method
from ssa_jax.networks.forward import forward
from ssa_jax.networks.units import Unit
from ssa_jax.training import tasks
from ssa_jax.training.losses import LossWeights
from ssa_jax.training.memory import activation_bytes, nbytes
from ssa_jax.training.passes import local_gradients

Tree = Any


def macs(fn: Callable[..., Any], *args: Any) -> int:
    """Multiply-accumulates of the matrix products and convolutions in fn(*args).

    See `Program`, all of whose outputs are wanted.
    """
    return Program(fn, *args).macs()


class Program:
    """A function as traced, for counting what parts of its results cost.

    As a compiler would, the count leaves out what no wanted result needs and takes equal
    computations once. Every tap of a convolution counts (XLA's own count leaves out those on
    padding), and the body of a scan as often as it runs. The body of any other loop counts once,
    of a conditional the costliest branch, and of a choice by platform the one for all others.
    Elementwise work counts for nothing, as in the literature.

    Args:
      fn: any traceable function.
      args: its arguments, or their shapes and dtypes.
    """

    def __init__(self, fn: Callable[..., Any], *args: Any):
        closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
        self._jaxpr = closed.jaxpr
        self._same = _equal_values(closed.jaxpr)
        numbers = range(len(closed.jaxpr.outvars))
        self.outputs: Tree = jax.tree.unflatten(jax.tree.structure(shapes), numbers)

    def macs(self, *wanted: Tree) -> int:
        """Multiply-accumulates that parts of the result need together.

        Args:
          wanted: subtrees of `outputs`, which has the number of every result in its place; all
            of them if none is given.
        """
        numbers = jax.tree.leaves(wanted) if wanted else range(len(self._jaxpr.outvars))
        return _count(self._jaxpr, numbers, self._same)


def _equal_values(jaxpr: Any) -> dict[Any, Any]:
    """For every variable the first one that is computed in the same way from the same values."""
    same: dict[Any, Any] = {}
    first: dict[Any, Any] = {}
    for eqn in jaxpr.eqns:
        if _multiplies_by_one(eqn):
            same[eqn.outvars[0]] = same.get(eqn.invars[1], eqn.invars[1])
            continue
        inputs = tuple(_name(same.get(v, v) if _is_variable(v) else v) for v in eqn.invars)
        # A rule of differentiation, and where in memory it lies, make no other computation.
        params = eqn.params.get("call_jaxpr", eqn.params)
        key = (eqn.primitive.name, re.sub(r"0x[0-9a-f]+", "", str(params)), inputs)
        known = first.setdefault(key, eqn.outvars)
        same |= zip(eqn.outvars, known, strict=True)
    return same


def _multiplies_by_one(eqn: Any) -> bool:
    """Whether all an equation does is to scale an array by a coefficient of one."""
    if eqn.primitive.name != "mul":
        return False
    scale, array = eqn.invars
    return not _is_variable(scale) and _is_variable(array) and scale.val == 1


def _is_variable(atom: Any) -> bool:
    return not hasattr(atom, "val")


def _name(atom: Any) -> Any:
    return id(atom) if _is_variable(atom) else str(atom.val)


def _count(jaxpr: Any, wanted: Iterable[int], same: dict[Any, Any]) -> int:
    needed = {same.get(v, v) for v in (jaxpr.outvars[i] for i in wanted) if _is_variable(v)}
    total = 0
    for eqn in reversed(jaxpr.eqns):
        # A computation that repeats an earlier one has outputs that stand for others.
        live = [i for i, v in enumerate(eqn.outvars) if v in needed and same.get(v, v) is v]
        if not live:
            continue
        total += _equation_macs(eqn, live)
        needed |= {same.get(v, v) for v in eqn.invars if _is_variable(v)}
    return total


def _equation_macs(eqn: Any, live: Sequence[int]) -> int:
    if eqn.primitive.name == "dot_general":
        (contract, _), _ = eqn.params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        return math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contract)
    if eqn.primitive.name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        out_features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        # Zeros between the entries of a dilated input are no work.
        taps = math.prod(kernel) // out_features / math.prod(eqn.params["lhs_dilation"])
        return round(math.prod(eqn.outvars[0].aval.shape) * taps)
    of_bodies = [
        _count(sub, live if len(sub.outvars) == len(eqn.outvars) else range(len(sub.outvars)),
               _equal_values(sub))
        for sub in _subjaxprs(eqn.params)
    ]  # fmt: skip
    if eqn.primitive.name == "cond":
        # One program in several forms, of which `lax.platform_dependent` puts the default last.
        by_platform = eqn.params.get("branches_platforms") is not None
        return of_bodies[-1] if by_platform else max(of_bodies)
    return sum(of_bodies) * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)


def _subjaxprs(params: dict[str, Any]) -> list[Any]:
    bodies = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                bodies.append(inner)
    return bodies


def parameters(params: Tree) -> int:
    """Number of stored parameters."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


class UnitCosts(NamedTuple):
    """What one unit costs in a training step on one batch.

    Attributes:
      params: number of parameters.
      forward: MACs of its output.
      signal: MACs of its teaching signal, above those of the units after it.
      update: MACs of the gradient of its parameters, above the signal's.
      optimizer: MACs of the chain: projection and retraction of its factors.
      activation_bytes: its input and what else its gradient keeps of the forward pass, before
        a compiler recomputes or merges any of it.
      optimizer_bytes: the optimiser's state for its parameters.
    """

    params: int
    forward: int
    signal: int
    update: int
    optimizer: int
    activation_bytes: int
    optimizer_bytes: int


def step_costs(
    units: Sequence[Unit], method: Method, optimizer: Any, weights: LossWeights, state: Any,
    batch: Any,
) -> list[UnitCosts]:  # fmt: skip
    """Costs of every unit in one taped step; a streamed one adds another forward pass.

    Args:
      units: the network.
      method: makes the signals.
      optimizer: the chain.
      weights: coefficients of the local loss.
      state: `TrainState`.
      batch: `Batch`.
    """
    step = Program(lambda s, b: _passes(units, method, weights, s, b), state, batch)
    outputs, signals, gradients = step.outputs
    chain = Program(optimizer.update, state.params, state.opt_state, state.params)
    inputs = jax.eval_shape(
        lambda s, b: forward(units, s.params, s.mstate, b.images)[2].inputs, state, batch
    )
    activations = activation_bytes(units, method, state.params, state.mstate, inputs)
    n = len(units)
    # Counted from the last unit down: a signal may pass through those of the units above.
    sent = [step.macs(outputs, signals[i:]) for i in range(n)] + [step.macs(outputs)]
    ahead = [step.macs(outputs[:i]) for i in range(n + 1)]
    return [
        UnitCosts(
            params=parameters(state.params[i]),
            forward=ahead[i + 1] - ahead[i],
            signal=sent[i] - sent[i + 1],
            update=step.macs(outputs, signals, gradients[i]) - sent[0],
            optimizer=chain.macs(chain.outputs[0][i]),
            activation_bytes=activations[i],
            optimizer_bytes=_optimizer_bytes(optimizer, state.params, i),
        )
        for i in range(n)
    ]


def _passes(
    units: Sequence[Unit], method: Method, weights: LossWeights, state: Any, batch: Any
) -> tuple[Tree, Tree, Tree]:
    logits, _, tape = forward(units, state.params, state.mstate, batch.images)
    _, error = tasks.output_error(weights.task, logits, batch.labels)
    signals = tuple(method.signals(state.feedback, state.params, tape, error, batch))
    twins = method.twins(state.feedback)
    return tape.outputs, signals, local_gradients(state.params, twins, tape, signals, weights)


def _optimizer_bytes(optimizer: Any, params: Tree, i: int) -> int:
    """Of the optimiser's state, what unit i adds to that of no unit at all."""
    none = tuple(() for _ in params)
    alone = (*none[:i], params[i], *none[i + 1 :])
    return nbytes(jax.eval_shape(optimizer.init, alone)) - nbytes(
        jax.eval_shape(optimizer.init, none)
    )
