"""What are a run's programs on accelerators that this machine does not have?

    python -m benchmarks.aot [--target h100 v5e:4x4] [--models vgg13 resnet32] [--batch N ...]
        [--quick] [--json FILE] [--notes TEXT]
    python -m benchmarks.aot --imagenet --target v5e:4x4 --models resnet50 --batch 1024 32768

Each row is one program, compiled here for a GPU or a TPU slice: kernels, distinct products, loops,
conditionals, collectives with their bytes, bytes a device, seconds to trace and compile, and the
time that the device's rates allow at best (see `ssa_jax.parallel.ahead`); of one that the compiler
refuses for want of memory, what it asks for. Images of CIFAR-10's shape, a batch of 128 a GPU and
of 2048 on a slice; or with `--imagenet` images of 224 pixels and a thousand classes, and of the
programs the initialisation and the step: of backpropagation, of direct SSA streamed block by block,
and of its default. On several devices backpropagation and that default stand once more with
statistics of batch norms by device. Where the default of ssa comes to another of the forms, of
which one unit ahead is with falling ranks, it is measured once. Needs the extra `aot-cuda` or
`aot-tpu`.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

from benchmarks.programs import Row, main
from ssa_jax.errors import ConfigError
from ssa_jax.models import MODELS
from ssa_jax.parallel import ahead
from ssa_jax.parallel.ahead import Compiled, Target, TooLarge
from ssa_jax.runs.build import build
from ssa_jax.runs.config import Config
from ssa_jax.runs.fitted import Described
from ssa_jax.runs.plan import planned

RANK = 0.25


class Entry(NamedTuple):
    """A method, the memory of its steps, units of look-ahead, and layers or blocks in a unit.

    The network decides what is None, as in a run. Statistics are those of batch norms.
    """

    method: str
    memory: str = "taped"
    lookahead: int | None = 0
    unit_size: int | None = 1
    statistics: str = "global"


DEFAULT = (
    Entry("ssa", lookahead=None, unit_size=None),
    Entry("ssa", "streamed", lookahead=None, unit_size=None),
)
# The first is what the others are compared with.
ENTRIES = (
    Entry("bp"),
    Entry("svd_bp"),
    Entry("ssa"),
    Entry("ssa", "streamed"),
    Entry("ssa", lookahead=1),
    *DEFAULT,
)
CIFAR = Described((32, 32, 3), 10, 50_000, "float32", None)
LARGE_ENTRIES = (Entry("bp"), Entry("ssa", "streamed"), DEFAULT[0])
# Of several devices alone: what they tell each other but for batch norms.
BY_DEVICE = (Entry("bp", statistics="device"), DEFAULT[0]._replace(statistics="device"))
IMAGENET = Described((224, 224, 3), 1000, 1_281_167, "float32", None)


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    """A row a program, as soon as it is known."""
    models, entries = (["mlp"], ENTRIES[:5:2]) if args.quick else (args.models, ENTRIES)
    data, last = (IMAGENET, "step") if args.imagenet else (CIFAR, "compaction")
    for name in args.target:
        where = ahead.target(name)
        batches = args.batch or [2048 if where.layout.devices > 1 else 128]
        for model, batch in itertools.product(models, batches):
            of_data = LARGE_ENTRIES if args.imagenet else entries
            if where.layout.devices > 1:
                of_data = (*of_data, *BY_DEVICE)
            yield from ([row] for row in _network(where, model, data, batch, of_data, last))


def _network(
    where: Target, model: str, data: Described, batch: int,
    entries: Sequence[Entry], last: str,
) -> Iterator[Row]:  # fmt: skip
    kernels: dict[str, int] = {}
    measured: set[Entry] = set()
    normed = True
    for method, memory, lookahead, size, statistics in entries:
        if statistics == "device" and not normed:
            continue
        # The entry that looks ahead is a run with falling ranks, which has a program more.
        schedule = "hybrid" if method == "ssa" and lookahead else "none"
        config = Config(
            model=model, method=method, rank_init=RANK, batch_size=batch, memory=memory,
            feedback_lookahead=lookahead, unit_size=size, rank_schedule=schedule,
            batch_statistics=statistics,
        )  # fmt: skip
        built = build(config, data)
        normed = bool(jax.tree.leaves(built.state.mstate))
        lookahead, size = built.config.feedback_lookahead, built.config.unit_size
        form = Entry(method, memory, lookahead, size, statistics)
        if form in measured:
            continue
        measured.add(form)
        for one in planned(built, data.example, batch, where):
            made = one.compiled
            row: Row = {
                "target": where.name, "model": model, "batch": batch, "method": method,
                "rank": None if method == "bp" else RANK, "lookahead": lookahead,
                "unit_size": size,
                "schedule": schedule, "memory": memory, "statistics": statistics,
                "program": one.program,
                **dict.fromkeys(Compiled._fields), **made._asdict(), "macs": one.macs,
                "best_ms": None if one.best_s is None else round(1e3 * one.best_s, 4),
                "kernels_to_bp": None, "refused": isinstance(made, TooLarge),
            }  # fmt: skip
            if isinstance(made, Compiled):
                first = kernels.setdefault(one.program, made.kernels)
                row["kernels_to_bp"] = round(made.kernels / max(1, first), 2)
            yield row
            if one.program == last:
                break


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that other benchmarks do not have."""
    targets = "h100, h100xN, v5e:AxB, v5p:AxBxC"
    parser.add_argument("--target", nargs="+", default=["h100"], help=targets)
    parser.add_argument(
        "--models", nargs="+", choices=tuple(MODELS), default=["mlp", "vgg13", "resnet32"]
    )
    parser.add_argument("--batch", type=int, nargs="+", help="examples in a step of all devices")
    parser.add_argument("--imagenet", action="store_true", help="images of 224 pixels")


if __name__ == "__main__":
    try:
        main(__doc__, measure, add_flags)
    except ConfigError as e:
        sys.exit(f"error: {e}")
