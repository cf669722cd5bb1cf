"""One run, from a config to a summary: what is kept on the way, and how faults end or go on."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax

from ssa_jax.errors import NotFiniteError
from ssa_jax.plugins import find
from ssa_jax.reporting import plots, tensorboard
from ssa_jax.reporting.callbacks import CALLBACKS
from ssa_jax.reporting.progress import Progress
from ssa_jax.runs import build, inputs, processes, summary, workdir
from ssa_jax.runs.build import NOTHING, Given
from ssa_jax.runs.compiling import Compiling, leave_products_to_cublas, use_cache
from ssa_jax.runs.config import Config, identity
from ssa_jax.runs.environment import commit
from ssa_jax.runs.inputs import Data
from ssa_jax.runs.interrupt import Interruptible, Terminated, interruptible
from ssa_jax.runs.trainer import Trainer
from ssa_jax.runs.workdir import Workdir
from ssa_jax.training import memory, train, unitwise
from ssa_jax.training.checkpoint import Checkpoints
from ssa_jax.training.record import Position
from ssa_jax.training.running_means import RunningMeans
from ssa_jax.types import TrainState

Row = dict[str, Any]

# A run that is not finite at a 32nd of its learning rate has another fault.
MAX_ROLLBACKS = 5


def run(config: Config, data: Data | None = None) -> Row:
    """Trains one configuration and returns its summary, which is also in its workdir.

    Args:
      config: the run.
      data: its data set, where the caller has it already.

    Raises:
      ConfigError, DataError, WorkdirError: nothing was overwritten.
      CheckpointError: none can be used, or none be written; those that were whole still are.
      NotFiniteError: the loss or a parameter became NaN or infinite, and `on_nan` is "stop" or
        did not help; the newest checkpoint is the last good state.
      KeyboardInterrupt: after Ctrl-C, and `Terminated` after SIGTERM: the state is saved, and the
        message says how to go on.
    """
    return train_given(config, data)[0]


def train_given(
    config: Config, data: Data | None = None, given: Given = NOTHING
) -> tuple[Row, Trainer]:
    """`run`, with objects in place of names; also the trainer, with the state at the end."""
    data = prepare(config, data)
    layout = processes.layout(config)
    built = build.build(config, data, given=given)
    with interruptible() as interrupt, Compiling() as compiling, layout.active():
        trainer = Trainer(config, data, built, compiling, layout, given)
        with opened(config, trainer, interrupt) as one:
            return one.go(), trainer


def prepare(config: Config, data: Data | None) -> Data:
    """Checks a config and sets up what its run needs; its data, as the config wants them."""
    config.validate()
    if config.tensorboard:
        tensorboard.require()
    leave_products_to_cublas()
    use_cache(config.compile_cache)
    return inputs.of_run(config, data)


@contextlib.contextmanager
def opened(config: Config, trainer: Trainer, interrupt: Interruptible) -> Iterator["Run"]:
    """A run in its workdir, which is closed at the end of the block, its checkpoints written.

    Args:
      config: the run.
      trainer: its state and programs.
      interrupt: of the process.
    """
    open_folder = workdir.reopen if config.resume else workdir.create
    with contextlib.ExitStack() as stack:

        def open_and_hold() -> Workdir:
            folder = open_folder(config)
            stack.enter_context(workdir.held(folder.path))
            return folder

        folder = workdir.of_all(open_and_hold)
        checkpoints = Checkpoints(folder.checkpoints, config.keep_checkpoints, identity(config))
        stack.enter_context(checkpoints)
        progress = stack.enter_context(Progress(config, folder))
        yield Run(config, trainer, folder, checkpoints, interrupt, progress)


class Run:
    """A trainer, and where it stands.

    Attributes:
      position: of the state, as far as it was last told; its epoch is always true.
      saved: steps done at the newest checkpoint.
    """

    def __init__(
        self,
        config: Config,
        trainer: Trainer,
        folder: Workdir,
        checkpoints: Checkpoints,
        interrupt: Interruptible,
        progress: Progress,
    ):
        self.config, self.trainer, self.compiling = config, trainer, trainer.compiling
        self.folder, self.checkpoints, self.interrupt = folder, checkpoints, interrupt
        self.progress = progress
        self.position, self.saved, self.earlier = Position(), 0, Position()
        self.dense = build.dense_costs(config, trainer.data, trainer.given)
        self.started = time.monotonic()
        names = [name.strip() for name in config.callbacks.split(",") if name.strip()]
        named = [find("callbacks", name, CALLBACKS)(folder.path) for name in names]
        self.callbacks = [*trainer.given.callbacks, *named]

    def go(self) -> Row:
        """Trains to the end and writes the summary, whatever the end is."""
        self.begin()
        self.tell()
        try:
            while self.position.epoch < self.config.epochs and self._epoch_or_rollback():
                pass
            # A run is not finished before its last state is kept.
            self.checkpoints.wait()
        except NotFiniteError:
            self.finish("not_finite")
            raise
        except KeyboardInterrupt as e:
            self.checkpoints.wait()
            self.finish("interrupted")
            what = "stopped by SIGTERM" if isinstance(e, Terminated) else "interrupted"
            raise type(e)(
                f"{what}; the state after step {self.saved} is kept, go on with the same flags and "
                f"--workdir={self.folder.path} --resume"
            ) from None
        return self.finish()

    def tell(self) -> None:
        """Prints what the run is, and what cannot be had of what was asked for."""
        config, built, state = self.config, self.trainer.built, self.trainer.state
        size = build.network_costs(built.units, state.params, state.mstate, self.trainer.data)
        shape = build.batch_shape(config, self.trainer.data)
        held = memory.held_bytes(built.units, built.method, state.params, state.mstate, shape)
        kept = sum(x.nbytes for x in jax.tree.leaves(state) if hasattr(x, "nbytes"))
        print(
            f"{config.method}: {config.model} on {config.dataset}, "
            f"{len(built.units)} units, {size.params:,} parameters ({self.dense.params:,} dense), "
            f"on {jax.device_count()} {jax.default_backend()} device(s), about "
            f"{(held + kept) / 2**20:.0f} MiB a step; results in {self.folder.path}\n"
            f"compiling the first step",
            flush=True,
        )
        if built.memory == "streamed" and (why := _whole_updates(built)):
            print(
                f"memory: streamed, but {why}, so the gradients of all are held at once; "
                "activations are not",
                flush=True,
            )
        if note := built.method.note:
            print(f"feedback: {note}", flush=True)

    def begin(self) -> None:
        """From the newest checkpoint, or with the first one."""
        # Also a run that was killed before its first checkpoint has nothing but its config.
        if not self.config.resume or self.checkpoints.latest() is None:
            if self.config.resume:
                self.folder.keep_rows(0)
            # The last good state of a run that fails in its first epoch.
            self.checkpoints.save(self.trainer.state, self.position)
            return
        self._restore(self.trainer.state)
        self.earlier = self.position
        if self.position.rollbacks:
            self.trainer.use(self._built(len(self.position.rollbacks)))

    def _restore(self, like: TrainState) -> None:
        place = self.trainer.layout.place
        self.position, self.trainer.state = self.checkpoints.restore(like, place=place)
        self.saved = self.trainer.step
        self.checkpoints.set_aside_after(self.saved)
        self.folder.keep_rows(self.position.epoch)

    def _built(self, rollbacks: int) -> build.Built:
        """The run anew, at half the learning rate for every rollback."""
        return build.build(self.config, self.trainer.data, 0.5**rollbacks, given=self.trainer.given)

    def _epoch_or_rollback(self) -> bool:
        """Whether there is more to train."""
        try:
            return self._epoch()
        except NotFiniteError as e:
            told = (
                f"{e} in epoch {self.position.epoch + 1}; the state after step {self.saved} is "
                f"kept in {self.folder.checkpoints}"
            )
        rollbacks = len(self.position.rollbacks)
        if self.config.on_nan == "stop" or rollbacks == MAX_ROLLBACKS:
            rate = self.config.learning_rate * 0.5**rollbacks
            raise NotFiniteError(
                f"{told}; try a lower --learning_rate than {rate}, or --on_nan=rollback"
            )
        print(f"{told}; going back to it at half the learning rate", flush=True)
        self._roll_back()
        return True

    def _roll_back(self) -> None:
        """To the newest checkpoint, at half the learning rate. Only finite states are saved."""
        self.checkpoints.wait()
        rollbacks, step = self.position.rollbacks, self.trainer.step
        built = self._built(len(rollbacks) + 1)
        self._restore(built.state)
        self.trainer.use(built)
        event = {"step": step, "to_step": self.saved}
        self.position = self.position._replace(rollbacks=[*rollbacks, event])

    def _epoch(self) -> bool:
        """Trains, measures and keeps an epoch; whether there is more to train."""
        position, before = self.position, self.trainer.step
        if self.stops_at(before):
            return False
        begun = time.monotonic()
        means = RunningMeans(position.sums, position.step_in_epoch)
        row = self.trainer.train_epoch(
            position.epoch, means, lambda step: self._between_steps(step, means)
        )
        return self.end_epoch(row, means, before, time.monotonic() - begun)

    def stops_at(self, step: int) -> bool:
        """Whether `--max_steps` says so, behind what was trained of an epoch."""
        return 0 < self.config.max_steps <= step and not self.position.step_in_epoch

    def end_epoch(self, row: Row, means: RunningMeans, before: int, seconds: float) -> bool:
        """Measures and keeps an epoch, or what was trained of it; whether there is more to train.

        Args:
          row: what `Trainer.train_epoch` told.
          means: of its steps.
          before: steps done when it began.
          seconds: that it took.
        """
        position, images = self.position, (self.trainer.step - before) * self.config.batch_size
        whole = means.steps == self.trainer.built.steps_per_epoch
        if not whole:
            self.save_within(means)
        row = means.row() | row | self.trainer.measure()
        row |= {
            "epoch": position.epoch + 1,
            "step": self.trainer.step,
            "ranks": train.ranks(self.trainer.state.params),
            "rollbacks": len(position.rollbacks),
            "images_per_second": images / seconds,
            **self._spent(),
        }
        self.folder.log(row)
        self.progress.epoch(row, self.trainer.state.params)
        for callback in self.callbacks:
            callback(row)
        if whole:
            self._save(
                Position(
                    epoch=row["epoch"],
                    rollbacks=position.rollbacks,
                    wall_s=row["wall_s"],
                    score=summary.score(row),
                    compiles=row["compiles"],
                    compile_s=row["compile_s"],
                )
            )
        return whole

    def _between_steps(self, step: int, means: RunningMeans) -> None:
        """Saves where it is due or asked for, and then stops if asked to."""
        if self.save_due(step):
            self.save_within(means)
        self.interrupt.check()

    def save_due(self, step: int) -> bool:
        """Whether a save is due before a step, or asked for by a signal."""
        every = self.config.save_every
        return self.interrupt.requested or bool(every and step % every == 0)

    def save_within(self, means: RunningMeans) -> None:
        """Keeps the state in the middle of an epoch.

        Raises:
          NotFiniteError: it is not finite, and is not kept.
        """
        means.flush()
        self.trainer.check(means)
        position = self.position._replace(
            step_in_epoch=means.steps,
            sums=dict(means.sums),
            score=None,
            **self._spent(),
        )
        self._save(position)

    def _save(self, position: Position) -> None:
        """Keeps the state, unless it was kept or restored just now."""
        self.position = position
        if self.trainer.step != self.saved:
            self.checkpoints.save(self.trainer.state, position)
            self.saved = self.trainer.step

    def _spent(self) -> Row:
        """Compilations and seconds, in this process and before it."""
        return {
            "compiles": self.earlier.compiles + self.compiling.steps,
            "compile_s": self.earlier.compile_s + self.compiling.seconds,
            "wall_s": self.earlier.wall_s + time.monotonic() - self.started,
        }

    def finish(self, status: str | None = None) -> Row:
        """Writes the summary and the pictures; returns the summary.

        Args:
          status: how the run ended; None for one that ended well, or at `--max_steps`.
        """
        if status is None:
            status = "stopped" if self.position.epoch < self.config.epochs else "finished"
        # A run that stops within an epoch has measured what it trained of that.
        reached = self.position.epoch + bool(self.position.step_in_epoch)
        rows = [row for row in self.folder.rows() if row["epoch"] <= reached]
        built, state = self.trainer.built, self.trainer.state
        result: Row = {
            "status": status,
            "epochs": self.position.epoch,
            **summary.settings(self.config),
            "feedback_note": built.method.note,
            "memory": built.memory,
            **summary.last_epoch(rows),
            **summary.best_epoch(rows),
            "diagnosis": [f._asdict() for f in self.progress.diagnose()],
            "rollbacks": list(self.position.rollbacks),
            **summary.sizes(built.units, state, self.trainer.data, self.dense),
            **self._spent(),
            "commit": commit(),
            "workdir": str(self.folder.path),
        }
        self.folder.write_json("summary.json", result)
        print(
            f"step compiled {result['compiles']} times; all programs took "
            f"{result['compile_s']:.1f} s to compile",
            flush=True,
        )
        if rows and self.folder.ours:
            plots.draw(rows, self.folder.plots)
        return result


def _whole_updates(built: build.Built) -> str:
    """Why a streamed step cannot update one unit at a time; empty where it can."""
    if any(unit.shared for unit in built.units):
        return "units share parameters"
    alone = unitwise.split(built.optimizer, built.state.params)
    return "" if alone else "the optimiser looks at all units together, or does not say otherwise"
