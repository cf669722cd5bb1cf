"""Runs that differ in their seed alone, trained at once: each step is one program for all.

Every run keeps its own workdir, with the files and checkpoints that it would write alone, and is
measured, saved and resumed like any other.
"""

import contextlib
import time
from collections.abc import Sequence

from ssa_jax.data.streams import STREAMS
from ssa_jax.errors import NotFiniteError
from ssa_jax.runs import build, processes
from ssa_jax.runs.compiling import Compiling
from ssa_jax.runs.config import Config
from ssa_jax.runs.inputs import Data
from ssa_jax.runs.interrupt import Interruptible, interruptible
from ssa_jax.runs.run import Run, opened, prepare
from ssa_jax.runs.tally import Tallies, Tally
from ssa_jax.runs.trainer import Trainer
from ssa_jax.training import replicas
from ssa_jax.types import TrainState


class ApartError(Exception):
    """The runs can no longer be trained at once; each can be gone on with by itself."""


def why_apart(config: Config) -> str | None:
    """Why seeds of a config cannot be trained at once; None where they can."""
    if config.factorized and config.rank_schedule != "none":
        return f"with --rank_schedule={config.rank_schedule} every seed has ranks of its own"
    if config.on_nan == "rollback":
        return "with --on_nan=rollback a seed may go back alone"
    if config.dataset in STREAMS:
        return f"--dataset={config.dataset} is streamed, in an order of its own for every seed"
    return None


def run_together(configs: Sequence[Config], data: Data) -> None:
    """Trains all runs to their end.

    Args:
      configs: at least one; they differ in `seed`, `workdir` and `resume` alone.
      data: their whole data set.

    Raises:
      ApartError: the runs to resume stand at different steps or rates, or one is no longer
        finite. Newest checkpoints are as those of a run that was killed.
      KeyboardInterrupt: after Ctrl-C, and `Terminated` after SIGTERM; the state of every run is
        saved.
      ConfigError, WorkdirError, CheckpointError: as `run.run`.
    """
    first = configs[0]
    data = prepare(first, data)
    states = [build.build(config, data).state for config in configs[1:]]
    built = build.build(first, data)
    layout = processes.layout(first)
    with contextlib.ExitStack() as stack:
        interrupt = stack.enter_context(interruptible())
        compiling = stack.enter_context(Compiling())
        stack.enter_context(layout.active())
        lead = Trainer(first, data, built, compiling, layout)
        trainers = [lead, *(lead.beside(state) for state in states)]
        runs = [
            stack.enter_context(opened(config, trainer, interrupt, len(configs)))
            for config, trainer in zip(configs, trainers, strict=True)
        ]
        _Together(runs, interrupt).go()


class _Together:
    """Runs in step.

    Attributes:
      trainer: of their stacked states, which between two epochs are those of the runs.
    """

    def __init__(self, runs: Sequence[Run], interrupt: Interruptible):
        self.runs, self.interrupt = runs, interrupt

    def go(self) -> None:
        """Trains to the end and writes every summary, whatever the end is."""
        for run in self.runs:
            run.begin()
        self._check_in_step()
        lead, epochs = self.runs[0], self.runs[0].config.epochs
        lead.tell()
        self.trainer = lead.trainer.beside(self._stacked())
        try:
            while lead.position.epoch < epochs and self._epoch():
                self.trainer.state = self._stacked()
            self._wait()
        except NotFiniteError as e:
            raise ApartError(f"{e} in one of the seeds in epoch {lead.position.epoch + 1}") from e
        except KeyboardInterrupt:
            self._wait()
            for run in self.runs:
                run.finish("interrupted")
            raise
        for run in self.runs:
            run.finish()

    def _check_in_step(self) -> None:
        places = {(r.trainer.step, r.position.epoch, r.position.step_in_epoch) for r in self.runs}
        if len(places) > 1:
            raise ApartError("the seeds stand at different steps")
        if any(run.position.rollbacks for run in self.runs):
            raise ApartError("a seed has gone back to a lower rate")

    def _stacked(self) -> TrainState:
        return replicas.stack([run.trainer.state for run in self.runs])

    def _unstack(self) -> None:
        """Gives every run its state."""
        for run, state in zip(self.runs, replicas.unstack(self.trainer.state), strict=True):
            run.trainer.state = state

    def _epoch(self) -> bool:
        """Trains, measures and keeps an epoch of all; whether there is more to train."""
        lead, before = self.runs[0], self.trainer.step
        if lead.stops_at(before):
            return False
        begun = time.monotonic()
        tallies = [Tally(run.position.sums, run.position.step_in_epoch) for run in self.runs]
        together = Tallies(tallies)
        row = self.trainer.train_epoch(
            lead.position.epoch, together, lambda step: self._between_steps(step, together)
        )
        seconds = time.monotonic() - begun
        self._unstack()
        more = [
            run.end_epoch(row, tally, before, seconds)
            for run, tally in zip(self.runs, tallies, strict=True)
        ]
        return all(more)

    def _between_steps(self, step: int, together: Tallies) -> None:
        if self.runs[0].save_due(step):
            together.flush()
            self._unstack()
            for run, tally in zip(self.runs, together.tallies, strict=True):
                run.save_within(tally)
        self.interrupt.check()

    def _wait(self) -> None:
        for run in self.runs:
            run.checkpoints.wait()
