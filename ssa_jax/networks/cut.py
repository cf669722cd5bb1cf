"""Marks in an ordinary model, and its program taken apart at them."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
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


class _Constant(NamedTuple):
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
        known = dict(zip(jaxpr.constvars, map(_Constant, consts), strict=True))
        known |= zip(jaxpr.invars, inputs, strict=True)

        def read(atom: Any) -> Any:
            return _Constant(atom.val) if isinstance(atom, core.Literal) else known[atom]

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
        if isinstance(operand, _Constant):
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
    found = primitive.bind(*inputs, **primitive.get_bind_params(operation.equation.params))
    return found if primitive.multiple_results else [found]


class Segment(NamedTuple):
    """The operations of one unit.

    Attributes:
      operations: in order; what depends on parameters or state alone is in every unit that
        needs it.
      inputs: numbers of the values that come from the unit below, the marked ones first; of the
        first unit the model's input.
      outputs: of those that go to the unit above, or the model's outputs.
      reads: numbers of the model's parameters and state that it reads.
      writes: positions among the new states of those that it makes.
    """

    operations: tuple[Operation, ...]
    inputs: tuple[int, ...]
    outputs: tuple[Any, ...]
    reads: frozenset[int]
    writes: tuple[int, ...]


class Program:
    """A flat program cut into segments.

    A value that goes around a mark, such as a skip, goes from unit to unit beside what is
    marked, and gets a signal of its own.

    Args:
      flat: its inputs are parameters, state and the model's input, in this order.
      params, state: how many arrays of them there are.
      outputs: how many of its results are the model's outputs; the others are the new state.

    Raises:
      CutError: there is no mark, or one marks what no unit uses.
    """

    def __init__(self, flat: Flat, params: int, state: int, outputs: int):
        if not flat.cuts:
            raise CutError(
                "the model has no cut: call h = ssa_jax.cut(h) on the output of each unit"
            )
        self.flat = flat
        self._first_state, self._first_x = params, params + state
        self.outputs, self.new_state = flat.outputs[:outputs], flat.outputs[outputs:]
        self.from_x = self._reached()
        ends = [c.position for c in flat.cuts]
        self._homes = [
            int(np.searchsorted(ends, k, side="right")) if self._is_placed(op) else None
            for k, op in enumerate(flat.operations)
        ]
        # The input itself is made before all.
        self._made_in = dict.fromkeys(range(self._first_x, flat.inputs), -1)
        for op, home in zip(flat.operations, self._homes, strict=True):
            if home is not None:
                self._made_in |= dict.fromkeys(op.outputs, home)
        self.segments = self._segments()

    def _reached(self) -> set[int]:
        """Values that depend on the model's input."""
        found = set(range(self._first_x, self.flat.inputs))
        for op in self.flat.operations:
            if found.intersection(x for x in op.inputs if isinstance(x, int)):
                found.update(op.outputs)
        return found

    def _is_placed(self, op: Operation) -> bool:
        """Whether an operation belongs to one unit; others are done by each that needs them."""
        return not op.outputs or op.outputs[0] in self.from_x

    def _segments(self) -> list[Segment]:
        found: list[Segment] = []
        above: tuple[Any, ...] = tuple(self.outputs)
        cuts = self.flat.cuts
        for i in range(len(cuts), -1, -1):
            segment = self._segment(i, above)
            found.insert(0, segment)
            if i:
                self._check_used(cuts[i - 1], segment)
                above = segment.inputs
        return found

    def _check_used(self, mark: Cut, segment: Segment) -> None:
        for v in mark.values:
            if v not in self.from_x:
                raise CutError(f"what is cut at {mark.where} does not depend on the model's input")
            if v not in segment.inputs:
                raise CutError(f"nothing uses what is cut at {mark.where}")

    def _segment(self, i: int, above: Sequence[Any]) -> Segment:
        writes = {k for k, v in enumerate(self.new_state) if self._made_in.get(v, -1) == i}
        if i == 0:
            writes |= {k for k, v in enumerate(self.new_state) if self._made_in.get(v) == -1}
        while True:
            targets = [*above, *(self.new_state[k] for k in writes)]
            operations, needed = self._needed(i, targets)
            reads = frozenset(v for v in needed if v < self._first_x)
            # State that is read here is written here too: copies of it move alike.
            more = writes | {v - self._first_state for v in reads if v >= self._first_state}
            if more == writes:
                break
            writes = more
        for k in writes:
            home = self._made_in.get(self.new_state[k], i)
            if home not in (i, -1):
                raise CutError(
                    f"a running statistic that unit {home} writes is read by unit {i}: one module "
                    "with statistics is used on both sides of a cut"
                )
        marked = self.flat.cuts[i - 1].values if i else []
        around = sorted(v for v in needed if self._made_in.get(v, i) < i and v not in marked)
        inputs = (*(v for v in marked if v in needed), *around)
        if i == 0:
            inputs = tuple(range(self._first_x, self.flat.inputs))
        return Segment(tuple(operations), inputs, tuple(above), reads, tuple(sorted(writes)))

    def _needed(self, i: int, targets: Sequence[Any]) -> tuple[list[Operation], set[int]]:
        """Operations of segment i, and of none, that make the targets; and all that they read."""
        needed = {v for v in targets if isinstance(v, int)}
        operations: list[Operation] = []
        placed = zip(reversed(self.flat.operations), reversed(self._homes), strict=True)
        for op, home in placed:
            # One without results is there for its effect, such as printing.
            wanted = needed.intersection(op.outputs) or not op.outputs
            if wanted and home in (i, None):
                operations.insert(0, op)
                needed.update(x for x in op.inputs if isinstance(x, int))
        return operations, needed

    def run(
        self, i: int, known: dict[int, Any], twins: dict[int, Any] | None = None
    ) -> tuple[list[Any], dict[int, Any]]:
        """Outputs and new states of segment i from its inputs and what it reads, by number.

        Args:
          i: the segment.
          known: values of all that it reads and of its inputs.
          twins: of parameters, values that stand in for theirs in derivatives by the inputs.
        """
        segment, known, twins = self.segments[i], dict(known), dict(twins or {})

        def read(v: Any, instead: dict[int, Any]) -> Any:
            return v.value if isinstance(v, _Constant) else instead.get(v, known[v])

        for op in segment.operations:
            values = [read(v, {}) for v in op.inputs]
            swaps = [isinstance(v, int) and v in twins for v in op.inputs]
            data = [isinstance(v, int) and v in self.from_x for v in op.inputs]
            if not any(swaps):
                made = evaluate(op, values)
            elif any(data):
                made = _through(op, values, [read(v, twins) for v in op.inputs], data)
            else:
                made = evaluate(op, values)
                in_twin = evaluate(op, [read(v, twins) for v in op.inputs])
                twins |= zip(op.outputs, in_twin, strict=True)
            known |= zip(op.outputs, made, strict=True)
        outputs = [read(v, {}) for v in segment.outputs]
        return outputs, {k: read(self.new_state[k], {}) for k in segment.writes}


def _through(
    op: Operation, values: Sequence[Any], twins: Sequence[Any], data: Sequence[bool]
) -> Sequence[Any]:
    """An operation on data and parameters, whose derivative by the data has twins for the latter.

    Nothing else than the data may be differentiated.
    """

    def with_parameters(parameters: Sequence[Any]) -> Callable[..., tuple[Any, ...]]:
        def apply(*xs: Any) -> tuple[Any, ...]:
            rest = iter(xs)
            pairs = zip(parameters, data, strict=True)
            return tuple(evaluate(op, [next(rest) if d else p for p, d in pairs]))

        return apply

    forwards, backwards = with_parameters(values), with_parameters(twins)

    @jax.custom_vjp
    def swapped(*xs: Any) -> tuple[Any, ...]:
        return forwards(*xs)

    swapped.defvjp(
        lambda *xs: (forwards(*xs), xs), lambda xs, signal: jax.vjp(backwards, *xs)[1](signal)
    )
    return swapped(*(v for v, d in zip(values, data, strict=True) if d))


class Packing:
    """Several arrays of one batch as one array of floating-point numbers, and back.

    A single floating-point array is left as it is. Arrays that differ in their last axis alone
    are joined along it, others flattened. Whole numbers and truth values are kept exactly, as
    two numbers below 2^16 each.

    Args:
      avals: shape and dtype of each array.
      where: the line of the cut, for errors.

    Raises:
      CutError: an array without the batch as its first axis, or of a kind that cannot be kept.
    """

    def __init__(self, avals: Sequence[Any], batch: int, where: str):
        self.avals = tuple(avals)
        for aval in self.avals:
            if not aval.shape or aval.shape[0] != batch:
                raise CutError(
                    f"a value of shape {aval.shape} crosses the cut at {where}, whose first axis "
                    f"is not the batch of {batch}"
                )
            if aval.dtype not in _KEPT:
                raise CutError(f"a value of dtype {aval.dtype} crosses the cut at {where}")
        self.floats = [x.dtype for x in self.avals if jnp.issubdtype(x.dtype, jnp.floating)]
        self.dtype = jnp.result_type(*self.floats) if self.floats else jnp.dtype(jnp.float32)
        if len(self.floats) < len(self.avals) and jnp.finfo(self.dtype).nmant < 16:
            self.dtype = jnp.dtype(jnp.float32)
        self._whole = len({x.shape[:-1] for x in self.avals}) == 1 and self.avals[0].ndim > 1

    def pack(self, arrays: Sequence[Array]) -> Array:
        """The one array, (batch, ...)."""
        parts = [p for x in arrays for p in _halves(x)]
        if len(parts) == 1:
            return parts[0]
        if not self._whole:
            parts = [p.reshape(len(p), -1) for p in parts]
        return jnp.concatenate([p.astype(self.dtype) for p in parts], axis=-1)

    def unpack(self, packed: Array) -> list[Array]:
        """The arrays of `pack`."""
        if len(self.avals) == 1 and self.floats:
            return [packed]
        found, start = [], 0
        for aval in self.avals:
            parts = []
            for _ in range(1 if jnp.issubdtype(aval.dtype, jnp.floating) else 2):
                width = aval.shape[-1] if self._whole else int(np.prod(aval.shape[1:]))
                part = packed[..., start : start + width]
                parts.append(part.reshape(len(packed), *aval.shape[1:]))
                start += width
            found.append(_whole(parts, aval.dtype))
        return found


_KEPT = (*(jnp.dtype(t) for t in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)),
         *(jnp.dtype(t) for t in (jnp.bool_, jnp.int8, jnp.int16, jnp.int32, jnp.uint8,
                                  jnp.uint16)))  # fmt: skip
_HALF = 2**16


def _halves(x: Array) -> list[Array]:
    if jnp.issubdtype(x.dtype, jnp.floating):
        return [x]
    x = x.astype(jnp.int32)
    high, low = jnp.floor_divide(x, _HALF), jnp.mod(x, _HALF)
    return [high.astype(jnp.float32), low.astype(jnp.float32)]


def _whole(parts: Sequence[Array], dtype: Any) -> Array:
    if len(parts) == 1:
        return parts[0].astype(dtype)
    high, low = (p.astype(jnp.int32) for p in parts)
    return (high * _HALF + low).astype(dtype)
