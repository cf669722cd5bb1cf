"""Image data sets that TFDS has prepared, read whole or opened."""

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np

from ssa_jax.data.datasets import Dataset
from ssa_jax.data.decoded import kept
from ssa_jax.errors import DataError


def load_tfds(name: str, crop: int, flip: bool, data_dir: str | None) -> Dataset:
    """A data set with an image and a label an example, read whole; errors as `open_tfds`."""
    builder = open_tfds(name, data_dir)
    train, test = (
        kept(Path(builder.data_dir), split, functools.partial(_read_split, builder, name, split))
        for split in ("train", "test")
    )
    classes = builder.info.features["label"].num_classes
    return Dataset(*train, *test, classes=classes, crop=crop, flip=flip)


def open_tfds(name: str, data_dir: str | None) -> Any:
    """The TFDS builder of a prepared data set.

    Raises:
      DataError: it is not prepared, and cannot be.
    """
    # Imported late: it takes seconds, and the digits need none of it.
    import tensorflow_datasets as tfds

    # TFDS reads the variable once, at its first import; a later change should count too.
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or None
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except Exception as e:
        raise DataError(f"{name} in {data_dir or 'the default TFDS directory'}: {e}") from e
    if not builder.is_prepared():
        _prepare(builder, name)
    return builder


def _prepare(builder: Any, name: str) -> None:
    """Downloads a data set when TensorFlow is there to convert it.

    Raises:
      DataError: TensorFlow is not installed, or the download failed.
    """
    # The directory is <data_dir>/<name>/<version>.
    where = os.path.dirname(os.path.dirname(str(builder.data_dir)))
    if importlib.util.find_spec("tensorflow") is None:
        raise DataError(
            f"{name} is not prepared in {where}: either pip install 'ssa_jax[prepare]' and run "
            "again to download it, or point --data_dir (or TFDS_DATA_DIR) to a directory where "
            "it is prepared as array_record"
        )
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as e:
        raise DataError(f"{name} could not be downloaded to {where}: {e}") from e


def _read_split(builder: Any, name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    where = str(builder.data_dir)
    try:
        source = builder.as_data_source(split)
        n = len(source)
    except Exception as e:
        raise DataError(
            f"{name} {split} in {where} cannot be opened as array_record, the one format that "
            f"is read without TensorFlow: {e}"
        ) from e
    images: list[np.ndarray] = []
    labels = np.empty(n, np.int32)
    for i in range(n):
        try:
            example = source[i]
            images.append(np.asarray(example["image"]))
            labels[i] = example["label"]
        except Exception as e:
            raise DataError(f"{name} {split} in {where}: record {i} is corrupt: {e}") from e
        if images[i].shape != images[0].shape:
            raise DataError(
                f"{name} {split} in {where}: record {i} is corrupt: an image {images[i].shape} "
                f"among images {images[0].shape}"
            )
    return np.stack(images), labels
