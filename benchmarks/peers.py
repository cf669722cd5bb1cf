"""What do networks reach in the same number of steps, in what time and memory, beside PyTorch's?

    python -m benchmarks.peers [--quick] [--json FILE] [--models mlp smallconv] [--steps 400]
        [--seeds 3] [--batch 64] [--no_peak] [--notes TEXT]

CIFAR-10 of 16x16 pixels, one core. Ours: bp, fa, dfa and the sign-concordant methods on dense
layers, svd_bp and ssa on factors. Where they are installed (extra `peers`): backpropagation
hand-written in PyTorch, on the dense network and on one of layers W = A B, and the methods of
biotorch. All get the same batches and the same learning rates, and dense ones of one seed start at
the same weights. They take turns of some steps, and only steps are on the clock. Memory is of
processes that do nothing but build a contestant and train it. A quick run is one of noise.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Generator, Sequence
from typing import Any

from benchmarks import peak, programs, trainees
from benchmarks.programs import Row
from benchmarks.trainees import BIOTORCH, OURS, Entry, Setup, Trainee
from ssa_jax.data import Dataset, Loader, make_loader
from ssa_jax.parallel import compiling

MODELS = ("mlp", "smallconv")
# Steps that a contestant takes before it is the next one's turn, as many as between refreshes.
TURN = 10


class Clock:
    """Milliseconds of the calls of one kind: by the wall, and of the processor.

    Beside other work a call waits for the processor, which the second does not count. The first
    call, which compiles, is not kept.
    """

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []
        self._warm = False

    def __call__(self, call: Any, *args: Any) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        call(*args)
        if self._warm:
            self.times.append((time.perf_counter() - wall, time.process_time() - cpu))
        self._warm = True

    def medians(self) -> tuple[float, float]:
        """Of all calls but the first; zeros where there were none."""
        if not self.times:
            return 0.0, 0.0
        wall, cpu = (1e3 * statistics.median(x) for x in zip(*self.times, strict=True))
        return wall, cpu


def train(
    setup: Setup, loader: Loader, contestants: Sequence[tuple[Entry, Trainee]],
    clocks: Sequence[tuple[Clock, Clock]],
) -> None:  # fmt: skip
    """Trains all of them in turns; the clocks are of the steps and of the refreshes of each."""
    batches = trainees.batches(setup, loader)
    beside = any(entry.library != OURS for entry, _ in contestants)
    for done in range(0, setup.steps, TURN):
        turn = list(itertools.islice(batches, TURN))
        tensors = [trainees.to_torch(b) for b in turn] if beside else []
        for (entry, one), (of_step, of_refresh) in zip(contestants, clocks, strict=True):
            for step, batch in enumerate(turn if entry.library == OURS else tensors, done):
                if one.every and step % one.every == 0:
                    of_refresh(one.refresh)
                of_step(one.step, batch)


def measure(setup: Setup, images: Dataset, seeds: int, peaks: bool) -> list[Row]:
    """One row a contestant on one network.

    ``ms`` and ``cpu_ms`` are medians of a step plus its share of a refresh of the feedback, see
    `Clock`. ``accuracies`` are of the test images, one a seed. ``params`` are what is trained.
    ``base_bytes``, ``peak_bytes`` and ``steps_bytes`` are those of `peak.Peak`; None without.
    """
    loader, entries = make_loader(images), trainees.entries()
    clocks = [(Clock(), Clock()) for _ in entries]
    accuracies: list[list[float]] = [[] for _ in entries]
    for seed in range(seeds):
        of_seed = setup._replace(seed=seed)
        contestants = [(e, trainees.prepare(of_seed, e, images, loader)) for e in entries]
        train(of_seed, loader, contestants, clocks)
        for found, (_, one) in zip(accuracies, contestants, strict=True):
            found.append(round(one.accuracy(), 4))
    rows = []
    for (entry, one), found, of_both in zip(contestants, accuracies, clocks, strict=True):
        (wall, cpu), (refresh, refresh_cpu) = (clock.medians() for clock in of_both)
        most = peak.fresh("benchmarks.trainees", setup, entry) if peaks else None
        rows.append(
            {
                "model": setup.model,
                **entry._asdict(),
                "batch": setup.batch,
                "steps": setup.steps,
                "params": one.params,
                "accuracies": found,
                "ms": round(wall + refresh / max(1, one.every), 3),
                "cpu_ms": round(cpu + refresh_cpu / max(1, one.every), 3),
                **(most or peak.Peak(None, None, None))._asdict(),
            }
        )
    return rows


def rows(args: argparse.Namespace) -> Generator[list[Row]]:
    """Of one network after the other."""
    trainees.one_core()
    images = trainees.noise() if args.quick else trainees.data()
    with tempfile.TemporaryDirectory() as cache:
        compiling.use_cache(cache)
        for model in args.models[: 1 if args.quick else None]:
            setup = Setup(model, args.batch, 2 * TURN if args.quick else args.steps)
            seeds = 1 if args.quick else args.seeds
            yield measure(setup, images, seeds, not (args.no_peak or args.quick))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Those of this program alone."""
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="only these")
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--seeds", type=int, default=3, help="their number, from 0 on")
    parser.add_argument("--batch", type=int, default=64, help="batch size")
    parser.add_argument("--no_peak", action="store_true", help="start no processes for peak memory")


if __name__ == "__main__":
    programs.main(__doc__, rows, add_flags, peers=("torch", BIOTORCH))
