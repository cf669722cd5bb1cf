"""A data set as a few files, each small enough to be sent alone and of use alone.

A part holds every n-th training image and every n-th test image, so that one of three parts is a
smaller data set of the same kind.
"""

from pathlib import Path

import numpy as np

from ssa_jax.data import Dataset, load
from ssa_jax.errors import DataError

# Of images in a file; labels and headers stay below another 60 kB.
PART_BYTES = 59 * 2**20
_FIELDS = ("train_images", "train_labels", "test_images", "test_labels")


def prepare(folder: Path, name: str = "cifar10") -> list[Path]:
    """Writes a data set that is installed here as parts.

    Raises:
      DataError: it is not prepared; the line says what to do.
    """
    return split(load(name), folder)


def split(data: Dataset, folder: Path, most: int = PART_BYTES) -> list[Path]:
    """Writes a data set as parts of at most `most` bytes of images, and a little."""
    number = -(-(data.train_images.nbytes + data.test_images.nbytes) // most)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for i in range(number):
        file = folder / f"part{i}of{number}.npz"
        arrays = {name: getattr(data, name)[i::number] for name in _FIELDS}
        about = {"classes": data.classes, "crop": data.crop, "flip": data.flip}
        np.savez(file, **arrays, **about)
        files.append(file)
    return files


def parts(folder: Path | None) -> list[Path]:
    """The parts that are there."""
    return sorted(folder.glob("part*of*.npz")) if folder else []


def join(folder: Path) -> Dataset:
    """The data set of the parts that are there.

    Raises:
      DataError: there is none.
    """
    files = parts(folder)
    if not files:
        raise DataError(f"{folder} holds no part of a data set; see --prepare")
    read = []
    for file in files:
        with np.load(file) as content:
            read.append({name: content[name] for name in content.files})
    arrays = {name: np.concatenate([r[name] for r in read]) for name in _FIELDS}
    first = read[0]
    return Dataset(
        **arrays, classes=int(first["classes"]), crop=int(first["crop"]), flip=bool(first["flip"])
    )


def noise(train: int, test: int, shape: tuple[int, int, int] = (32, 32, 3)) -> Dataset:
    """Random images with random labels of ten classes, to see that something runs."""
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (train + test, *shape), np.uint8)
    labels = draw.integers(0, 10, train + test).astype(np.int32)
    return Dataset(
        images[:train], labels[:train], images[train:], labels[train:], 10, crop=4, flip=True
    )
