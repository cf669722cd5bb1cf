"""Data sets of one's own in memory: arrays, an .npz file, a folder of class folders."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssa_jax.data import Dataset, held_out
from ssa_jax.errors import DataError

Pair = tuple[Any, Any]

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Names of the arrays of an .npz file, in the order in which they are looked for.
_KEYS = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("x", "y", None, None),
    ("images", "labels", None, None),
)
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
        if len(wrong := np.flatnonzero((labels < 0) | (labels >= number))):
            raise DataError(
                f"{which}: example {wrong[0]} has label {labels[wrong[0]]}, outside [0, {number})"
            )
    if (train == train[0]).all():
        raise DataError(f"train: all labels are {train[0]}, there is nothing to tell apart")
    return number


def from_npz(path: str | Path, **options: Any) -> Dataset:
    """A data set of an .npz file.

    Its arrays are ``x_train``, ``y_train``, ``x_test`` and ``y_test``, or ``train_images`` and so
    on, or ``x`` and ``y`` (or ``images`` and ``labels``), of which a tenth is held out.

    Args:
      path: of the file.
      options: of `from_arrays`.

    Raises:
      DataError: it cannot be read, or has other arrays; and as `from_arrays`.
    """
    path = Path(path)
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError) as e:
        raise DataError(f"{path} cannot be read: {e}") from e
    for keys in _KEYS:
        if all(key in arrays for key in keys if key):
            x, y, x_test, y_test = (arrays[key] if key else None for key in keys)
            test = None if x_test is None else (x_test, y_test)
            return from_arrays((x, y), test, **{"name": path.stem, **options})
    names = "; ".join(", ".join(key for key in keys if key) for keys in _KEYS)
    raise DataError(f"{path} has arrays {', '.join(arrays)}; one of these is needed: {names}")


def from_folder(path: str | Path, *, size: int | None = None, **options: Any) -> Dataset:
    """A data set of a folder of class folders of images.

    The folder has a folder for each class, in the order of their names; or folders ``train`` and
    ``test`` (or ``val``) with the same classes. Without those a tenth is held out.

    Args:
      path: of the folder.
      size: side to which the shorter side of an image is scaled, before its centre is cut out;
        None: images are all of one size already.
      options: of `from_arrays`.

    Raises:
      DataError: no class folder, none of their files is an image, one cannot be decoded, or they
        differ in size; and as `from_arrays`.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path} is no folder")
    first = path / "train" if (path / "train").is_dir() else path
    classes = _classes(first)
    train = _read_classes(first, classes, size)
    others = [path / n for n in ("test", "val") if first != path and (path / n).is_dir()]
    test = None
    for second in others[:1]:
        if unknown := set(_classes(second)) - set(classes):
            raise DataError(f"{second} has classes that {first} has not: {sorted(unknown)}")
        test = _read_classes(second, classes, size)
    return from_arrays(train, test, **{"name": path.name, "outputs": len(classes), **options})


def _classes(folder: Path) -> list[str]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(names) < 2:
        raise DataError(f"{folder} needs a folder for each of two or more classes, has {names}")
    return names


def _read_classes(folder: Path, classes: Sequence[str], size: int | None) -> Pair:
    images: list[np.ndarray] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = sorted((folder / name).glob("**/*")) if (folder / name).is_dir() else []
        for file in files:
            if file.suffix.lower() in _SUFFIXES:
                images.append(_read_image(file, size))
                labels.append(label)
    if not images:
        raise DataError(f"{folder} has no images ({', '.join(_SUFFIXES)}) in its class folders")
    shapes = {x.shape[:2] for x in images}
    if len(shapes) > 1:
        some = ", ".join(map(str, sorted(shapes)[:3]))
        raise DataError(f"{folder} has images of several sizes, such as {some}: give size")
    # Gray among colours becomes colour.
    channels = max(x.shape[2] for x in images)
    stacked = [np.repeat(x, channels, 2) if x.shape[2] < channels else x for x in images]
    return np.stack(stacked), np.array(labels, np.int32)


def _read_image(file: Path, size: int | None) -> np.ndarray:
    try:
        with Image.open(file) as opened:
            image = opened.convert("L" if opened.mode in ("1", "L", "I;16") else "RGB")
            if size is not None:
                image = _square(image, size)
            array = np.asarray(image, np.uint8)
    except (OSError, ValueError) as e:
        raise DataError(f"{file} cannot be decoded: {e}") from e
    return array if array.ndim == 3 else array[..., None]


def _square(image: Image.Image, size: int) -> Image.Image:
    scale = size / min(image.size)
    width, height = (max(size, round(n * scale)) for n in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))


def open_data(train: Any, test: Any = None, **options: Any) -> Any:
    """A data set of what a user gives; see `ssa_jax.fit` for the kinds.

    Raises:
      DataError: none of them; and as the readers of this module.
    """
    if isinstance(train, Dataset):
        return train
    if isinstance(train, str | Path):
        path = Path(train).expanduser()
        read = from_npz if path.suffix == ".npz" else from_folder
        return read(path, **options)
    if isinstance(train, Mapping):
        raise DataError("give train as a pair (inputs, targets), not as a mapping")
    return from_arrays(train, test, **options)


def is_pair(train: Any) -> bool:
    """Whether an object is a pair of arrays, and no iterable of batches."""
    return isinstance(train, tuple | list) and len(train) == 2 and not _is_batch(train[0])


def _is_batch(x: Any) -> bool:
    return isinstance(x, tuple | dict) and len(x) == 2
