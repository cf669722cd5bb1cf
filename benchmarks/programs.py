"""Several programs that do the same thing, compiled and timed side by side."""

import argparse
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.measure.timing import contestant, side_by_side
from experiments.show import markdown
from ssa_jax.reporting.environment import environment

Row = dict[str, Any]


def compare(
    functions: Mapping[str, Callable[..., Any]],
    arguments: Mapping[str, tuple[Any, ...]] | tuple[Any, ...],
    rounds: int,
    field: str = "program",
    base: str = "ratio_to_first",
) -> list[Row]:
    """One row a function: ``ms`` (median), its ratio to the first, ``temp_bytes``, ``rounds``.

    Args:
      functions: by name.
      arguments: of all, or of each by its name.
      rounds: measured rounds; fewer of functions that take long.
      field: what the rows call the name.
      base: what the rows call the ratio.
    """
    given = arguments if isinstance(arguments, Mapping) else dict.fromkeys(functions, arguments)
    programs = {name: jax.jit(f).lower(*given[name]).compile() for name, f in functions.items()}
    ready = [contestant(program, *given[name]) for name, program in programs.items()]
    times = side_by_side(ready, rounds, budget_s=1.0)
    rows = []
    for (name, program), time in zip(programs.items(), times, strict=True):
        memory = program.memory_analysis()
        rows.append(
            {
                field: name,
                "ms": round(time.median_ms, 3),
                base: round(time.median_ms / times[0].median_ms, 3),
                "temp_bytes": None if memory is None else memory.temp_size_in_bytes,
                "rounds": time.rounds,
            }
        )
    return rows


def main(
    doc: str,
    measure: Callable[..., Iterable[list[Row]]],
    add_flags: Callable[[argparse.ArgumentParser], None] | None = None,
    peers: Sequence[str] = (),
) -> None:
    """The program of such a benchmark: its flags, its record, which grows as it goes, its table.

    Args:
      doc: of the program.
      measure: (quick) -> rows, a part at a time; with flags of its own (the parsed flags) -> rows.
      add_flags: adds those flags.
      peers: packages whose versions the record should have beside ours.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    if add_flags:
        add_flags(parser)
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    parser.add_argument(
        "--json", type=os.path.expanduser, help="write versions and rows to this file"
    )
    parser.add_argument("--notes", help="what else the record should say, such as other load")
    args = parser.parse_args()
    rows: list[Row] = []
    for part in measure(args if add_flags else args.quick):
        rows += part
        if args.json:
            notes = {"notes": args.notes} if args.notes else {}
            record = {**environment(*peers), **notes, "rows": rows}
            Path(args.json).write_text(json.dumps(record, indent=1) + "\n")
    print(markdown.of_records(rows))
