"""Schedules of pipelines as time lines: what each stage does when, from what its passes take.

Backpropagation by GPipe (Huang et al. 2019), 1F1B (Narayanan et al. 2019) and zero bubble, which
takes the gradients of parameters apart from those of inputs to fill idle time (ZB-H1 and ZB-H2, Qi
et al. 2023); local learning as `ssa_jax.parallel.pipeline` has it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Times(NamedTuple):
    """What one stage takes for one micro-batch.

    Attributes:
      forward: F, its forward pass.
      inputs: B, the gradient of its input.
      params: W, the gradient of its parameters.
    """

    forward: float
    inputs: float
    params: float


class Task(NamedTuple):
    """One bar of a time line: F, B or W of a micro-batch on a stage, or BW of both gradients."""

    stage: int
    kind: str
    micro_batch: int
    start: float
    end: float


Line = list[Task]


def span(line: Line) -> float:
    """When the last task ends."""
    return max(task.end for task in line)


def idle(line: Line, stages: int) -> float:
    """The share of the stages' time in which they do nothing."""
    busy = sum(task.end - task.start for task in line)
    return 1 - busy / (stages * span(line))


def local(times: Sequence[Times], micro_batches: int) -> Line:
    """Local learning: forward passes, and gradients as soon as the outputs are known.

    Of a direct method `inputs` is zero and `params` the gradient, with the forward pass that it
    makes again where none is kept. In each tick the outputs go to all stages, which wait for it.
    """
    stages, line = len(times), Line()
    free = [0.0] * stages
    for tick in range(micro_batches + stages - 1):
        for s, t in enumerate(times):
            if 0 <= tick - s < micro_batches:
                line.append(Task(s, "F", tick - s, free[s], free[s] + t.forward))
                free[s] += t.forward
        known = tick - stages + 1
        if known >= 0:
            told = max(free)
            for s, t in enumerate(times):
                end = told + t.inputs + t.params
                line.append(Task(s, "W", known, told, end))
                free[s] = end
        else:
            # What comes from below is there when the slowest stage has sent it.
            free = [max(free)] * stages
    return line


def gpipe(times: Sequence[Times], micro_batches: int) -> Line:
    """All forward passes, then all backward passes in the same order of micro-batches."""
    order = [("F", m) for m in range(micro_batches)] + [("BW", m) for m in range(micro_batches)]
    return _in_order(times, [order for _ in times])


def one_forward_one_backward(times: Sequence[Times], micro_batches: int) -> Line:
    """1F1B: stage s runs at most S - s forward passes ahead of its backward passes."""
    orders = []
    for s in range(len(times)):
        ahead = min(len(times) - s, micro_batches)
        order = [("F", m) for m in range(ahead)]
        for m in range(micro_batches):
            order.append(("BW", m))
            if m + ahead < micro_batches:
                order.append(("F", m + ahead))
        orders.append(order)
    return _in_order(times, orders)


def zero_bubble_bound(times: Sequence[Times], micro_batches: int, kept: int = 1) -> float:
    """What zero bubble takes at least: M (F + B + W) + (S - 1) (F + B - kept W) (Qi et al. 2023).

    F, B and W are those of the costliest stage; with few micro-batches it is the way of one of them
    up and down, and the last W. Its authors reach it where M is large enough.

    Args:
      times: of the stages.
      micro_batches: M.
      kept: 1 for ZB-H1, which keeps S micro-batches, as 1F1B does, 2 for ZB-H2, 2 S - 1.
    """
    f, b, w = max(times, key=sum)
    bubble = (len(times) - 1) * max(0.0, f + b - kept * w)
    way = sum(t.forward + t.inputs for t in times) + times[0].params
    return max(micro_batches * (f + b + w) + bubble, way)


def zero_bubble(times: Sequence[Times], micro_batches: int) -> Line:
    """A time line of ZB-H1: W apart from B, taken when nothing else can be done; S kept at most.

    By a plain rule (B before F before W), which is near `zero_bubble_bound`, not at it.
    """
    stages = most = len(times)
    done: dict[tuple[int, str, int], float] = {}
    nexts = [{"F": 0, "B": 0, "W": 0} for _ in times]
    free, line = [0.0] * stages, Line()
    while len(line) < 3 * stages * micro_batches:
        ready = [
            (max(free[s], at), rank, s, kind)
            for s in range(stages)
            for rank, kind in enumerate(("B", "F", "W"))
            if (at := _ready(done, nexts[s], s, kind, stages, micro_batches, most)) is not None
        ]
        start, _, s, kind = min(ready)
        m = nexts[s][kind]
        took = dict(zip("FBW", times[s], strict=True))[kind]
        done[s, kind, m] = free[s] = start + took
        nexts[s][kind] += 1
        line.append(Task(s, kind, m, start, start + took))
    return line


def _ready(
    done: dict[tuple[int, str, int], float], nexts: dict[str, int], s: int, kind: str,
    stages: int, micro_batches: int, most: int,
) -> float | None:  # fmt: skip
    """When the next task of a kind could begin on stage s; None if that is not known yet."""
    m = nexts[kind]
    if m == micro_batches or (kind == "F" and m - nexts["W"] >= most):
        return None
    if kind == "F":
        return done.get((s - 1, "F", m)) if s else 0.0
    if kind == "W":
        return done.get((s, "B", m))
    return done.get((s + 1, "B", m) if s < stages - 1 else (s, "F", m))


def _in_order(times: Sequence[Times], orders: Sequence[Sequence[tuple[str, int]]]) -> Line:
    """Every stage does its tasks in its order, each as soon as what it needs has arrived."""
    stages, line = len(times), Line()
    done: dict[tuple[int, str, int], float] = {}
    free, at = [0.0] * stages, [0] * stages
    while any(i < len(order) for i, order in zip(at, orders, strict=True)):
        for s, order in enumerate(orders):
            while at[s] < len(order):
                kind, m = order[at[s]]
                below = (s - 1, "F", m) if kind == "F" else (s + 1, "BW", m)
                first = s == 0 if kind == "F" else s == stages - 1
                if not first and below not in done:
                    break
                start = max(free[s], 0.0 if first else done[below])
                t = times[s]
                took = t.forward if kind == "F" else t.inputs + t.params
                done[s, kind, m] = free[s] = start + took
                line.append(Task(s, kind, m, start, start + took))
                at[s] += 1
    return line


# Of local learning and of backpropagation, what is drawn.
LINES: dict[str, Callable[[Sequence[Times], int], Line]] = {
    "GPipe": gpipe,
    "1F1B": one_forward_one_backward,
    "zero bubble (ZB-H1)": zero_bubble,
    "local, direct": local,
    "local, direct, streamed": local,
}
