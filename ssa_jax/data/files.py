"""Data sets of files: an .npz file, a folder of class folders."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssa_jax.data.arrays import Pair, from_arrays
from ssa_jax.data.datasets import Dataset
from ssa_jax.errors import DataError

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Names of the arrays of an .npz file, in the order in which they are looked for.
_KEYS = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("x", "y", None, None),
    ("images", "labels", None, None),
)


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
