"""Marks in an ordinary model, and its traced program as one list of operations."""

import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

Array = jax.Array
Tree = Any
T = TypeVar("T")
_MARK = "ssa_jax.cut"
# How the call of a jitted function is named in a traced program, by versions of JAX.
CALLS = ("jit", "pjit")


class CutError(ValueError):
    """A model that cannot be taken apart at its cuts, with the line of the cut."""


def cut(h: T) -> T:
    """Marks the output of a unit of local learning; the identity wherever else it is called.

    Everything from one mark to the next is a unit: it learns from a teaching signal at its mark,
    and no gradient of another unit reaches it.

    Args:
      h: an array, or a pytree of arrays, whose first axis is the batch.

    Returns:
      h.
    """
    frame = inspect.currentframe()
    caller = frame.f_back if frame else None
    where = f"{caller.f_code.co_filename}:{caller.f_lineno}" if caller else "an unknown line"
    leaves, tree = jax.tree.flatten(h)
    if not leaves:
        raise CutError(f"the cut at {where} got no array")
    marked = [
        checkpoint_name(x, f"{_MARK} {i}/{len(leaves)} {where}") for i, x in enumerate(leaves, 1)
    ]
    return jax.tree.unflatten(tree, marked)


class Operation(NamedTuple):
    """One equation of a program whose values are numbered; constants stand for themselves."""

    equation: Any
    inputs: tuple[Any, ...]
    outputs: tuple[int, ...]


class Constant(NamedTuple):
    value: Any


@dataclasses.dataclass
class Cut:
    """A mark: the values that it marks, the operations before it, and the user's line."""

    values: list[int]
    position: int
    where: str


class Flat:
    """A traced program as one list of operations, calls of jitted functions in their places.

    Attributes:
      operations: in the order in which the model does them.
      cuts: its marks, in order.
      avals: shape and dtype of every value by its number; inputs come first.
      outputs: numbers of the results, or constants.
    """

    def __init__(self, closed: Any):
        self.operations: list[Operation] = []
        self.cuts: list[Cut] = []
        self.avals: list[Any] = []
        self._open: list[int] = []
        inputs = [self._new(v.aval) for v in closed.jaxpr.invars]
        self.inputs = len(inputs)
        self.outputs = self._flatten(closed.jaxpr, closed.consts, inputs)

    def _new(self, aval: Any) -> int:
        self.avals.append(aval)
        return len(self.avals) - 1

    def _flatten(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        known = dict(zip(jaxpr.constvars, map(Constant, consts), strict=True))
        known |= zip(jaxpr.invars, inputs, strict=True)

        def read(atom: Any) -> Any:
            return Constant(atom.val) if isinstance(atom, core.Literal) else known[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            if mark := _mark_of(eqn):
                self._meet(mark, operands[0])
                outputs = operands
            elif eqn.primitive.name in CALLS:
                inner = eqn.params["jaxpr"]
                outputs = self._flatten(inner.jaxpr, inner.consts, operands)
            else:
                _forbid_cuts_in(eqn)
                outputs = [self._new(v.aval) for v in eqn.outvars]
                self.operations.append(Operation(eqn, tuple(operands), tuple(outputs)))
            known |= zip(eqn.outvars, outputs, strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def _meet(self, mark: str, operand: Any) -> None:
        count, where = mark.removeprefix(_MARK + " ").split(" ", 1)
        index, of = map(int, count.split("/"))
        if isinstance(operand, Constant):
            raise CutError(f"what is cut at {where} does not depend on the model's input")
        self._open.append(operand)
        if index == of:
            self.cuts.append(Cut(self._open, len(self.operations), where))
            self._open = []


def _mark_of(eqn: Any) -> str | None:
    name = eqn.params.get("name") if eqn.primitive.name == "name" else None
    return name if isinstance(name, str) and name.startswith(_MARK) else None


def _forbid_cuts_in(eqn: Any) -> None:
    for mark in _marks_in(eqn):
        where = mark.split(" ", 2)[2]
        raise CutError(
            f"the cut at {where} is inside of {eqn.primitive.name}, which cannot be taken apart: "
            "write the loop out in Python, or cut after it"
        )


def _marks_in(eqn: Any) -> Iterator[str]:
    for inner in core.jaxprs_in_params(eqn.params):
        for sub in inner.eqns:
            if mark := _mark_of(sub):
                yield mark
            yield from _marks_in(sub)


def evaluate(operation: Operation, inputs: Sequence[Any]) -> Sequence[Any]:
    """The results of one operation."""
    primitive = operation.equation.primitive
    results = primitive.bind(*inputs, **primitive.get_bind_params(operation.equation.params))
    return results if primitive.multiple_results else [results]
