"""The data sets that have a name."""

import functools
import importlib.util
from collections.abc import Callable

import numpy as np

from ssa_jax.data.datasets import Dataset
from ssa_jax.data.tfds import load_tfds
from ssa_jax.errors import DataError


def load(name: str, data_dir: str | None = None) -> Dataset:
    """Reads a data set whole.

    Args:
      name: a key of `DATASETS`.
      data_dir: TFDS directory; None takes TFDS_DATA_DIR or TFDS's default.

    Raises:
      DataError: unknown, missing or corrupt data, with what to do about it.
    """
    if name not in DATASETS:
        raise DataError(f"dataset must be one of {', '.join(DATASETS)}, got {name!r}")
    return _checked(name, DATASETS[name](data_dir))


def _checked(name: str, data: Dataset) -> Dataset:
    for split in ("train", "test"):
        images, labels = getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")
        if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(labels):
            raise DataError(
                f"{name} {split}: expected uint8 images (n, H, W, C) and as many labels, got "
                f"{images.dtype} {images.shape} and {labels.shape}"
            )
        if len(labels) == 0:
            raise DataError(f"{name} {split}: empty")
        if len(wrong := np.flatnonzero((labels < 0) | (labels >= data.classes))):
            raise DataError(
                f"{name} {split}: record {wrong[0]} has label {labels[wrong[0]]}, outside "
                f"[0, {data.classes})"
            )
    return data


def _digits(data_dir: str | None) -> Dataset:
    """The 1,797 8x8 digits that ship with scikit-learn; a fifth, drawn once, is the test set."""
    del data_dir
    if importlib.util.find_spec("sklearn") is None:
        raise DataError("digits ships with scikit-learn: pip install 'ssa_jax[digits]'")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images[..., None] * (255 / 16)).astype(np.uint8)
    labels = bunch.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    return Dataset(images[train], labels[train], images[test], labels[test], 10, 1, False)


DATASETS: dict[str, Callable[[str | None], Dataset]] = {
    "cifar10": functools.partial(load_tfds, "cifar10", 4, True),
    "cifar100": functools.partial(load_tfds, "cifar100", 4, True),
    "fashion_mnist": functools.partial(load_tfds, "fashion_mnist", 2, True),
    "mnist": functools.partial(load_tfds, "mnist", 2, False),
    "digits": _digits,
}
