"""All that a GPU can tell of this project, in as many minutes as there are.

    python -m benchmarks.gpu [--minutes 8] [--out FOLDER] [--data FOLDER] [--only 'vgg13*']
        [--commit HASH] [--quick]
    python -m benchmarks.gpu --prepare FOLDER

Run from the root of the source tree; nothing need be installed but jax, Flax, optax, chex and
Orbax, and PyTorch to compare with. Training steps of bp, svd_bp, ssa (direct, streamed, by
default, and the walk through a quarter of the directions) and dfa on vgg13, resnet32 and resnet18
are compiled side by side and timed in turn, PyTorch's beside them; vgg13 and resnet32 are trained
on the parts of CIFAR-10 in ``--data``, which ``--prepare`` writes where the data set is installed.
What tells most comes first, and what no longer fits is left out and named.

Every figure is a line of results.jsonl in the folder as soon as it is known; gpu.json is the whole
of it, for benchmarks/records/ (see `gpu_page`).
"""

import argparse
import fnmatch
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from benchmarks import bare, gpu_items
from benchmarks.gpu_items import Item, Row, Setup

# Left for the summary, and for processes to end.
_LAST_S = 8.0
# An item that takes this many times what it may need is ended.
_PATIENCE = 1.6

Measure = Callable[[Item, float], Iterable[Row]]


class Clock:
    """Seconds that are left, and what items turn out to need beside their estimates.

    Args:
      seconds: in all.
      now: in seconds.
    """

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic):
        self._now, self._start, self._seconds = now, now(), seconds
        self._ratios: dict[str, float] = {}

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return self._now() - self._start

    @property
    def left(self) -> float:
        """Seconds until the end, less what the end itself takes."""
        return self._seconds - _LAST_S - self.spent

    def expected(self, item: Item) -> float:
        """Seconds that an item may need, as the last of its kind did."""
        return item.estimate * self._ratios.get(item.kind, 1.0)

    def learn(self, item: Item, seconds: float) -> None:
        """Takes note of what an item took."""
        self._ratios[item.kind] = seconds / item.estimate


class Log:
    """Rows, each on disk as soon as it is known.

    Args:
      file: to which lines of JSON are appended.
      common: fields of every line.
    """

    def __init__(self, file: Path, common: Row):
        self._file, self._common = file, common
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Appends a row to the file and prints it."""
        self.rows.append(row)
        line = json.dumps({**row, **self._common})
        with self._file.open("a") as out:
            out.write(line + "\n")
            out.flush()
            os.fsync(out.fileno())
        print(json.dumps(row), flush=True)


def run(found: Iterable[Item], clock: Clock, log: Log, measure: Measure) -> None:
    """Measures the items that fit, one after the other; one that fails does not stop the rest."""
    for item in found:
        expected = clock.expected(item)
        if expected > clock.left:
            why = f"may need {expected:.0f} s, and {max(0.0, clock.left):.0f} are left"
            log.add({"what": "left out", "item": item.name, "why": why})
            continue
        begun = clock.spent
        try:
            patience = _PATIENCE * max(expected, item.estimate)
            for row in measure(item, min(clock.left, patience)):
                log.add({"item": item.name, **row, "at_s": round(clock.spent, 1)})
            clock.learn(item, clock.spent - begun)
        except Exception as e:
            log.add({"what": "error", "item": item.name, "error": repr(e)[:400]})


def summary(log: Log, about: Row) -> Row:
    """The record of a run: where it was made, and its rows."""
    known = next((r for r in log.rows if r.get("platform") and r["kind"] != "torch"), {})
    device = known.get("device")
    return {
        **about,
        "hardware": f"{device}, {about['hardware']}" if device else about["hardware"],
        "platform": known.get("platform"), "device": device, "rows": log.rows,
    }  # fmt: skip


def _setup(args: argparse.Namespace, out: Path) -> Setup:
    from benchmarks import gpu_data

    data = args.data
    if args.quick and data is None:
        data = out / "noise"
        gpu_data.split(gpu_data.noise(64, 16), data)
    rounds = 3 if args.quick else 7
    if not gpu_data.parts(data):
        return Setup(out / "logs", rounds)
    size, steps = gpu_data.join(data).train_size, 5 if args.quick else 0
    return Setup(out / "logs", rounds, data, size, max_steps=steps)


def _measure(setup: Setup, log: Log) -> Measure:
    def step_ms(case: Row) -> float | None:
        same = {name: case[name] for name in ("model", "precision", "batch", "contestant")}
        rows = (r for r in log.rows if r["what"] == "step" and same.items() <= r.items())
        return next((r["ms"] for r in rows), None)

    def measure(item: Item, seconds: float) -> Iterator[Row]:
        if item.kind == "step":
            yield from gpu_items.measure_steps(item, setup, seconds)
        elif setup.data is None:
            yield {"what": "left out", "why": "no --data; --prepare writes it"}
        else:
            yield from gpu_items.measure_training(item, setup, seconds, step_ms)

    return measure


def _chosen(args: argparse.Namespace) -> list[Item]:
    groups = gpu_items.QUICK if args.quick else gpu_items.GROUPS
    found = gpu_items.items(groups, torch=find_spec("torch") is not None)
    return [item for item in found if fnmatch.fnmatch(item.name, f"*{args.only}*")]


def _path(text: str) -> Path:
    # Workers run in the source tree, wherever this does.
    return Path(text).expanduser().resolve()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    folder = _path(os.environ.get("OUT", "gpu-results"))
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it")
    parser.add_argument("--out", type=_path, default=folder, help="default: $OUT, else gpu-results")
    parser.add_argument("--data", type=_path, help="folder that --prepare wrote, or some of it")
    parser.add_argument("--only", default="", help="pattern of the items, such as resnet18")
    parser.add_argument("--commit", help="of the source, where git cannot tell")
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    parser.add_argument("--prepare", type=_path, help="write CIFAR-10 as parts and stop")
    return parser


def _platform() -> str:
    """Where JAX runs programs; asked of another process, since one that asks takes the memory."""
    ask = [sys.executable, "-c", "import jax; print(jax.devices()[0].platform)"]
    return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()


def _stop(signum: int, frame: FrameType | None) -> None:
    del frame
    sys.exit(128 + signum)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures what fits; writes the record however that ends."""
    args = _parser().parse_args(argv)
    clock = Clock(60 * args.minutes)
    if args.prepare:
        from benchmarks.gpu_data import prepare

        for file in prepare(args.prepare):
            print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB")
        return
    if not args.quick and _platform() == "cpu":
        sys.exit("JAX sees no GPU here; --quick runs a small form of it on a CPU")
    if args.quick:
        # Of programs that run a few times most of the time is compiling.
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    bare.stand_in()
    from ssa_jax.reporting.environment import environment

    signal.signal(signal.SIGTERM, _stop)
    args.out.mkdir(parents=True, exist_ok=True)
    about = environment("torch")
    about["commit"] = args.commit or about["commit"]
    versions = about["versions"]
    common = {"jax": versions["jax"], "torch": versions["torch"], "commit": about["commit"]}
    log = Log(args.out / "results.jsonl", common)
    try:
        setup = _setup(args, args.out)
        run(_chosen(args), clock, log, _measure(setup, log))
    finally:
        record = summary(log, {**about, "minutes": args.minutes, "spent_s": round(clock.spent, 1)})
        (args.out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
        print(f"{len(log.rows)} rows in {args.out}, {clock.spent:.0f} s", flush=True)


if __name__ == "__main__":
    main()
