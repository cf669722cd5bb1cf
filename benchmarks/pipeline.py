"""What does a pipeline of local learning gain over one of backpropagation?

    python -m benchmarks.pipeline [--quick] [--json FILE] [--target v5e:4x4]

Without a target three kinds of rows (``part``). "model": speed-ups over one device of
backpropagation, from counted multiply-accumulates of the units, a stage's share of them being
about equal, and time lines of the schedules (`benchmarks.schedules`): nothing but products counts,
and sending takes no time. "sent": bytes of a step and of a device. "measured": steps of two host
devices, each with one thread, beside what the model says. With a target one kind, "compiled": the
step over stages for a TPU slice that is not here. The networks are on factors at rank 0.25 in all.
"""

import argparse
import functools
import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

# Before JAX is there: two devices, of one thread each, so that they are as fast together as alone.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false "
    "intra_op_parallelism_threads=1",
)

import jax

from benchmarks import schedules
from benchmarks.networks import Case, network, random_batch
from benchmarks.programs import Row, main
from benchmarks.schedules import Times, span
from experiments.measure.timing import side_by_side
from ssa_jax.errors import ConfigError
from ssa_jax.methods import METHODS, FeedbackOptions, Method
from ssa_jax.methods import Network as Known
from ssa_jax.networks.forward import output_shapes
from ssa_jax.networks.models import split
from ssa_jax.parallel import ahead
from ssa_jax.parallel.mesh import Layout, staged_mesh
from ssa_jax.parallel.pipeline import partition
from ssa_jax.runs import plan
from ssa_jax.runs.build import build
from ssa_jax.runs.config import Config
from ssa_jax.runs.fitted import Described
from ssa_jax.stages import state as states
from ssa_jax.stages.step import Stages
from ssa_jax.training import costs, memory, optim, train
from ssa_jax.training.losses import LossWeights
from ssa_jax.types import Batch, TrainState

RANK, WALK, BATCH = 0.25, 0.25, 2048
CHAIN = Case("mlp", 1, depth=15)
CASES = (CHAIN, Case("vgg13", 1), Case("resnet32", 1))
STAGES, MICRO_BATCHES = (2, 4, 8, 16), (1, 4, 16, 64)
METHODS_OF = {
    "bp": ("svd_bp", FeedbackOptions()),
    "direct": ("ssa", FeedbackOptions(path="random", update="fixed")),
    "walk": ("ssa", FeedbackOptions(path="sequential", rank=WALK)),
}


class Ready(NamedTuple):
    """A network with a method, and its state as shapes or arrays."""

    units: Sequence[Any]
    method: Method
    optimizer: Any
    state: TrainState


def _ready(case: Case, kind: str, *, shapes_alone: bool = True) -> Ready:
    apart = split(network(case, RANK), random_batch(case._replace(batch=1)).images)
    shapes = output_shapes(*apart[:3], case.input_shape)
    few = random_batch(case._replace(batch=4))
    name, options = METHODS_OF[kind]
    method = METHODS[name](Known(apart.units, shapes, few.images, targets=few.labels), options)
    optimizer = optim.make_optimizer(optim.OptimizerConfig(1e-3, 1000, 100))
    key = jax.random.key(0)
    init = functools.partial(train.init_state, method, optimizer)
    make = functools.partial(jax.eval_shape, init) if shapes_alone else init
    state = make(apart.params, apart.mstate, key)
    return Ready(apart.units, method, optimizer, state)


WEIGHTS = LossWeights(1.0, 0.0, 0.0, 0.0)


# Multiply-accumulates (forward, signal, update) of every unit.
Units = Sequence[tuple[float, float, float]]
# Of 64 units of which all passes of backpropagation take the same.
EQUAL: dict[str, Units] = {
    "bp": [(1, 1, 1)] * 64, "direct": [(1, 0, 1)] * 64, "walk": [(1, WALK, 1)] * 64,
}  # fmt: skip


class Counted(NamedTuple):
    """A network, what its units cost for one example, and the shapes of their outputs.

    Attributes:
      ready: with direct signals.
      units: by kind of method.
      activations: by kind, bytes that a unit's gradient keeps.
      shapes: of the outputs of the units.
    """

    ready: Ready
    units: dict[str, Units]
    activations: dict[str, list[int]]
    shapes: Sequence[tuple[int, ...]]


def _counted(case: Case) -> Counted:
    batch, units, activations = random_batch(case), {}, {}
    for kind in METHODS_OF:
        ready = _ready(case, kind)
        found = costs.step_costs(*ready[:3], WEIGHTS, ready.state, batch)
        units[kind] = [(c.forward, c.signal, c.update) for c in found]
        activations[kind] = [c.activation_bytes for c in found]
    ready = _ready(case, "direct")
    shapes = output_shapes(ready.units, ready.state.params, ready.state.mstate, case.input_shape)
    return Counted(ready, units, activations, shapes)


def _times(units: Units, stages: int, again: bool = False) -> list[Times]:
    """Of every stage; `again` with a second forward pass in W."""
    works = [f + b + w + again * f for f, b, w in units]
    bounds = partition(works, stages)
    sums = [
        [sum(unit[k] for unit in units[a:b]) for k in range(3)]
        for a, b in itertools.pairwise(bounds)
    ]
    return [Times(f, b, w + again * f) for f, b, w in sums]


def _model(model: str, units: dict[str, Units], stages: int, parts: int) -> Row:
    """Speed-ups over backpropagation on one device, which has no bubble."""
    bp, direct, walk = (units[kind] for kind in METHODS_OF)
    alone = parts * sum(map(sum, bp))
    of_bp, of_walk = _times(bp, stages), _times(walk, stages)
    spans = {
        "GPipe": span(schedules.gpipe(of_bp, parts)),
        "1F1B": span(schedules.one_forward_one_backward(of_bp, parts)),
        "ZB-H1": schedules.zero_bubble_bound(of_bp, parts),
        "ZB-H2": schedules.zero_bubble_bound(of_bp, parts, kept=2),
        "walk": span(schedules.one_forward_one_backward(of_walk, parts)),
        "direct": span(schedules.local(_times(direct, stages), parts)),
        "streamed": span(schedules.local(_times(direct, stages, again=True), parts)),
    }
    return {
        "part": "model", "model": model, "stages": stages, "micro_batches": parts,
        **{name: round(alone / time, 3) for name, time in spans.items()},
    }  # fmt: skip


def _sent(case: Case, counted: Counted, stages: int, parts: int) -> Row:
    """Bytes that stages send each other in a step, and that a device of the costliest holds."""
    ready, rows = counted.ready, BATCH // parts
    bounds = partition(list(map(sum, counted.units["direct"])), stages)
    groups = list(itertools.pairwise(bounds))
    widths = [math.prod(counted.shapes[a - 1]) for a, _ in groups[1:]]
    classes = counted.shapes[-1][0]
    layout = Layout(jax.sharding.AbstractMesh((1, stages), ("devices", "stage")))
    example = jax.eval_shape(lambda: random_batch(case))
    over = Stages(
        ready.units, ready.method, ready.optimizer, WEIGHTS, layout, bounds, parts, example
    )
    shapes = states.shapes_of(ready.state)
    own = states.parts_of(shapes, over.owners(shapes))
    state = sum(4 * n for part in own.values() for n in part.sizes.values())
    taped, of_bp = (
        [rows * sum(counted.activations[kind][a:b]) for a, b in groups] for kind in ("direct", "bp")
    )
    in_flight = min(stages, parts)
    return {
        "part": "sent", "model": case.model, "stages": stages, "micro_batches": parts,
        "up": 4 * BATCH * max(widths) * (stages - 1), "outputs": 4 * BATCH * classes,
        "bp": 2 * 4 * BATCH * sum(widths),
        "walk": round((1 + RANK * WALK) * 4 * BATCH * sum(widths)),
        "state": state, "whole_state": memory.nbytes(ready.state),
        "taped": in_flight * max(taped),
        "streamed": in_flight * rows * 4 * max(widths) + rows * max(counted.activations["direct"]),
        "1F1B": in_flight * max(of_bp), "GPipe": parts * max(of_bp),
    }  # fmt: skip


def _measured(quick: bool) -> Iterator[list[Row]]:
    """Steps of one and of two stages, each on a device of one thread, in turn."""
    case = Case("mlp", 64 if quick else 1024, depth=4 if quick else 15)
    ready, batch = _ready(case, "direct", shapes_alone=False), random_batch(case)
    units = _counted(case._replace(batch=1)).units["direct"]
    for parts in (2,) if quick else (1, 4, 16):
        cases = list(itertools.product(("taped", "streamed"), (1, 2)))
        calls = [_step(ready, batch, stages, parts, units, mode) for mode, stages in cases]
        times = side_by_side(calls, rounds=3 if quick else 21, budget_s=20.0)
        ms = dict(zip(cases, (time.min_ms for time in times), strict=True))
        for mode in ("taped", "streamed"):
            works = [_times(units, stages, again=mode == "streamed") for stages in (1, 2)]
            spans = [span(schedules.local(work, parts)) for work in works]
            one, two = ms[mode, 1], ms[mode, 2]
            yield [
                {
                    "part": "measured", "model": case.model, "memory": mode, "stages": 2,
                    "micro_batches": parts, "ms_of_one": round(one, 2), "ms": round(two, 2),
                    "speed_up": round(one / two, 3), "modelled": round(spans[0] / spans[1], 3),
                }
            ]  # fmt: skip


def _step(
    ready: Ready, batch: Batch, stages: int, parts: int, units: Units, mode: str
) -> Any:  # fmt: skip
    """A contestant: a step over stages, from a copy of its state, which it is given."""
    layout = Layout(staged_mesh(jax.devices()[:stages], stages))
    passes = 2 if mode == "streamed" else 1
    bounds = partition([passes * f + b + w for f, b, w in units], stages)
    example = jax.eval_shape(lambda: batch)
    over = Stages(
        ready.units, ready.method, ready.optimizer, WEIGHTS, layout, bounds, parts, example, mode
    )
    with layout.active():
        kept, rows = [over.divide(layout.place(ready.state))], layout.place(batch, whole=True)

    def call() -> None:
        with layout.active():
            kept[0], metrics = over.step(kept[0], rows)
            jax.block_until_ready((kept[0], metrics))

    return lambda: None, call


def _compiled(args: argparse.Namespace) -> Iterator[list[Row]]:
    cifar = Described((32, 32, 3), 10, 50_000, "float32", None)
    for name in args.target:
        for model, stages, parts in TPU[: 1 if args.quick else None]:
            where = ahead.target(name, stages)
            config = Config(
                model=model, method="ssa", rank_init=RANK, batch_size=BATCH, feedback="random",
                feedback_update="fixed", feedback_lookahead=0, stages=stages, micro_batches=parts,
            )  # fmt: skip
            built = build(config, cifar)
            for one in plan.planned(built, cifar.example, BATCH, where, parts):
                if one.program == "step":
                    yield [
                        {
                            "part": "compiled", "target": name, "model": model.split(":")[-1],
                            "stages": stages, "micro_batches": parts, "batch": BATCH,
                            "memory": built.memory, **one.compiled._asdict(),
                            "best_ms": round(1e3 * one.best_s, 4),
                        }
                    ]  # fmt: skip
                    break


# A network, stages, micro-batches.
TPU = (
    ("benchmarks.pipeline:chain", 1, 8), ("benchmarks.pipeline:chain", 4, 8),
    ("benchmarks.pipeline:chain", 16, 8), ("vgg13", 4, 8),
)  # fmt: skip


def chain(shape: Any, classes: int, *, rank: float | None, rngs: Any) -> Any:
    """The chain of equal layers, as a model that a config can name."""
    del shape, classes, rngs
    return network(CHAIN, rank)


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    """All rows, a part at a time; those of a target alone where one is given."""
    if args.target:
        yield from _compiled(args)
        return
    yield from _measured(args.quick)
    for stages in (2,) if args.quick else STAGES:
        yield [_model("equal units", EQUAL, stages, m) for m in MICRO_BATCHES]
    for case in (CHAIN._replace(depth=3),) if args.quick else CASES:
        counted = _counted(case)
        for stages in (2,) if args.quick else STAGES:
            if stages <= len(counted.shapes):
                yield [_model(case.model, counted.units, stages, m) for m in MICRO_BATCHES]
                yield [_sent(case, counted, stages, 4 * stages)]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that other benchmarks do not have."""
    parser.add_argument("--target", nargs="+", default=[], help="v5e:AxB, v5p:AxBxC")


if __name__ == "__main__":
    try:
        main(__doc__, measure, add_flags)
    except ConfigError as e:
        sys.exit(f"error: {e}")
