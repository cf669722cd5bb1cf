"""The trials of a study: one variant with one seed each, an ordinary run in its own workdir.

An interrupted study goes on where it stopped: a trial that is done is kept, one with checkpoints is
resumed. Done is a run that finished, one that went as far as `--max_steps` asks, and one that was
no longer finite, which the same settings would only repeat.
"""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from experiments.folders import locked
from ssa_jax.errors import NotFiniteError
from ssa_jax.runs import workdir
from ssa_jax.runs.config import Config
from ssa_jax.runs.inputs import Data
from ssa_jax.runs.run import run
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


def run_trial(trial: Trial, load: Callable[[], Data]) -> None:
    """Runs or resumes a trial that is not done and that no other process is running.

    A run that is not finite is told and leaves its summary; other errors are those of
    `ssa_jax.runs.run.run`.
    """
    trial.path.mkdir(exist_ok=True)
    with locked(trial.path, wait=False) as ours:
        if ours:
            _run_or_keep(trial, load)
        else:
            print(f"{trial.path.name}: another process is running it", flush=True)


def _run_or_keep(trial: Trial, load: Callable[[], Data]) -> None:
    name = trial.path.name
    config = still_to_run(trial)
    if config is None:
        print(f"{name}: kept", flush=True)
        return
    print(f"{name}:", flush=True)
    try:
        run(config, load())
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
            _empty(trial.path)
    return dataclasses.replace(trial.config, resume=resume)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
