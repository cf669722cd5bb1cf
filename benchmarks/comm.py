"""What do the devices of a mesh send each other in a training step, against backpropagation?

    python -m benchmarks.comm [--quick] [--json FILE] [--models mlp] [--counts 2 4 8]

For every number of devices a process of its own with so many host devices, which share the
processor: bytes are those of any mesh of that size, milliseconds tell what the same work costs
when it is cut up, not what more hardware gains. BP, DFA and direct SSA at three ranks; the rows
of a batch are spread, the state is whole on every device. ``all_reduces`` counts operations, as
the compiler combined them; ``all_reduce_bytes`` is the size of what they sum; ``other_bytes`` the
results of all other collectives; ``bytes_to_bp`` and ``ms_to_bp`` divide by this project's bp on
as many devices; ``kernel_sums`` counts all-reduced arrays of the shape of a dense
kernel whose place factors could take or have taken.
"""

import argparse
import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import contestants, training
from benchmarks.contestants import Entry
from benchmarks.networks import Case, network, random_batch
from experiments.measure.timing import side_by_side
from ssa_jax.models import MODELS
from ssa_jax.networks.models import split
from ssa_jax.parallel import compiling, mesh
from ssa_jax.parallel.collectives import Collective, collectives
from ssa_jax.training import train

Row = dict[str, Any]
NAMES = ("mlp", "smallconv")
COUNTS = (2, 4, 8)
ENTRIES = (Entry("bp"), Entry("dfa"), Entry("ssa", 0.5), Entry("ssa", 0.25), Entry("ssa", 0.125))
BATCH = 32


def compiled(case: Case, entry: Entry, layout: mesh.Layout) -> tuple[Any, Any, Any]:
    """The compiled step of an entry on the devices of a layout, its state and a batch."""
    built = contestants.build(case, entry)
    keep, whole = layout.keep, layout.whole
    step = layout.returning(
        lambda done: (keep(done[0]), whole(done[1])), train.make_step(*built[:4])
    )
    with layout.active():
        state = layout.place(built.state)
        batch = jax.jit(layout.rows)(layout.place(random_batch(case), whole=True))
        return jax.jit(step, donate_argnums=0).lower(state, batch).compile(), state, batch


def kernel_shapes(case: Case, entry: Entry) -> set[tuple[int, ...]]:
    """Shapes of the dense network's kernels, as they are and as matrices.

    Of an entry on factors without those of the layers that are dense there too.
    """
    dense, own = (_matrices(case, rank) for rank in (None, entry.rank))
    shapes = dense if entry.rank is None else dense - own
    return shapes | {(s[0] * s[2], s[1] * s[3]) for s in shapes if len(s) == 4}


def _matrices(case: Case, rank: float | None) -> set[tuple[int, ...]]:
    image = jax.ShapeDtypeStruct((1, *case.input_shape), "float32")
    params = jax.eval_shape(lambda: split(network(case, rank), image).params)
    return {x.shape for x in jax.tree.leaves(params) if x.ndim > 1}


def kernel_sums(sent: list[Collective], shapes: set[tuple[int, ...]]) -> int:
    """All-reduced arrays that have one of the shapes, in any order of their axes."""
    wanted = {tuple(sorted(s)) for s in shapes}
    return sum(
        tuple(sorted(shape)) in wanted
        for c in sent if c.kind == "all-reduce" for _, shape in c.arrays
    )  # fmt: skip


def measure(case: Case, rounds: int) -> list[Row]:
    """One row an entry on all devices of this process, steps timed side by side."""
    layout = mesh.make_layout()
    found = [compiled(case, entry, layout) for entry in ENTRIES]
    times = side_by_side([((lambda: None), _call(*one)) for one in found], rounds, 600.0)
    rows: list[Row] = []
    for entry, (program, _, _), timing in zip(ENTRIES, found, times, strict=True):
        sent = collectives(program.as_text())
        summed = [c for c in sent if c.kind == "all-reduce"]
        row = {
            "model": case.model,
            "method": entry.method,
            "rank": entry.rank,
            "batch": case.batch,
            "devices": layout.devices,
            "all_reduces": len(summed),
            "all_reduced_arrays": sum(len(c.arrays) for c in summed),
            "all_reduce_bytes": sum(c.bytes for c in summed),
            "other_bytes": sum(c.bytes for c in sent if c not in summed),
            "kernel_sums": kernel_sums(sent, kernel_shapes(case, entry)),
            "ms": round(timing.median_ms, 4),
        }
        first = rows[0] if rows else row
        row["bytes_to_bp"] = round(row["all_reduce_bytes"] / first["all_reduce_bytes"], 4)
        row["ms_to_bp"] = round(row["ms"] / first["ms"], 4)
        rows.append(row)
    return rows


def _call(program: Any, state: Any, batch: Any) -> Any:
    # The step is donated its state: each call goes on from what the last one left.
    held = [jax.tree.map(jnp.copy, state)]

    def call() -> None:
        held[0], metrics = program(held[0], batch)
        jax.block_until_ready((held[0], metrics))

    return call


def in_process(case: Case, devices: int, rounds: int) -> list[Row]:
    """The rows of a case in a fresh process with so many host devices."""
    count = f"--xla_force_host_platform_device_count={devices}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {count}"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.comm", "--one", json.dumps(case), str(rounds)],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def _arguments() -> argparse.Namespace:
    parser = training.parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), help="only these")
    parser.add_argument("--counts", nargs="+", type=int, help="numbers of devices")
    parser.add_argument("--one", nargs=2, metavar=("CASE", "ROUNDS"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measures every model on every number of devices and prints the table."""
    args = _arguments()
    if args.one:
        compiling.use_cache(compiling.OFF)
        print(json.dumps(measure(Case(*json.loads(args.one[0])), int(args.one[1]))))
        return
    record = training.Record(args)
    for name in args.models or (NAMES[:1] if args.quick else NAMES):
        for devices in args.counts or (COUNTS[:1] if args.quick else COUNTS):
            case = Case(name, 8 if args.quick else BATCH)
            record.add(in_process(case, devices, training.ROUNDS[args.quick]))
    record.print()


if __name__ == "__main__":
    main()
