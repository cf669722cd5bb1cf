"""What `ssa_jax.fit` gives: a trained model, and what is known of its training."""

import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssa_jax import data as data_lib
from ssa_jax.data.arrays import check_range, is_pair
from ssa_jax.errors import DataError
from ssa_jax.networks.forward import predict
from ssa_jax.networks.units import Unit
from ssa_jax.reporting import pictures
from ssa_jax.reporting.summary import shown_score
from ssa_jax.runs import inputs
from ssa_jax.runs.build import Built
from ssa_jax.runs.config import Config
from ssa_jax.runs.inputs import Data
from ssa_jax.runs.workdir import Workdir, WorkdirError, read_json, write_json
from ssa_jax.training import train
from ssa_jax.types import Batch, TrainState

Array = jax.Array
Row = dict[str, Any]
Moments = tuple[np.ndarray, np.ndarray] | None
_FILE = "data.json"
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

    @classmethod
    def of(cls, data: Data) -> "Described":
        """What is known of data that are there."""
        shape, dtype = tuple(data.image_shape), str(data.example.dtype)
        return cls(shape, data.classes, data.train_size, dtype, inputs.moments(data))

    @classmethod
    def read(cls, folder: Path) -> "Described | None":
        """What `write` left in the folder of a run, or None where there is nothing."""
        stored = read_json(folder / _FILE)
        if not stored:
            return None
        if stored["moments"] is not None:
            stored["moments"] = tuple(np.asarray(m, np.float32) for m in stored["moments"])
        return cls(**{**stored, "image_shape": tuple(stored["image_shape"])})

    def write(self, folder: Path) -> None:
        """Leaves it in the folder of a run."""
        moments = None if self.moments is None else [m.tolist() for m in self.moments]
        write_json(folder / _FILE, {**self._asdict(), "moments": moments})


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
    _temporary: Any = None

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

    @functools.cached_property
    def model(self) -> Any:
        """The model with the trained values, in evaluation mode, at the stored ranks.

        An NNX module, a `LinenModel` or a `Functional`, as it was given. It takes normalised
        inputs; `predict` takes raw ones. Always the same object: what is changed in it, such as a
        new last layer, is what `fit(run, ...)` goes on from, and not what `predict` computes.
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
        outputs = [
            np.asarray(self._outputs(self.state.params, self.state.mstate, rows))[:count]
            for rows, count in self._rows(x)
        ]
        return np.concatenate(outputs)

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
        """Mean loss and metrics on raw inputs and targets, by name.

        Raises:
          DataError: no pair of arrays, or labels that the run has no class for.
        """
        if not is_pair(test):
            raise DataError(f"evaluate takes a pair (inputs, targets), got {type(test).__name__}")
        x, y = (np.asarray(a) for a in test)
        if self.built.task.classes and y.ndim == 1:
            check_range("test", y, self.data.classes)
        outputs = jnp.asarray(self.predict(x))
        targets = jnp.asarray(y if np.issubdtype(y.dtype, np.floating) else y.astype(np.int32))
        measure = train.make_eval((_IDENTITY,), self.built.task)
        sums = measure(({},), ({},), Batch(outputs, targets, jnp.ones(len(y))))
        return {name: float(v) / len(y) for name, v in sums.items() if name != "count"}

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
        return pictures.overview(self.history)


# What `train.make_eval` takes for a network where outputs are there already.
_IDENTITY = Unit(lambda p, m, x, train: (x, m), lambda p, t, m, x: x)
