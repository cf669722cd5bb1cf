"""A run from epoch to epoch: what is kept on the way, and how faults end or go on."""

import time
from typing import Any

from ssa_jax.errors import NotFiniteError
from ssa_jax.parallel.interrupt import Interruptible, Terminated
from ssa_jax.plugins import find
from ssa_jax.reporting import pictures, summary
from ssa_jax.reporting.callbacks import CALLBACKS
from ssa_jax.reporting.environment import commit
from ssa_jax.reporting.progress import Progress
from ssa_jax.runs import build, network
from ssa_jax.runs.config import Config
from ssa_jax.runs.trainer import Trainer
from ssa_jax.runs.workdir import Workdir
from ssa_jax.training import train
from ssa_jax.training.checkpoint import Checkpoints
from ssa_jax.training.record import Position
from ssa_jax.training.running_means import RunningMeans
from ssa_jax.types import TrainState

Row = dict[str, Any]

# A run that is not finite at a 32nd of its learning rate has another fault.
MAX_ROLLBACKS = 5


class Loop:
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
        self.dense = network.dense_costs(config, trainer.data, trainer.given)
        self.started = time.monotonic()
        names = [name.strip() for name in config.callbacks.split(",") if name.strip()]
        named = [find("callbacks", name, CALLBACKS)(folder.path) for name in names]
        self.callbacks = [*trainer.given.callbacks, *named]

    def go(self) -> Row:
        """Trains to the end and writes the summary, whatever the end is."""
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
        row = self.finish()
        try:
            self.interrupt.check()
        except KeyboardInterrupt as e:
            # Behind the last step; what comes after this run is to hear of it.
            raise type(e)(f"stopped; the run in {self.folder.path} had finished") from None
        return row

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
            fault = (
                f"{e} in epoch {self.position.epoch + 1}; the state after step {self.saved} is "
                f"kept in {self.folder.checkpoints}"
            )
        rollbacks = len(self.position.rollbacks)
        if self.config.on_nan == "stop" or rollbacks == MAX_ROLLBACKS:
            rate = self.config.learning_rate * 0.5**rollbacks
            raise NotFiniteError(
                f"{fault}; try a lower --learning_rate than {rate}, or --on_nan=rollback"
            )
        print(f"{fault}; going back to it at half the learning rate", flush=True)
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
        if 0 < self.config.max_steps <= before and not position.step_in_epoch:
            return False
        begun = time.monotonic()
        means = RunningMeans(position.sums, position.step_in_epoch)
        row = self.trainer.train_epoch(
            position.epoch, means, lambda step: self._between_steps(step, means)
        )
        return self._end_epoch(row, means, before, time.monotonic() - begun)

    def _end_epoch(self, row: Row, means: RunningMeans, before: int, seconds: float) -> bool:
        """Measures and keeps an epoch, or what was trained of it; whether there is more to train.

        `row` is that of `Trainer.train_epoch`; the epoch began `before` steps and took `seconds`.
        """
        position, images = self.position, (self.trainer.step - before) * self.config.batch_size
        whole = means.steps == self.trainer.built.steps_per_epoch
        if not whole:
            self._save_within(means)
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
        """Saves where it is due or asked for by a signal, and then stops if asked to."""
        every = self.config.save_every
        if self.interrupt.requested or (every and step % every == 0):
            self._save_within(means)
        self.interrupt.check()

    def _save_within(self, means: RunningMeans) -> None:
        """Keeps the state in the middle of an epoch.

        Raises:
          NotFiniteError: it is not finite, and is not kept.
        """
        means.flush()
        self.trainer.check(means)
        position = self.position._replace(
            step_in_epoch=means.steps, sums=dict(means.sums), score=None, **self._spent()
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
            **network.sizes(built.units, state, self.trainer.data, self.dense),
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
            pictures.draw(rows, self.folder.plots)
        return result
