"""A network in training: its programs and its state, an epoch at a time. Knows no files."""

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from experiments import build, report
from experiments.compiling import Compiling
from experiments.config import Config
from experiments.flags import NotFiniteError
from experiments.tally import Tally
from ssa_jax import data as data_lib
from ssa_jax import factors, metrics, ranks, train
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


class Trainer:
    """The state of a run on the device, and what is done to it between two checkpoints.

    Args:
      config: the run.
      data: its data set.
      built: from `build.build`, whose state is taken over.
      compiling: counts compilations of the step.
    """

    def __init__(self, config: Config, data: Dataset, built: build.Built, compiling: Compiling):
        self.config, self.data, self.compiling = config, data, compiling
        self.loader: Loader = data_lib.make_loader(data)
        self.state = built.state
        self.use(built)

    def use(self, built: build.Built) -> None:
        """Takes over the programs of another build of the same run; the state stays."""
        self.built = built
        step, warmup = (
            train.make_step(built.units, method, built.optimizer, built.weights, self.compiling)
            for method in (built.method, built.warmup)
        )
        self.programs = Programs(
            step,
            warmup,
            train.make_refresh(built.method),
            train.make_eval(built.units),
            metrics.make_probe(built.units, built.method, built.weights),
        )

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.state.step)

    def train_epoch(self, epoch: int, tally: Tally, between: Callable[[int], None]) -> Row:
        """The rest of an epoch, in the order that seed and epoch give.

        Args:
          epoch: whole epochs done.
          tally: of the steps done in this one; counts on.
          between: called with the number of every step before it.

        Raises:
          NotFiniteError: the loss is not finite.
        """
        size = self.config.batch_size
        order_key, crop_key = jax.random.split(self.state.key)
        order = np.asarray(data_lib.epoch_order(order_key, epoch, self.loader.train_size))
        method, train_step = self._at_work(epoch)
        every = method.refresh_every
        # Paths of the method that takes over may be old.
        takes_over = self.built.warmup_epochs * self.built.steps_per_epoch
        first = epoch * self.built.steps_per_epoch
        last = first + self.built.steps_per_epoch
        if self.config.max_steps:
            last = min(last, self.config.max_steps)
        with tqdm(
            total=(last - first) * size,
            initial=tally.steps * size,
            unit="img",
            desc=f"epoch {epoch + 1}/{self.config.epochs}",
            disable=not sys.stderr.isatty(),
            leave=False,
        ) as bar:
            for step in range(first + tally.steps, last):
                between(step)
                if (every and step % every == 0) or 0 < takes_over == step:
                    self.state = self.programs.refresh(self.state)
                index = order[(step - first) * size : (step - first + 1) * size]
                batch = self.loader.train_batch(jax.random.fold_in(crop_key, step), index)
                self.state, measured = train_step(self.state, batch)
                tally.add(measured)
                _check_finite(tally.finite)
                bar.update(size)
        row = tally.row()
        _check_finite(tally.finite)
        return {
            **row,
            "images": tally.steps * size,
            "learning_rate": float(self.built.learning_rate(first + tally.steps - 1)),
        }

    def _at_work(self, epoch: int) -> tuple[Method, train.Step]:
        """The method of an epoch and its step."""
        if epoch < self.built.warmup_epochs:
            return self.built.warmup, self.programs.warmup
        return self.built.method, self.programs.step

    def measure(self) -> Row:
        """Evaluates and probes, and mends and shrinks the factors where that is due.

        Raises:
          NotFiniteError: the test loss or the state is not finite.
        """
        row = self.evaluate()
        _check_finite(math.isfinite(row["test_loss"]) and train.all_finite(self.state))
        index = np.arange(min(PROBE_SIZE, self.loader.train_size))
        row |= report.probe_row(self.programs.probe(self.state, self.loader.fixed_batch(index)))
        row |= self._repair(row)
        row |= self._compact(row)
        return row

    def check(self, tally: Tally) -> None:
        """Raises NotFiniteError where a metric or an entry of the state is not finite."""
        _check_finite(tally.finite and train.all_finite(self.state))

    def evaluate(self) -> Row:
        """Loss and accuracy on the test set."""
        results = [
            self.programs.evaluate(self.state.params, self.state.mstate, batch)
            for batch in self.loader.test_batches()
        ]
        n = len(self.data.test_labels)
        return {
            "test_loss": sum(float(r["loss"]) for r in results) / n,
            "test_accuracy": sum(int(r["correct"]) for r in results) / n,
        }

    def _repair(self, evaluated: Row) -> Row:
        """Makes factors that have drifted orthonormal again, and evaluates to show what moved.

        Optimiser moments stay: they are averages that forget, of triplets that keep their places
        and nearly their directions, and the chain projects what it makes of them.
        """
        if not 0 < self.config.drift_bound < evaluated["drift"]:
            return {}
        params = factors.map_factors(factors.orthonormalized, self.state.params)
        self.state = self.programs.refresh(self.state._replace(params=params))
        return {
            "drift_repaired": float(factors.orthogonality_error(params)),
            "test_accuracy_before_repair": evaluated["test_accuracy"],
            **self.evaluate(),
        }

    def _compact(self, evaluated: Row) -> Row:
        """Slices away what truncation zeroed, and evaluates again to show that nothing moved."""
        # Once the schedules have ended ranks are stored as they are: a budget is met exactly, and
        # no step is compiled for them any more.
        ended = self.step >= self.built.total_steps
        chosen = ranks.selection(self.state.params, 1 if ended else None)
        if not chosen:
            return {}
        # Paths that were built at the old ranks are built anew; every other shape was sliced.
        self.state = self.programs.refresh(ranks.compact(self.state, chosen))
        return {
            "test_accuracy_before_compaction": evaluated["test_accuracy"],
            "test_loss_before_compaction": evaluated["test_loss"],
            **self.evaluate(),
        }


def _check_finite(finite: bool) -> None:
    if not finite:
        raise NotFiniteError("loss or parameters are not finite")
