"""Training as a function: any model, any loss, any data; what comes back is a run."""

import contextlib
import dataclasses
import difflib
import functools
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssa_jax import data as data_lib
from ssa_jax.data import Dataset
from ssa_jax.data.arrays import is_pair
from ssa_jax.data.batches import Batches, from_batches
from ssa_jax.data.files import open_data
from ssa_jax.errors import ConfigError, DataError
from ssa_jax.networks.forward import predict
from ssa_jax.networks.models import start
from ssa_jax.networks.units import Unit
from ssa_jax.reporting import plots
from ssa_jax.runs import build, inputs
from ssa_jax.runs.build import Built, Given
from ssa_jax.runs.config import Config, identity
from ssa_jax.runs.run import train_given
from ssa_jax.runs.summary import shown_score
from ssa_jax.runs.workdir import Workdir, WorkdirError, read_json, stored_config, write_json
from ssa_jax.training import train
from ssa_jax.training.checkpoint import Checkpoints
from ssa_jax.types import Batch, TrainState

Array = jax.Array
Row = dict[str, Any]
Moments = tuple[np.ndarray, np.ndarray] | None

_DATA = "data.json"
# Examples at a time in `Run.predict` and `Run.evaluate`.
_ROWS = 500


class Described(NamedTuple):
    """What is known of a run's data without having it; see `data.Images`."""

    image_shape: tuple[int, ...]
    classes: int
    train_size: int
    dtype: str
    moments: Moments

    @property
    def example(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of one input as the model gets it, (1, ...)."""
        return jax.ShapeDtypeStruct((1, *self.image_shape), self.dtype)


@dataclasses.dataclass(frozen=True, repr=False)
class Run:
    """A trained model, and what is known of its training.

    Attributes:
      config: the settings.
      folder: its workdir.
      built: the network, its method and optimiser.
      state: the training state at the end.
      data: what is known of the data that it was trained on.
    """

    config: Config
    folder: Path
    built: Built
    state: TrainState
    data: Described
    _kept: Any = None

    def __repr__(self) -> str:
        config, rows = self.config, self.history
        reached = f", {shown_score(rows[-1])} after epoch {rows[-1]['epoch']}" if rows else ""
        return f"<Run: {config.method}, {config.model} on {config.dataset}{reached}>"

    @property
    def history(self) -> list[Row]:
        """One row an epoch: losses, metrics, angles, ranks, times."""
        return Workdir(self.folder).rows()

    @property
    def summary(self) -> Row:
        """What the run ended with."""
        return read_json(self.folder / "summary.json") or {}

    @property
    def model(self) -> Any:
        """The model with the trained values, in evaluation mode, at the stored ranks.

        An NNX module, a `LinenModel` or a `Functional`, as it was given. It takes normalised
        inputs; `predict` takes raw ones.
        """
        return self.built.merge(self.state.params, self.state.mstate)

    def predict(self, x: Any) -> np.ndarray:
        """Outputs (n, ...) for raw inputs x (n, ...), normalised as in training."""
        x = np.asarray(x)
        if x.ndim == len(self.data.image_shape) and x.dtype == np.uint8:
            # Gray images need not have an axis for their channel.
            x = x[..., None]
        if x.shape[1:] != self.data.image_shape:
            raise ValueError(
                f"the model takes inputs (n, {', '.join(map(str, self.data.image_shape))}), got "
                f"{x.shape}"
            )
        found = [
            np.asarray(self._outputs(self.state.params, self.state.mstate, rows))[:count]
            for rows, count in self._rows(x)
        ]
        return np.concatenate(found)

    @functools.cached_property
    def _outputs(self) -> Callable[[Any, Any, Any], Array]:
        """The compiled (params, mstate, rows) -> outputs, one for all calls."""
        return jax.jit(functools.partial(predict, self.built.units))

    def _rows(self, x: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        size = min(_ROWS, len(x))
        for begin in range(0, len(x), size):
            rows = x[begin : begin + size]
            missing = size - len(rows)
            padded = np.concatenate([rows, np.repeat(rows[:1], missing, 0)]) if missing else rows
            yield data_lib.normalise(padded, self.data.moments), len(rows)

    def evaluate(self, test: tuple[Any, Any]) -> Row:
        """Mean loss and metrics on raw inputs and targets, by name."""
        x, y = (np.asarray(a) for a in test)
        outputs = jnp.asarray(self.predict(x))
        targets = jnp.asarray(y if np.issubdtype(y.dtype, np.floating) else y.astype(np.int32))
        measure = train.make_eval((_IDENTITY,), self.built.task)
        found = measure(({},), ({},), Batch(outputs, targets, jnp.ones(len(y))))
        return {name: float(v) / len(y) for name, v in found.items() if name != "count"}

    def save(self, path: str | Path) -> Path:
        """Copies the run's folder; `ssa_jax.load` reads it.

        Raises:
          WorkdirError: the path exists.
        """
        path = Path(path).expanduser()
        if path.exists():
            raise WorkdirError(f"{path} exists; nothing was written")
        shutil.copytree(self.folder, path)
        return path

    def plot(self) -> Any:
        """A matplotlib figure of loss, accuracy and ranks by epoch."""
        return plots.overview(self.history)


# What `train.make_eval` takes for a network where outputs are there already.
_IDENTITY = Unit(lambda p, m, x, train: (x, m), lambda p, t, m, x: x)


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
        if isinstance(model, Run):
            if "rank_init" in settings:
                raise ConfigError("--rank_init is not for a run, whose model keeps its ranks")
            model = model.model
        data, dataset = _data(train, test, loss, crop, flip, size, outputs, name, steps_per_epoch)
        if isinstance(data, Batches):
            batch_size = data.batch_size
        if moments is not None and isinstance(data, Dataset):
            data = data._replace(moments=moments)
        kept = None if workdir else _Temporary()
        folder = kept.path / "run" if kept else Path(str(workdir)).expanduser()
        names, given = _given(
            callbacks, model=model, method=method, loss=loss, optimizer=optimizer,
            rank_schedule=rank_schedule,
        )  # fmt: skip
        config = _config(
            settings, kept is not None, dataset=dataset, epochs=epochs, batch_size=batch_size,
            workdir=str(folder), **names,
        )  # fmt: skip
        if given.model is not None and data is not None:
            given = given._replace(model=start(given.model, data.example, config.seed))
        _, trainer = train_given(config, data, given)
        described = _described(trainer.data)
        _write(folder, described)
        return Run(config, folder, trainer.built, trainer.state, described, kept)


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
        described = read_json(folder / _DATA)
        if stored is None or described is None:
            raise WorkdirError(f"{folder} holds no run of ssa_jax.fit")
        config = Config(**stored)
        objects = {
            "model": model, "method": method, "loss": loss, "optimizer": optimizer,
            "rank_schedule": rank_schedule,
        }  # fmt: skip
        for field, value in objects.items():
            if value is None and getattr(config, field).startswith(f"{_GIVEN}:"):
                raise WorkdirError(
                    f"the run was given an object for its {field} ({getattr(config, field)}); give "
                    f"one to load as well: load(path, {field}=...)"
                )
        data = _read(described)
        given = Given(**objects)
        if model is not None:
            given = given._replace(model=start(model, data.example, config.seed))
        built = build.build(config, data, given=given)
        checkpoints = Checkpoints(Workdir(folder).checkpoints, config=identity(config))
        _, state = checkpoints.restore(built.state)
        return Run(config, folder, built, state, data)


# Stands for a module in the names of objects that were given.
_GIVEN = "given"


def _named(value: Any) -> str:
    name = getattr(value, "__qualname__", None) or type(value).__name__
    return f"{_GIVEN}:{re.sub(r'[^0-9a-zA-Z]+', '_', name).strip('_') or 'object'}"


def _given(callbacks: Sequence[Any], **asked: Any) -> tuple[dict[str, str], Given]:
    """Names for the config, and the objects that were not given by name."""
    names = {n: v if isinstance(v, str) else _named(v) for n, v in asked.items()}
    objects = {n: v for n, v in asked.items() if not isinstance(v, str)}
    # Those by name are found by the run.
    names["callbacks"] = ",".join(c for c in callbacks if isinstance(c, str))
    called = tuple(c for c in callbacks if not isinstance(c, str))
    return names, Given(**objects, callbacks=called)


def _config(settings: Mapping[str, Any], kept: bool, **fields: Any) -> Config:
    known = {field.name for field in dataclasses.fields(Config)} - {"dataset"}
    for name in sorted(settings.keys() - known):
        if name == "dataset":
            raise TypeError("fit has no setting dataset; give the name as train")
        close = difflib.get_close_matches(name, known)
        raise TypeError(
            f"fit has no setting {name}; "
            + (f"did you mean {' or '.join(close)}?" if close else f"there are {sorted(known)}")
        )
    if settings.get("resume") and kept:
        raise ConfigError("--resume needs the workdir of the run that it goes on with")
    return Config(**{**settings, **fields})


def _data(
    train: Any, test: Any, loss: Any, crop: int, flip: bool, size: int | None,
    outputs: int | None, name: str, steps: int | None,
) -> tuple[Any, str]:  # fmt: skip
    """The data, and their name in the config; None for data that the config names."""
    if test is not None and isinstance(train, str | Path | Dataset):
        raise DataError(
            "test goes with arrays and batches; a name, a path or a Dataset has its own"
        )
    named = isinstance(train, str) and not Path(train).expanduser().exists()
    batches = not named and not isinstance(train, str | Path | Dataset) and not is_pair(train)
    _refuse_unused(
        {"crop": crop, "flip": flip, "size": size},
        named or batches or isinstance(train, Dataset),
        "is for arrays and files; a named data set, a Dataset and batches come as they are",
    )
    _refuse_unused(
        {"outputs": outputs}, named, "is for data that do not tell it; a named data set does"
    )
    _refuse_unused({"steps_per_epoch": steps}, not batches, "is for an iterable of batches")
    if named:
        return None, train
    labelled = loss == "cross_entropy" or getattr(loss, "classes", False)
    kinds: dict[str, Any] = {"classes": labelled, "outputs": outputs}
    if batches:
        data: Any = from_batches(train, test, name=name, steps_per_epoch=steps, **kinds)
        return data, f"{_GIVEN}:{re.sub(r'[^0-9a-zA-Z]+', '_', name)}"
    options = {**kinds, "crop": crop, "flip": flip}
    if isinstance(train, str | Path):
        options = {n: v for n, v in options.items() if v is not None}
        options |= {"size": size} if Path(train).expanduser().is_dir() else {}
    else:
        options["name"] = name
    data = open_data(train, test, **options)
    return data, f"{_GIVEN}:{data.name or 'data'}"


def _refuse_unused(arguments: dict[str, Any], unused: bool, why: str) -> None:
    """Raises DataError for an argument that is given and would do nothing."""
    for name, value in arguments.items():
        if unused and value not in (0, None):
            raise DataError(f"{name} {why}")


def _described(data: Any) -> Described:
    example = data.example
    return Described(
        tuple(data.image_shape), data.classes, data.train_size, str(example.dtype),
        inputs.moments(data),
    )  # fmt: skip


def _write(folder: Path, data: Described) -> None:
    found = None if data.moments is None else [m.tolist() for m in data.moments]
    write_json(folder / _DATA, {**data._asdict(), "moments": found})


def _read(stored: Row) -> Described:
    found = stored["moments"]
    moments = None if found is None else tuple(np.asarray(m, np.float32) for m in found)
    shape = tuple(stored["image_shape"])
    return Described(**{**stored, "image_shape": shape, "moments": moments})


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
    except ConfigError as e:
        raise ConfigError(re.sub(r"--(?=\w)", "", str(e))) from e
