"""What are a run's programs on accelerators that this machine does not have?

    python -m benchmarks.aot [--target h100 v5e:4x4] [--models vgg13 resnet32] [--batch N]
        [--quick] [--json FILE] [--notes TEXT]

Each row is one program, compiled here for a GPU or a TPU slice: kernels, distinct products, loops,
conditionals, collectives with their bytes, bytes a device, seconds to trace and compile, and the
time that the device's rates allow at best (see `ssa_jax.parallel.ahead`). Images of CIFAR-10's
shape; a batch of 128 a GPU, and of 2048 on a slice. Needs the extra `aot-cuda` or `aot-tpu`.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence

from benchmarks.programs import Row, main
from ssa_jax.errors import ConfigError
from ssa_jax.models import MODELS
from ssa_jax.parallel import ahead
from ssa_jax.parallel.ahead import Target
from ssa_jax.runs.build import build
from ssa_jax.runs.config import Config
from ssa_jax.runs.fitted import Described
from ssa_jax.runs.plan import planned

RANK = 0.25
# Method, look-ahead and memory; the first is what the others are compared with.
ENTRIES = (
    ("bp", 0, "taped"),
    ("svd_bp", 0, "taped"),
    ("ssa", 0, "taped"),
    ("ssa", 0, "streamed"),
    ("ssa", 1, "taped"),
)
CIFAR = Described((32, 32, 3), 10, 50_000, "float32", None)


def measure(args: argparse.Namespace) -> Iterator[list[Row]]:
    """A row a program, as soon as it is known."""
    models, entries = (["mlp"], ENTRIES[::2]) if args.quick else (args.models, ENTRIES)
    for name in args.target:
        where = ahead.target(name)
        batch = args.batch or (2048 if where.layout.devices > 1 else 128)
        for model in models:
            yield from ([row] for row in _network(where, model, batch, entries))


def _network(
    where: Target, model: str, batch: int, entries: Sequence[tuple[str, int, str]]
) -> Iterator[Row]:
    kernels: dict[str, int] = {}
    for method, lookahead, memory in entries:
        config = Config(
            model=model, method=method, rank_init=RANK, batch_size=batch, memory=memory,
            feedback_lookahead=lookahead,
        )  # fmt: skip
        for one in planned(build(config, CIFAR), CIFAR.example, batch, where):
            made = one.compiled
            first = kernels.setdefault(one.program, made.kernels)
            yield {
                "target": where.name, "model": model, "batch": batch, "method": method,
                "rank": None if method == "bp" else RANK, "lookahead": lookahead,
                "memory": memory, "program": one.program, **made._asdict(), "macs": one.macs,
                "best_ms": round(1e3 * one.best_s, 4),
                "kernels_to_bp": round(made.kernels / max(1, first), 2),
            }  # fmt: skip


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that other benchmarks do not have."""
    parser.add_argument("--target", nargs="+", default=["h100"], help="h100, v5e:AxB, v5p:AxBxC")
    parser.add_argument(
        "--models", nargs="+", choices=tuple(MODELS), default=["mlp", "vgg13", "resnet32"]
    )
    parser.add_argument("--batch", type=int, help="examples in a step of all devices")


if __name__ == "__main__":
    try:
        main(__doc__, measure, add_flags)
    except ConfigError as e:
        sys.exit(f"error: {e}")
