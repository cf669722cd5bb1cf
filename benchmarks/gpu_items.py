"""What `benchmarks.gpu` measures, in the order of its value, and how."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu_crew import Crew, Worker

Row = dict[str, Any]

RANK = 0.25
# Of the contestants of a step, by the name that a record gives them.
STEPS: dict[str, Row] = {
    "bp": {"method": "bp"},
    "svd_bp": {"method": "svd_bp"},
    "direct": {"method": "ssa", "feedback_lookahead": 0},
    "direct, streamed": {"method": "ssa", "feedback_lookahead": 0, "memory": "streamed"},
    "ssa, default": {"method": "ssa"},
    "walk": {"method": "ssa", "feedback": "sequential", "feedback_rank": 0.25},
    "dfa": {"method": "dfa"},
}
TRAINED: dict[str, Row] = {
    "bp": {"method": "bp"},
    "walk": STEPS["walk"],
    "ssa, default": STEPS["ssa, default"],
    "direct, one ahead": {"method": "ssa", "feedback_lookahead": 1},
    "svd_bp": {"method": "svd_bp"},
}
TORCH = {"torch": False, "torch, compiled": True}
# Model, precision and batch, with the seconds that an H200 with 16 CPUs may need: to import, to
# compile all side by side, to time them in turn. The training of a model stands behind its steps.
GROUPS = (
    ("vgg13", "float32", 128, 90), ("vgg13", "train", 128, 150), ("vgg13", "bfloat16", 512, 80),
    ("resnet32", "float32", 128, 110), ("resnet32", "train", 128, 150),
    ("resnet18", "bfloat16", 512, 110), ("vgg13", "bfloat16", 128, 80),
    ("vgg13", "float32", 512, 90), ("resnet32", "bfloat16", 512, 110),
    ("resnet18", "float32", 128, 110), ("resnet32", "float32", 512, 110),
    ("resnet32", "bfloat16", 128, 110), ("resnet18", "float32", 512, 110),
    ("resnet18", "bfloat16", 128, 110),
)  # fmt: skip
QUICK = (("mlp", "bfloat16", 8, 150), ("mlp", "train", 8, 100), ("smallconv", "float32", 8, 200))
# Of a training's seconds those before the first step.
_START_S = 60.0
_MOST_EPOCHS = 30


class Item(NamedTuple):
    """Something that is measured whole or left out.

    Attributes:
      name: what the record calls it.
      kind: ``"step"`` or ``"train"``.
      estimate: seconds that it may need.
      cases: one a process.
    """

    name: str
    kind: str
    estimate: float
    cases: tuple[Row, ...]


class Setup(NamedTuple):
    """What holds for all items.

    Attributes:
      logs: folder of the errors of processes.
      rounds: timings of each step, in turn.
      data: folder of parts; None for no training.
      train_size: training images in it.
      max_steps: of a training; 0 for all.
    """

    logs: Path
    rounds: int = 7
    data: Path | None = None
    train_size: int = 0
    max_steps: int = 0


def items(groups: Sequence[tuple[str, str, int, int]], torch: bool) -> list[Item]:
    """All items of the groups, each with all of its cases."""
    return [
        _train_item(model, batch, estimate) if precision == "train"
        else _step_item(model, precision, batch, estimate, torch)
        for model, precision, batch, estimate in groups
    ]  # fmt: skip


def _step_item(model: str, precision: str, batch: int, estimate: float, torch: bool) -> Item:
    shared = {"model": model, "precision": precision, "batch": batch}
    name = f"{model}-{precision}-{batch}"
    ours = [
        {
            **shared, "name": f"{name}-{label}", "kind": "step", "contestant": label,
            "settings": {
                "model": model, "precision": precision, "batch_size": batch, "rank_init": RANK,
                "memory": "taped", **settings,
            },
        }
        for label, settings in STEPS.items()
    ]  # fmt: skip
    peers = [
        {**shared, "name": f"{name}-{label}", "kind": "torch", "contestant": label,
         "compiled": compiled}
        for label, compiled in TORCH.items() if torch
    ]  # fmt: skip
    return Item(f"steps of {model}, {precision}, batch {batch}", "step", estimate, (*peers, *ours))


def _train_item(model: str, batch: int, estimate: float) -> Item:
    cases = tuple(
        {
            "model": model, "batch": batch, "precision": "float32", "kind": "train",
            "name": f"{model}-train-{label}", "contestant": label,
            "settings": {"batch_size": batch, "rank_init": RANK, **settings},
        }
        for label, settings in TRAINED.items()
    )  # fmt: skip
    return Item(f"training of {model}", "train", estimate, cases)


def epochs_that_fit(seconds: float, step_ms: float, steps_per_epoch: int) -> int:
    """Epochs of processes whose steps take `step_ms` together, with a third for the rest of it."""
    return max(1, min(_MOST_EPOCHS, int(seconds / (1.33e-3 * step_ms * steps_per_epoch))))


def _about(case: Row) -> Row:
    return {name: case[name] for name in ("kind", "contestant", "model", "precision", "batch")}


def measure_steps(item: Item, setup: Setup, seconds: float) -> Iterator[Row]:
    """Compiles all cases side by side, then times in turn those that were ready.

    A row a case when it is compiled, and a row when it is timed; of a case that ends early or is
    not ready after two thirds of the seconds, an error.
    """
    begun = time.monotonic()
    with Crew(setup.logs) as crew:
        said: dict[Worker, list[Row | None]] = {}
        for case, worker, row in crew.hear(item.cases, begun + seconds * 2 / 3):
            if worker and row and row.get("ready"):
                said[worker] = []
                figures = {name: value for name, value in row.items() if name != "ready"}
                yield {"what": "compiled", **_about(case), **_rounded(figures)}
            elif worker is None or row:
                waited = time.monotonic() - begun
                yield {"what": "error", **_about(case), "error": f"not ready after {waited:.0f} s"}
            elif worker.ready is None:
                yield {"what": "error", **_about(case), "error": worker.last_words()}
        for _ in range(setup.rounds):
            for worker, timings in said.items():
                if None not in timings:
                    left = begun + seconds - time.monotonic()
                    timings.append(crew.time(worker, max(1.0, left)))
        for worker in sorted(said, key=lambda one: item.cases.index(one.case)):
            timings = said[worker]
            done = [t for t in timings if t]
            if done:
                yield {"what": "step", **_about(worker.case), **_rounded(_step_row(worker, done))}
            if len(done) < setup.rounds:
                yield {"what": "error", **_about(worker.case), "error": worker.last_words()}


def _step_row(worker: Worker, timings: Sequence[Row]) -> Row:
    """Medians of the timings, beside what was known when the step was compiled."""
    known = {name: value for name, value in (worker.ready or {}).items() if name != "ready"}
    step = statistics.median(t["step_ms"] for t in timings)
    every = timings[0].get("every") or 0
    refresh = statistics.median(t["refresh_ms"] for t in timings) if every else 0.0
    return {
        **known, "ms": step + (refresh / every if every else 0.0), "step_ms": step,
        "least_ms": min(t["step_ms"] for t in timings), "refresh_ms": refresh, "every": every,
        "peak_bytes": timings[-1]["peak_bytes"], "rounds": len(timings),
        "steps": timings[0]["steps"],
    }  # fmt: skip


def _rounded(row: Row) -> Row:
    return {n: round(v, 4) if isinstance(v, float) else v for n, v in row.items()}


def measure_training(
    item: Item, setup: Setup, seconds: float, known: Callable[[Row], float | None]
) -> Iterator[Row]:
    """Trains all cases side by side, for as many epochs as fit; a row an epoch and one at the end.

    Args:
      item: the trainings.
      setup: of all items.
      seconds: after which those that still run are ended.
      known: of a case the milliseconds of its step, where they were measured.
    """
    per_epoch = setup.train_size // item.cases[0]["batch"]
    times = [known(case) for case in item.cases]
    # Without any, about what one of them takes alone.
    found = [t for t in times if t] or [15.0]
    together = statistics.mean(found) * len(item.cases)
    epochs = epochs_that_fit(item.estimate - _START_S, together, per_epoch)
    if setup.max_steps:
        epochs = 1
    limits = {"epochs": epochs, "max_steps": setup.max_steps, "schedule_steps": setup.max_steps}
    cases = [
        {**case, "data": str(setup.data), "settings": {**case["settings"], **limits}}
        for case in item.cases
    ]
    until = time.monotonic() + seconds
    with Crew(setup.logs, jobs=len(cases)) as crew:
        finished = set()
        for case, worker, row in crew.hear(cases, until):
            about = {**_about(case), "epochs": epochs, "beside": len(cases)}
            if row and "late" not in row:
                finished |= {case["name"]} if row.pop("final", False) else set()
                what = "trained" if case["name"] in finished else "epoch"
                yield {"what": what, **about, **_rounded(row)}
            elif case["name"] not in finished:
                why = f"ended after {seconds:.0f} s" if row or not worker else worker.last_words()
                yield {"what": "error", **about, "error": why}
