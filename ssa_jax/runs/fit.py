"""Training as a function: any model, any loss, any data; what comes back is a run."""

import contextlib
import dataclasses
import difflib
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from ssa_jax.data import Dataset
from ssa_jax.data.batches import Batches
from ssa_jax.errors import ConfigError
from ssa_jax.networks.factorize import has_factors
from ssa_jax.networks.models import Functional, LinenModel, start
from ssa_jax.runs import build
from ssa_jax.runs.config import Config, identity
from ssa_jax.runs.fitted import Described, Run
from ssa_jax.runs.given import PREFIX, Given, name_given
from ssa_jax.runs.inputs import from_arguments
from ssa_jax.runs.run import train_given
from ssa_jax.runs.trained import config_of
from ssa_jax.runs.workdir import Workdir, WorkdirError, stored_config
from ssa_jax.training.checkpoint import Checkpoints

Array = jax.Array
Row = dict[str, Any]
# Models that hold their parameters.
_PARAMETRISED = nnx.Module | LinenModel | Functional


def fit(
    model: Any,
    train: Any,
    *,
    test: Any = None,
    method: Any = "ssa",
    loss: Any = "cross_entropy",
    optimizer: Any = "adam",
    epochs: int = 10,
    batch_size: int = 128,
    rank_schedule: Any = "none",
    callbacks: Sequence[Any] = (),
    workdir: str | Path | None = None,
    crop: int = 0,
    flip: bool = False,
    size: int | None = None,
    outputs: int | None = None,
    name: str = "data",
    steps_per_epoch: int | None = None,
    **settings: Any,
) -> Run:
    """Trains a model, by default with SVD-Space Alignment on factors.

    Args:
      model: an NNX module, a Linen module or a `Functional` that marks its units by `cut`; a
        `Run`, whose training goes on from its model; or a name, of `ssa_jax.models` or
        ``package.module:name`` of a function (input shape, outputs, *, rank, rngs) -> model. For
        a method on factors a dense model is put on them by `factorize`. It stays as it is.
      train: inputs (n, ...) and targets (n, ...) as NumPy or JAX arrays; a path of an .npz file or
        of a folder of class folders; an iterable of batches, such as a Grain data set (see
        `data.batches`); or the name of a TFDS data set that is known.
      test: the same to test on; None holds out a tenth where the data have no test set.
      method: a name of `ssa_jax.methods`, ``package.module:name``, or a function
        (network, options) -> Method.
      loss: a name of `ssa_jax.losses`, ``package.module:name``, a `Task`, or a function
        (outputs, targets) -> scalar or (batch,).
      optimizer: ``"adam"``, ``"momentum"``, or an optax optimiser with a rate of its own.
      epochs: passes over the training examples.
      batch_size: examples in a step; the rest of an epoch is left out.
      rank_schedule: how ranks fall, such as ``"hybrid"``, or a function (share of training, energy,
        final) -> `training.ranks.Target`.
      callbacks: called with the row of each epoch; or names: csv, wandb, ``package.module:name``.
      workdir: where results go; None: a folder that is removed with the run.
      crop: augmentation shifts images by up to this many pixels.
      flip: augmentation mirrors images.
      size: side of the images of a folder.
      outputs: number of classes, or of what the model gives for one example; None: as the data
        tell it.
      name: of the data, kept with the run.
      steps_per_epoch: of an iterable without a length.
      settings: fields of `runs.config.Config`, such as ``seed`` (0), ``learning_rate`` (2e-3),
        ``rank_init`` (0.5), ``resume`` (with a workdir), ``precision``, ``memory``.

    Returns:
      the run.

    Raises:
      ConfigError, DataError, WorkdirError: nothing was overwritten; one line that says what to do.
      CutError: the model cannot be taken apart at its cuts.
      NotFiniteError: the loss or a parameter became NaN or infinite.
      KeyboardInterrupt: after Ctrl-C; in a workdir the state is kept, and ``resume=True`` goes on.
    """
    with _without_dashes():
        moments = model.data.moments if isinstance(model, Run) else None
        whose = "a run, whose model" if isinstance(model, Run) else "a model on factors, which"
        model = model.model if isinstance(model, Run) else model
        on_factors = isinstance(model, _PARAMETRISED) and has_factors(model)
        if on_factors and "rank_init" in settings:
            raise ConfigError(f"--rank_init is not for {whose} keeps its ranks")
        data, dataset = from_arguments(
            train, test, loss, crop, flip, size, outputs, name, steps_per_epoch
        )
        if isinstance(data, Batches):
            batch_size = data.batch_size
        if isinstance(model, Functional) and not on_factors:
            # Which of a function's parameters are kernels it does not tell.
            settings = {"factorize": "off", **settings}
        if moments is not None and isinstance(data, Dataset):
            data = data._replace(moments=moments)
        temporary = None if workdir else _Temporary()
        folder = temporary.path / "run" if temporary else Path(str(workdir)).expanduser()
        names, given = name_given(
            callbacks, model=model, method=method, loss=loss, optimizer=optimizer,
            rank_schedule=rank_schedule,
        )  # fmt: skip
        config = _config(
            settings, temporary is not None, dataset=dataset, epochs=epochs, batch_size=batch_size,
            workdir=str(folder), **names,
        )  # fmt: skip
        if given.model is not None and data is not None:
            given = given._replace(model=start(given.model, data.example, config.seed))
        _, trainer = train_given(config, data, given)
        described = Described.of(trainer.data)
        described.write(folder)
        return Run(trainer.config, folder, trainer.built, trainer.state, described, temporary)


def load(
    path: str | Path,
    *,
    model: Any = None,
    method: Any = None,
    loss: Any = None,
    optimizer: Any = None,
    rank_schedule: Any = None,
) -> Run:
    """Reads a run of `fit`, at its newest checkpoint.

    Args:
      path: its folder.
      model: where the run was given an object for its model, one of the same structure; its
        values do not matter.
      method, loss, optimizer, rank_schedule: where the run was given objects, the same ones.

    Raises:
      WorkdirError: there is no such run, or an object is missing; the line says which.
      CheckpointError: the run has no checkpoint that can be read.
    """
    with _without_dashes():
        folder = Path(path).expanduser()
        stored = stored_config(folder)
        data = Described.read(folder)
        if stored is None or data is None:
            raise WorkdirError(
                f"{folder} holds no run of ssa_jax.fit"
                + (", which leaves data.json beside config.json" if stored else "")
            )
        config = config_of(folder, stored)
        objects = {
            "model": model, "method": method, "loss": loss, "optimizer": optimizer,
            "rank_schedule": rank_schedule,
        }  # fmt: skip
        for field, value in objects.items():
            if value is None and getattr(config, field).startswith(f"{PREFIX}:"):
                raise WorkdirError(
                    f"the run was given an object for its {field} ({getattr(config, field)}); give "
                    f"one to load as well: load(path, {field}=...)"
                )
        given = Given(**objects)
        if model is not None:
            given = given._replace(model=start(model, data.example, config.seed))
        built = build.build(config, data, given=given)
        checkpoints = Checkpoints(Workdir(folder).checkpoints, config=identity(config))
        _, state = checkpoints.restore(built.state)
        return Run(config, folder, built, state, data)


def _config(settings: Mapping[str, Any], temporary: bool, **fields: Any) -> Config:
    known = {field.name for field in dataclasses.fields(Config)} - {"dataset"}
    for name in sorted(settings.keys() - known):
        if name == "dataset":
            raise TypeError("fit has no setting dataset; give the name as train")
        close = difflib.get_close_matches(name, known)
        raise TypeError(
            f"fit has no setting {name}; "
            + (f"did you mean {' or '.join(close)}?" if close else f"there are {sorted(known)}")
        )
    if settings.get("resume") and temporary:
        raise ConfigError("--resume needs the workdir of the run that it goes on with")
    chosen = {**settings, **fields}
    # NumPy's scalars are no JSON.
    return Config(**{n: v.item() if isinstance(v, np.generic) else v for n, v in chosen.items()})


class _Temporary:
    """A folder that is removed when nothing refers to it any more, and at the end."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="ssa_jax-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@contextlib.contextmanager
def _without_dashes() -> Iterator[None]:
    """Errors of settings name arguments: a caller of a function has no flags."""
    try:
        yield
    except (ConfigError, WorkdirError) as e:
        raise type(e)(re.sub(r"--(?=\w)", "", str(e))) from e
