"""Does it pay to train several seeds in one program?

    python -m benchmarks.seeds [--quick] [--json FILE] [--notes TEXT] [--models mlp] [--seeds 2 5]

One training step of every seed, fed from random images of CIFAR's shape on the device: one seed
after another, and all in one program (`ssa_jax.training.replicas`), timed in turn in one
process. Refreshes of the feedback and evaluation are left out. ``ratio`` is the time of the one
program over that of one seed after another; ``compile_s`` is tracing and compiling, without a
cache on disk.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.contestants import Entry, build
from benchmarks.networks import CLASSES, Case
from experiments.table import markdown
from experiments.timing import Contestant, side_by_side
from ssa_jax import data
from ssa_jax.data import Dataset, Epoch, Loader
from ssa_jax.runs import compiling
from ssa_jax.runs.environment import environment
from ssa_jax.training import replicas, train
from ssa_jax.training.dispatch import Dispatch, make_dispatch
from ssa_jax.types import TrainState

Row = dict[str, Any]

NAMES = ("mlp", "smallconv")
ENTRIES = (Entry("bp"), Entry("dfa"), Entry("ssa", 0.5))
SEEDS = (2, 5)
# By whether a run is a quick one.
BATCH = {False: 128, True: 8}
ROUNDS = {False: 11, True: 3}
_BUDGET_S = 3600.0


def measure(case: Case, entry: Entry, seeds: int, rounds: int) -> Row:
    """One row: the step of so many seeds of an entry, both ways."""
    built = build(case, entry)
    loader = data.make_loader(_random_images(case))
    program = make_dispatch(train.make_step(*built[:4]), loader.batch_at, 1)
    states = [built.state._replace(key=jax.random.key(seed)) for seed in range(seeds)]
    apart, apart_s = _one_after_another(program, states, loader, case.batch)
    at_once, at_once_s = _together(program, states, loader, case.batch)
    times = side_by_side([apart, at_once], rounds, _BUDGET_S)
    return {
        "model": case.model,
        "method": entry.method,
        "rank": entry.rank,
        "batch": case.batch,
        "seeds": seeds,
        "apart_ms": round(times[0].median_ms, 3),
        "at_once_ms": round(times[1].median_ms, 3),
        "ratio": round(times[1].median_ms / times[0].median_ms, 3),
        "rounds": times[0].rounds,
        "apart_compile_s": round(apart_s, 3),
        "at_once_compile_s": round(at_once_s, 3),
    }


def _random_images(case: Case) -> Dataset:
    """As many examples as a few steps need."""
    numbers = np.random.default_rng(0)
    images = numbers.integers(0, 256, (4 * case.batch, *case.input_shape), np.uint8)
    labels = numbers.integers(0, CLASSES, len(images), np.int32)
    return Dataset(images, labels, images, labels, CLASSES, crop=4, flip=True)


def _compiled(program: Any, state: TrainState, feed: Epoch) -> tuple[Dispatch, float]:
    start = time.perf_counter()
    compiled = program.lower(state, feed).compile()
    return compiled, time.perf_counter() - start


def _steps(compiled: Dispatch, state: TrainState, feed: Epoch) -> Callable[[], None]:
    """A function whose every call is a step from where the last one ended."""
    # The step is donated its state.
    held = [jax.tree.map(jnp.copy, state)]

    def call() -> None:
        held[0], metrics = compiled(held[0], feed)
        jax.block_until_ready((held[0], metrics))

    return call


def _one_after_another(
    program: Dispatch, states: list[TrainState], loader: Loader, batch: int
) -> tuple[Contestant, float]:
    """The step of each state in turn, all by the program that is compiled for the first."""
    feeds = [loader.epoch(state.key, 0, batch) for state in states]
    compiled, seconds = _compiled(program, states[0], feeds[0])
    calls = [_steps(compiled, *pair) for pair in zip(states, feeds, strict=True)]
    return ((lambda: None), lambda: [call() for call in calls]), seconds


def _together(
    program: Dispatch, states: list[TrainState], loader: Loader, batch: int
) -> tuple[Contestant, float]:
    """The step of all states by one program."""
    stacked = replicas.stack(states)
    feed = replicas.epoch(lambda key: loader.epoch(key, 0, batch), stacked.key)
    compiled, seconds = _compiled(replicas.vectorized(program), stacked, feed)
    return ((lambda: None), _steps(compiled, stacked, feed)), seconds


def main() -> None:
    """Measures every combination and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    parser.add_argument("--json", help="write versions and rows to this file")
    parser.add_argument("--notes", help="what else the record should say, such as other load")
    parser.add_argument("--models", nargs="+", choices=NAMES, help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, help="numbers of seeds")
    args = parser.parse_args()
    compiling.use_cache(compiling.OFF)
    rows: list[Row] = []
    names = args.models or (NAMES[:1] if args.quick else NAMES)
    numbers = args.seeds or (SEEDS[:1] if args.quick else SEEDS)
    for name, seeds, entry in itertools.product(names, numbers, ENTRIES):
        rows.append(measure(Case(name, BATCH[args.quick]), entry, seeds, ROUNDS[args.quick]))
        if args.json:
            notes = {"notes": args.notes} if args.notes else {}
            about = {**environment(), "backend": jax.default_backend(), **notes}
            Path(args.json).write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    print(markdown(tuple(rows[0]), [tuple(str(v) for v in row.values()) for row in rows]))


if __name__ == "__main__":
    main()
