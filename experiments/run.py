"""The training loop of one run, from a config to a summary."""

import math
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from experiments import build, plots, report, workdir
from experiments.config import Config
from experiments.flags import NotFiniteError
from experiments.interrupt import Interruptible
from experiments.workdir import Workdir
from ssa_jax import data as data_lib
from ssa_jax import metrics, ranks, train
from ssa_jax.checkpoint import Checkpoints
from ssa_jax.data import Dataset, Loader
from ssa_jax.methods import Method
from ssa_jax.train import Batch, TrainState

Array = jax.Array
Row = dict[str, Any]

# Examples of the fixed batch on which angles and loss terms are measured.
PROBE_SIZE = 512


class Programs(NamedTuple):
    """The jitted functions of a run."""

    step: train.Step
    warmup: train.Step
    refresh: Callable[[TrainState], TrainState]
    evaluate: Callable[..., dict[str, Array]]
    probe: Callable[[TrainState, Batch], metrics.Probe]


class Counter:
    """Counts how often the step was compiled."""

    def __init__(self) -> None:
        self.value = 0

    def __call__(self) -> None:
        self.value += 1


def run(config: Config, data: Dataset | None = None) -> Row:
    """Trains one configuration and returns its summary, which is also in its workdir.

    Args:
      config: the run.
      data: its data set, where the caller has it already.

    Raises:
      ConfigError, DataError, WorkdirError, CheckpointError: nothing was overwritten.
      NotFiniteError: the loss or a parameter became NaN or infinite; the newest checkpoint is
        the last good state.
      KeyboardInterrupt: after Ctrl-C, with a message that says how to go on.
    """
    config.validate()
    data = data or data_lib.load(config.dataset, config.data_dir)
    built = build.build(config, data)
    folder = workdir.reopen(config) if config.resume else workdir.create(config)
    checkpoints = Checkpoints(folder.checkpoints)
    with Interruptible() as interrupt:
        try:
            return _Run(config, data, built, folder, checkpoints, interrupt).go()
        finally:
            checkpoints.close()


class _Run:
    """The state of a run between epochs."""

    def __init__(
        self,
        config: Config,
        data: Dataset,
        built: build.Built,
        folder: Workdir,
        checkpoints: Checkpoints,
        interrupt: Interruptible,
    ):
        self.config, self.data, self.built = config, data, built
        self.folder, self.checkpoints, self.interrupt = folder, checkpoints, interrupt
        self.compiles = Counter()
        step, warmup = (
            train.make_step(built.units, method, built.optimizer, built.weights, self.compiles)
            for method in (built.method, built.warmup)
        )
        self.programs = Programs(
            step,
            warmup,
            train.make_refresh(built.method),
            train.make_eval(built.units),
            metrics.make_probe(built.units, built.method, built.weights),
        )
        self.loader: Loader = data_lib.make_loader(data)
        self.state, self.epoch, self.earlier_s = built.state, 0, 0.0
        self.dense = build.dense_costs(config, data)
        self.started = time.monotonic()

    def go(self) -> Row:
        """Trains to the end and writes the summary, whatever the end is."""
        if self.config.resume:
            self.epoch, self.state = self.checkpoints.restore(self.state)
            self.folder.keep_rows(self.epoch)
            self.earlier_s = max((row["wall_s"] for row in self.folder.rows()), default=0.0)
        else:
            # The last good state of a run that fails in its first epoch.
            self.checkpoints.save(0, self.state)
        if self.built.method.note:
            print(f"feedback: {self.built.method.note}", flush=True)
        try:
            while self.epoch < self.config.epochs and not self._stopped():
                self._epoch()
        except NotFiniteError:
            self._finish("not_finite")
            raise
        except KeyboardInterrupt:
            self._finish("interrupted")
            raise KeyboardInterrupt(
                f"interrupted; {self.epoch} epochs are kept, go on with the same flags and "
                f"--workdir={self.folder.path} --resume"
            ) from None
        return self._finish("stopped" if self.epoch < self.config.epochs else "finished")

    def _stopped(self) -> bool:
        return 0 < self.config.max_steps <= int(self.state.step)

    def _epoch(self) -> None:
        begun = time.monotonic()
        row = self._train_epoch()
        seconds = time.monotonic() - begun
        row |= self._evaluate()
        self._check_finite(row["test_loss"], train.all_finite(self.state))
        row |= self._probe()
        row |= self._compact(row)
        row |= {
            "epoch": self.epoch + 1,
            "step": int(self.state.step),
            "ranks": train.ranks(self.state.params),
            "images_per_second": row["images"] / seconds,
            "compiles": self.compiles.value,
            "wall_s": self._wall_s(),
        }
        complete = row["images"] == self.built.steps_per_epoch * self.config.batch_size
        self.folder.log(row)
        print(report.line(row, self.config.epochs), flush=True)
        if complete:
            self.epoch += 1
            self.checkpoints.save(self.epoch, self.state)

    def _at_work(self) -> tuple[Method, train.Step]:
        """The method of this epoch and its step."""
        if self.epoch < self.built.warmup_epochs:
            return self.built.warmup, self.programs.warmup
        return self.built.method, self.programs.step

    def _train_epoch(self) -> Row:
        """One pass over the training set, in the order that seed and epoch give."""
        size = self.config.batch_size
        order_key, crop_key = jax.random.split(self.state.key)
        order = np.asarray(data_lib.epoch_order(order_key, self.epoch, self.loader.train_size))
        method, train_step = self._at_work()
        every = method.refresh_every
        # Paths of the method that takes over may be old.
        takes_over = self.built.warmup_epochs * self.built.steps_per_epoch
        first = self.epoch * self.built.steps_per_epoch
        last = first + self.built.steps_per_epoch
        if self.config.max_steps:
            last = min(last, self.config.max_steps)
        history: list[dict[str, Array]] = []
        with tqdm(
            total=(last - first) * size,
            unit="img",
            desc=f"epoch {self.epoch + 1}/{self.config.epochs}",
            disable=not sys.stderr.isatty(),
            leave=False,
        ) as bar:
            for step in range(first, last):
                self.interrupt.check()
                if (every and step % every == 0) or 0 < takes_over == step:
                    self.state = self.programs.refresh(self.state)
                index = order[(step - first) * size : (step - first + 1) * size]
                batch = self.loader.train_batch(jax.random.fold_in(crop_key, step), index)
                self.state, measured = train_step(self.state, batch)
                # One step late, so that the device never waits for the host.
                if history:
                    self._check_finite(history[-1]["loss"])
                history.append(measured)
                bar.update(size)
        self._check_finite(history[-1]["loss"])
        mean = {k: float(np.mean([float(h[k]) for h in history])) for k in history[0]}
        return {
            "train_loss": mean["loss"],
            "train_accuracy": mean["accuracy"],
            "images": len(history) * size,
            "learning_rate": float(self.built.learning_rate(last - 1)),
        }

    def _check_finite(self, loss: Any, rest: bool = True) -> None:
        if math.isfinite(float(loss)) and rest:
            return
        raise NotFiniteError(
            f"loss or parameters are not finite in epoch {self.epoch + 1}; the state after epoch "
            f"{self.epoch} is kept in {self.folder.checkpoints}; try a lower --learning_rate than "
            f"{self.config.learning_rate}"
        )

    def _evaluate(self) -> Row:
        results = [
            self.programs.evaluate(self.state.params, self.state.mstate, batch)
            for batch in self.loader.test_batches()
        ]
        n = len(self.data.test_labels)
        return {
            "test_loss": sum(float(r["loss"]) for r in results) / n,
            "test_accuracy": sum(int(r["correct"]) for r in results) / n,
        }

    def _probe(self) -> Row:
        index = np.arange(min(PROBE_SIZE, self.loader.train_size))
        return report.probe_row(self.programs.probe(self.state, self.loader.fixed_batch(index)))

    def _compact(self, evaluated: Row) -> Row:
        """Slices away what truncation zeroed, and evaluates again to show that nothing moved."""
        chosen = ranks.selection(self.state.params)
        if not chosen:
            return {}
        # Paths that were built at the old ranks are built anew; every other shape was sliced.
        self.state = self.programs.refresh(ranks.compact(self.state, chosen))
        return {
            "test_accuracy_before_compaction": evaluated["test_accuracy"],
            "test_loss_before_compaction": evaluated["test_loss"],
            **self._evaluate(),
        }

    def _wall_s(self) -> float:
        return self.earlier_s + time.monotonic() - self.started

    def _finish(self, status: str) -> Row:
        rows = self.folder.rows()
        summary: Row = {
            "status": status,
            "epochs": self.epoch,
            **report.settings(self.config),
            "feedback_note": self.built.method.note,
            **report.last_epoch(rows),
            **report.sizes(self.built.units, self.state, self.data, self.dense),
            "compiles": self.compiles.value,
            "wall_s": self._wall_s(),
            "commit": workdir.commit(),
            "workdir": str(self.folder.path),
        }
        self.folder.write_json("summary.json", summary)
        if rows:
            plots.draw(rows, self.folder.plots)
        return summary
