"""What a checkpoint says of itself, and how it is known to be what was written.

The record of a checkpoint holds the position in training, the run's config, package versions,
stored ranks, and shape, dtype and CRC-32 of every array. It is sealed with a digest of itself, so
that damage anywhere that would change what is read is found, whatever the storage format checks.
"""

import gc
import hashlib
import importlib.metadata
import json
import platform
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from ssa_jax.factors import path_name
from ssa_jax.parallel.mesh import on_host
from ssa_jax.types import TrainState

_PACKAGES = ("ssa_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

Record = dict[str, Any]


class DamagedError(Exception):
    """A checkpoint does not hold what was written."""


class Position(NamedTuple):
    """Where in training a state was saved, as JSON can hold it.

    Attributes:
      epoch: whole epochs done.
      step_in_epoch: steps done after them; 0 between epochs.
      sums: of each training metric over those steps, in float64.
      rollbacks: one record for each return to an earlier state.
      wall_s: seconds trained so far.
      score: test accuracy after the last epoch, or minus the loss without one; None within one.
      compiles: compilations of the step so far.
      compile_s: seconds that all programs took to compile so far.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    sums: dict[str, float] = {}  # noqa: RUF012, a default that nothing writes to
    rollbacks: Sequence[dict[str, Any]] = ()
    wall_s: float = 0.0
    score: float | None = None
    compiles: int = 0
    compile_s: float = 0.0


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        # The library may run from its source tree.
        return "not installed"


def differences(here: dict[str, Any], there: dict[str, Any], limit: int = 5) -> str:
    """The first entries in which two records differ, as one phrase; empty for equal ones."""
    names = [k for k in sorted(here.keys() | there.keys()) if here.get(k) != there.get(k)]
    phrases = [f"{k}={here.get(k)} here and {there.get(k)} there" for k in names[:limit]]
    more = [f"{len(names) - limit} more"] if len(names) > limit else []
    return ", ".join(phrases + more)


def of_settings(here: dict[str, Any] | None, there: dict[str, Any] | None) -> str:
    """The `differences` of the settings of a run and of a stored one; None leaves them unchecked.

    A setting that was not there yet when that was written is none, nor is one that is None here:
    not asked for.
    """
    if here is None or there is None:
        return ""
    asked = {name: value for name, value in here.items() if name in there and value is not None}
    return differences(asked, {k: v for k, v in there.items() if here.get(k, k) is not None})


def seal(record: Record) -> dict[str, str]:
    """The record as text beside its digest."""
    text = json.dumps(record)
    return {"record": text, "sha256": _digest(text)}


def unseal(sealed: Any) -> Record:
    """The record of `seal`.

    Raises:
      DamagedError: it is not as it was written.
    """
    try:
        text, digest = sealed["record"], sealed["sha256"]
    except (KeyError, TypeError) as e:
        raise DamagedError("it has no record") from e
    if _digest(text) != digest:
        raise DamagedError("its record is altered")
    return json.loads(text)


def _digest(text: Any) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()


def shapes(state: TrainState) -> dict[str, list[Any]]:
    """Shape and dtype of every array by its path."""
    return {
        path_name(path): [list(x.shape), str(x.dtype)]
        for path, x in jax.tree_util.tree_leaves_with_path(state)
    }


def with_stored_feedback(state: TrainState, stored: dict[str, list[Any]]) -> TrainState:
    """A state whose feedback is cut to stored shapes, by path, where those are nowhere larger.

    Feedback that is measured on factors, as directions of a walk are, shrinks with their ranks.
    """

    def cut(path: Any, x: Any) -> Any:
        shape, *_ = stored.get(f"feedback/{path_name(path)}", [x.shape])
        if len(shape) != x.ndim or any(n > m for n, m in zip(shape, x.shape, strict=True)):
            return x
        return x[tuple(slice(n) for n in shape)]

    return state._replace(feedback=jax.tree_util.tree_map_with_path(cut, state.feedback))


def describe(state: TrainState) -> dict[str, list[Any]]:
    """Shape, dtype and CRC-32 of every array by its path."""
    # Viewed as bytes, since not every dtype of ours is one that Python's buffers know.
    sums = [
        zlib.crc32(np.ascontiguousarray(on_host(x)).reshape(-1).view(np.uint8).data)
        for x in jax.tree.leaves(state)
    ]
    named = zip(shapes(state).items(), sums, strict=True)
    return {path: [*shape, crc] for (path, shape), crc in named}


def read_record(folder: Path) -> Record:
    """The record of the checkpoint in a folder; DamagedError where there is none as written."""
    return unseal(_read_by(lambda: ocp.checkpointables_metadata(folder.resolve())).custom_metadata)


def read_arrays(folder: Path, abstract: TrainState) -> TrainState:
    """The state in a folder, its arrays as `abstract` has them; DamagedError where it cannot be."""
    items = _read_by(lambda: ocp.load_checkpointables(folder.resolve(), {"state": abstract}))
    return items["state"]


def _read_by(read: Callable[[], Any]) -> Any:
    """What a call of Orbax gives; DamagedError where it fails."""
    result, error = None, ""
    with warnings.catch_warnings():
        # Where something is damaged Orbax leaves coroutines behind, of which Python would warn.
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            result = read()
        except Exception as e:
            error = str(e.__cause__ or e) or repr(e)
        gc.collect()
    if error:
        raise DamagedError(error)
    return result


def one_line(error: object) -> str:
    """What an error says, in a line of at most 200 characters."""
    text = " ".join(str(error).split())
    # What went wrong stands at the end of such messages.
    return text if len(text) <= 200 else f"{text[:60]} ... {text[-120:]}"
