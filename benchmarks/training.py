"""What the benchmarks of training steps share: rows, records and flags."""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import contestants, peak, roofline
from benchmarks.contestants import Contestant, Entry
from benchmarks.networks import Case
from experiments.measure.timing import side_by_side
from experiments.show import markdown
from ssa_jax.parallel import compiling
from ssa_jax.reporting.environment import environment

Row = dict[str, Any]

# By whether a run is a quick one.
ROUNDS = {False: 11, True: 3}
# More than any contestant here takes: every one runs all rounds.
_BUDGET_S = 3600.0


def measure(
    case: Case, entries: Sequence[Entry], matmul_gflops: float, *, quick: bool, peaks: bool
) -> list[Row]:
    """One row an entry, all steps timed side by side.

    ``ms`` is the median of a step plus its share of a refresh of the feedback. ``ratio_to_bp``
    divides by ms of `contestants.REFERENCE`, the hand-written BP step with this project's
    convolutions, which must be among the entries. ``macs`` are a step's multiply-accumulates with
    its share of a refresh (PyTorch's are taken to be the reference's), and ``share`` is the part
    of the measured rate of a matrix product that they come to. ``compile_s`` is tracing and
    compiling. ``base_bytes``, ``peak_bytes`` and ``steps_bytes`` are
    those of `peak.Peak`.

    Args:
      case: network and batch.
      entries: what is compared.
      matmul_gflops: of `roofline.rates`.
      quick: few rounds.
      peaks: whether to start a process for the peak of every entry; None stands there otherwise.
    """
    found = [contestants.prepare(case, entry) for entry in entries]
    times = _milliseconds(found, ROUNDS[quick])
    base = [e.method for e in entries].index(contestants.REFERENCE)
    rows = []
    for entry, one, ms in zip(entries, found, times, strict=True):
        most = peak.in_process(case, entry) if peaks else None
        macs = found[base].macs if one.macs is None else one.macs
        rows.append(
            {
                "model": case.model,
                "method": entry.method,
                "rank": entry.rank,
                "memory": entry.memory,
                "batch": case.batch,
                "ms": round(ms, 4),
                "compile_s": None if one.compile_s is None else round(one.compile_s, 3),
                "temp_bytes": one.temp_bytes,
                "base_bytes": most.base_bytes if most else None,
                "peak_bytes": most.peak_bytes if most else None,
                "steps_bytes": most.steps_bytes if most else None,
                "ratio_to_bp": round(ms / times[base], 4),
                "macs": macs,
                "share": macs and round(roofline.share(macs, ms, matmul_gflops), 4),
            }
        )
    return rows


def _milliseconds(found: Sequence[Contestant], rounds: int) -> list[float]:
    """Of a step with its share of a refresh, measured in turn."""
    steps = [((lambda: None), one.step) for one in found]
    refreshes = [((lambda: None), one.refresh) for one in found if one.refresh]
    times = side_by_side([*steps, *refreshes], rounds, _BUDGET_S)
    of_refresh = iter(times[len(steps) :])
    return [
        t.median_ms + (next(of_refresh).median_ms / one.every if one.refresh else 0.0)
        for t, one in zip(times, found, strict=False)
    ]


def parser(doc: str) -> argparse.ArgumentParser:
    """The flags that all of these programs have."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--quick", action="store_true", help="small, to see that it runs")
    made.add_argument("--json", help="write versions and rows to this file")
    made.add_argument("--no_peak", action="store_true", help="start no processes for peak memory")
    made.add_argument("--notes", help="what else the record should say, such as other load")
    return made


class Record:
    """What a run has measured so far, kept in a file if one is named.

    Programs are compiled anew from here on: the cache on disk is an empty folder, which lasts as
    long as this. From it the processes of `peak` read what was compiled here.

    Attributes:
      content: the record: environment, rounds, rates of `roofline.rates`, rows.
    """

    def __init__(self, args: argparse.Namespace):
        self._cache = tempfile.TemporaryDirectory()
        compiling.use_cache(self._cache.name)
        about = environment("torch")
        notes = {"notes": args.notes} if args.notes else {}
        self._file = args.json and Path(args.json)
        rates = {"rounds": ROUNDS[args.quick], **roofline.rates(args.quick)}
        self.content: dict[str, Any] = {**about, **notes, **rates, "rows": []}
        # A file that cannot be written should be heard of before anything is measured.
        self.add([])

    def add(self, rows: Sequence[Row], key: str = "rows") -> None:
        """Appends rows to one of the record's lists and writes the file."""
        self.content.setdefault(key, []).extend(rows)
        if self._file:
            self._file.write_text(json.dumps(self.content, indent=1) + "\n")

    def print(self, key: str = "rows") -> None:
        """Prints one of the lists as a table."""
        rows = self.content[key]
        print(markdown.of_records(rows))
