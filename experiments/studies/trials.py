"""The trials of a study: one variant with one seed each, an ordinary run in its own workdir.

An interrupted study goes on where it stopped: a trial that is done is kept, one with checkpoints is
resumed. Done is a run that finished, one that went as far as `--max_steps` asks, and one that was
no longer finite, which the same settings would only repeat.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments.folders import locked
from ssa_jax.errors import NotFiniteError
from ssa_jax.parallel.interrupt import Terminated
from ssa_jax.runs import workdir
from ssa_jax.runs.config import Config
from ssa_jax.runs.given import NOTHING, Given
from ssa_jax.runs.inputs import Data
from ssa_jax.runs.run import train_given
from ssa_jax.training.checkpoint import Checkpoints


class Trial(NamedTuple):
    """The name of a variant, and the config of one of its runs, which names the workdir."""

    variant: str
    config: Config

    @property
    def path(self) -> Path:
        """Its workdir."""
        return Path(str(self.config.workdir))


def result(trial: Trial) -> dict[str, Any] | None:
    """The summary of a trial that is done, or None."""
    summary = workdir.read_json(trial.path / "summary.json")
    status = summary.get("status")
    stopped = status == "stopped" and 0 < trial.config.max_steps <= summary["steps"]
    return summary if stopped or status in ("finished", "not_finite") else None


def check_same(trials: Iterable[Trial]) -> None:
    """Checks that the folders of trials which are there are of their configurations.

    Raises:
      WorkdirError: one is not; the message says in what.
    """
    for trial in trials:
        if stored := workdir.stored_config(trial.path):
            workdir.check_same(trial.path, trial.config, stored)


@contextlib.contextmanager
def going_on(flags: str, write: Callable[[], Any]) -> Iterator[None]:
    """Ends a list of trials that is interrupted with its results written, and how to go on."""
    try:
        yield
    except KeyboardInterrupt as e:
        write()
        what = "stopped by SIGTERM" if isinstance(e, Terminated) else "interrupted"
        # Ctrl-C or SIGTERM, which end a program with different codes.
        raise type(e)(f"{what}; go on with the same flags and {flags}") from None


def run_trial(
    trial: Trial, load: Callable[[], Data], given: Callable[[], Given] = lambda: NOTHING
) -> None:
    """Runs or resumes a trial that is not done and that no other process is running.

    A run that is not finite is told and leaves its summary; other errors are those of
    `ssa_jax.runs.run.run`.
    """
    trial.path.mkdir(exist_ok=True)
    name = trial.path.name
    with locked(trial.path, wait=False) as ours:
        if not ours:
            print(f"{name}: another process is running it", flush=True)
            return
        config = still_to_run(trial)
        print(f"{name}:" if config else f"{name}: kept", flush=True)
        try:
            if config:
                train_given(config, load(), given())
        except NotFiniteError as e:
            print(f"{name} failed: {e}", flush=True)


def still_to_run(trial: Trial) -> Config | None:
    """The config to run a trial with, resumed where it has checkpoints; None where it is done.

    Its folder, which must exist, is emptied where nothing in it can be gone on with.

    Raises:
      WorkdirError: it holds a run of another configuration.
    """
    resume = False
    if any(trial.path.iterdir()):
        folder = workdir.reopen(dataclasses.replace(trial.config, resume=True))
        if result(trial):
            return None
        resume = Checkpoints(folder.checkpoints).latest() is not None
        if not resume:
            # It ended before its first checkpoint, which precedes its first step.
            for path in trial.path.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return dataclasses.replace(trial.config, resume=resume)
