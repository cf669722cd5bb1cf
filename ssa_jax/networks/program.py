"""A traced program taken apart at its marks."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ssa_jax.networks.cut import Constant, Cut, CutError, Flat, Operation, evaluate


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
        reached = set(range(self._first_x, self.flat.inputs))
        for op in self.flat.operations:
            if reached.intersection(x for x in op.inputs if isinstance(x, int)):
                reached.update(op.outputs)
        return reached

    def _is_placed(self, op: Operation) -> bool:
        """Whether an operation belongs to one unit; others are done by each that needs them."""
        return not op.outputs or op.outputs[0] in self.from_x

    def _segments(self) -> list[Segment]:
        segments: list[Segment] = []
        above: tuple[Any, ...] = tuple(self.outputs)
        cuts = self.flat.cuts
        for i in range(len(cuts), -1, -1):
            segment = self._segment(i, above)
            segments.insert(0, segment)
            if i:
                self._check_used(cuts[i - 1], segment)
                above = segment.inputs
        return segments

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
                    f"a running statistic that unit {home + 1} writes is read by unit {i + 1}: "
                    "one module with statistics is used on both sides of a cut"
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
            return v.value if isinstance(v, Constant) else instead.get(v, known[v])

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
