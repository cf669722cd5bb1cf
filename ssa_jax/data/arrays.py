"""Data sets of one's own in memory, from arrays."""

import hashlib
import re
from typing import Any

import numpy as np

from ssa_jax.data.datasets import Dataset, held_out
from ssa_jax.errors import DataError

Pair = tuple[Any, Any]
# Share of the examples that is held out where there are none to test on.
TEST_SHARE = 0.1


def from_arrays(
    train: Pair, test: Pair | None = None, *, name: str = "arrays", classes: bool = True,
    outputs: int | None = None, crop: int = 0, flip: bool = False,
) -> Dataset:  # fmt: skip
    """A data set of arrays.

    Args:
      train: inputs (n, ...) and targets (n, ...). Images are uint8 (n, H, W, C) or (n, H, W);
        floating-point inputs of any shape are standardised by their last axis; whole numbers
        other than uint8 are taken as they are.
      test: the same to test on; None holds out a tenth of `train`, always the same.
      name: of the data.
      classes: whether targets (n,) are labels, whole numbers from zero on.
      outputs: number of classes, or of what a model gives for one example; None: one more than
        the largest label, or the targets' size.
      crop: augmentation shifts images by up to this many pixels.
      flip: augmentation mirrors images.

    Raises:
      DataError: arrays of other lengths or kinds, empty ones, values that are not finite, labels
        out of range or of one class alone; one line that says where.
    """
    x, y = _pair("train", train, classes)
    if test is None:
        x, y, x_test, y_test = _held_out(x, y)
    else:
        x_test, y_test = _pair("test", test, classes)
        if x_test.shape[1:] != x.shape[1:] or y_test.shape[1:] != y.shape[1:]:
            raise DataError(
                f"test examples of shapes {x_test.shape[1:]} and {y_test.shape[1:]} do not fit "
                f"training examples of shapes {x.shape[1:]} and {y.shape[1:]}"
            )
    labelled = classes and y.ndim == 1
    if labelled:
        outputs = _check_labels(y, y_test, outputs)
    elif outputs is None:
        outputs = int(np.prod(y.shape[1:]))
    digest = hashlib.sha256()
    for array in (x, y, x_test, y_test):
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    title = f"{re.sub(r'[^0-9a-zA-Z]+', '_', name)}_{digest.hexdigest()[:8]}"
    return Dataset(x, y, x_test, y_test, outputs, crop, flip, title)


def _pair(which: str, pair: Pair, classes: bool) -> Pair:
    try:
        x, y = (np.asarray(a) for a in pair)
    except (TypeError, ValueError) as e:
        raise DataError(f"{which} must be a pair of arrays (inputs, targets): {e}") from e
    if not x.ndim or not y.ndim or len(x) != len(y):
        raise DataError(f"{which} has inputs {x.shape} and targets {y.shape}, not as many of both")
    if not len(x):
        raise DataError(f"{which} is empty")
    if x.ndim == 3 and x.dtype == np.uint8:
        x = x[..., None]
    for what, array in (("inputs", x), ("targets", y)):
        if not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
            raise DataError(f"{which} {what} are {array.dtype}, not numbers")
        if np.issubdtype(array.dtype, np.inexact) and not np.isfinite(array).all():
            wrong = np.argwhere(~np.isfinite(array.reshape(len(array), -1)).all(1))[0, 0]
            raise DataError(f"{which} {what}: example {wrong} has a value that is not finite")
    if classes and y.shape[1:] == (1,):
        raise DataError(f"{which} targets {y.shape} must be labels (n,); give targets[:, 0]")
    if classes and y.ndim == 1:
        if np.issubdtype(y.dtype, np.inexact) and (y != np.round(y)).any():
            raise DataError(
                f"{which} targets (n,) are labels and must be whole numbers; for a regression give "
                "its loss, such as mean_squared_error"
            )
        y = y.astype(np.int32)
    if classes:
        check_shares(which, y)
    return _narrow(x), _narrow(y)


def _narrow(x: np.ndarray) -> np.ndarray:
    """Floats as float32, whole numbers as int32, except uint8."""
    if np.issubdtype(x.dtype, np.inexact):
        return x.astype(np.float32)
    return x if x.dtype == np.uint8 and x.ndim > 1 else x.astype(np.int32)


def _held_out(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
    if len(x) < 2:
        raise DataError("train has one example, and none can be held out to test on")
    kept, held = held_out(len(x), TEST_SHARE)
    return x[kept], y[kept], x[held], y[held]


def _check_labels(train: np.ndarray, test: np.ndarray, classes: int | None) -> int:
    number = int(train.max()) + 1 if classes is None else classes
    for which, labels in (("train", train), ("test", test)):
        check_range(which, labels, number)
    if (train == train[0]).all():
        raise DataError(f"train: all labels are {train[0]}, there is nothing to tell apart")
    return number


def check_range(which: str, labels: np.ndarray, classes: int) -> None:
    """Raises DataError for a label outside [0, classes)."""
    if len(wrong := np.flatnonzero((labels < 0) | (labels >= classes))):
        raise DataError(
            f"{which}: example {wrong[0]} has label {labels[wrong[0]]}, outside [0, {classes})"
        )


def check_shares(which: str, targets: np.ndarray) -> None:
    """Raises DataError for targets (n, classes) of cross-entropy that are no distributions."""
    if targets.ndim != 2:
        return
    wrong = (targets < 0).any(1) | (np.abs(targets.sum(1) - 1) > 1e-3)
    if wrong.any():
        raise DataError(
            f"{which} targets {targets.shape} are shares of classes for cross-entropy, and example "
            f"{np.argmax(wrong)} has none that add up to one; for a regression give its loss, "
            "mean_squared_error, for several labels binary_cross_entropy"
        )


def is_pair(train: Any) -> bool:
    """Whether an object is a pair of arrays, and no iterable of batches."""
    return isinstance(train, tuple | list) and len(train) == 2 and not _is_batch(train[0])


def _is_batch(x: Any) -> bool:
    return isinstance(x, tuple | dict) and len(x) == 2
