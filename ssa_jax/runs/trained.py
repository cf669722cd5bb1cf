"""The model of a run, from its workdir."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx

from ssa_jax.errors import ConfigError
from ssa_jax.runs import build, inputs, workdir
from ssa_jax.runs.config import BEFORE, Config, identity
from ssa_jax.runs.given import NOTHING, PREFIX, Given
from ssa_jax.runs.inputs import Data
from ssa_jax.runs.workdir import Workdir, WorkdirError
from ssa_jax.training.checkpoint import CheckpointError, Checkpoints


class Trained(NamedTuple):
    """A run at its newest checkpoint.

    Attributes:
      config: its settings.
      data: its data set.
      model: in evaluation mode, at the stored ranks.
      epoch: whole epochs done.
      test_accuracy: what training measured at that step; None where it did not.
    """

    config: Config
    data: Data
    model: nnx.Module
    epoch: int
    test_accuracy: float | None


def restore(
    path: Path, data_dir: str | None = None, data: Data | None = None, given: Given = NOTHING
) -> Trained:
    """Reads a run without changing its folder.

    Args:
      path: its workdir.
      data_dir: where its data set is, if no longer where the run found it.
      data: its data set, where it is not one of a name.
      given: the objects that the run was given in place of names.

    Raises:
      WorkdirError: no run there.
      CheckpointError: a run without a checkpoint, or with one that cannot be read.
      ConfigError, DataError: settings or data that this code does not have.
    """
    stored = workdir.stored_config(path)
    if stored is None:
        raise WorkdirError(f"{path} holds no run: config.json is missing or damaged")
    config = config_of(path, stored)
    config.validate()
    folder = Workdir(path)
    checkpoints = Checkpoints(folder.checkpoints, config=identity(config))
    if checkpoints.latest() is None:
        raise CheckpointError(f"{path} holds no checkpoint; train it first, with --resume")
    if data is None and config.dataset.startswith(f"{PREFIX}:"):
        raise ConfigError(f"{path} was trained on data that were given to fit; read it by load")
    data = inputs.of_run(dataclasses.replace(config, data_dir=data_dir or config.data_dir), data)
    built = build.build(config, data, given=given)
    position, state = checkpoints.restore(built.state)
    model = built.merge(state.params, state.mstate)
    accuracy = {row["step"]: row.get("test_accuracy") for row in folder.rows()}
    return Trained(config, data, model, position.epoch, accuracy.get(int(state.step)))


def config_of(path: Path, stored: dict[str, Any]) -> Config:
    """The config of a stored run; a setting that it lacks is at the value that changes nothing.

    Raises:
      WorkdirError: settings that this code does not have.
    """
    known = {field.name for field in dataclasses.fields(Config)}
    if unknown := sorted(stored.keys() - known):
        raise WorkdirError(f"{path} is a run of other code: unknown settings {', '.join(unknown)}")
    return Config(**{**BEFORE, **stored})
