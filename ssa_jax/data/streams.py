"""Image data sets too large for memory: random access to compressed images, nothing decoded yet."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ssa_jax.data.datasets import drawn, held_out
from ssa_jax.data.tfds import open_tfds
from ssa_jax.errors import DataError


class Source(Protocol):
    """Random access to records with "image", a file as bytes, and "label"."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Subset(NamedTuple):
    """The records of a source at some indices."""

    source: Source
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return self.source[int(self.indices[index])]


class Stream(NamedTuple):
    """A labelled data set of compressed images.

    Attributes:
      name: as messages have it.
      train, test: records.
      classes: number of classes.
      image_size: height and width that images get.
    """

    name: str
    train: Source
    test: Source
    classes: int
    image_size: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, 3)."""
        return self.image_size, self.image_size, 3

    @property
    def example(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of one image as the model gets it."""
        return jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32)

    @property
    def train_size(self) -> int:
        """Number of training examples."""
        return len(self.train)


class Splits(NamedTuple):
    """What is trained and measured on in TFDS, and the usual size of its images."""

    train: str
    test: str
    image_size: int


# imagenet_sample1k has an image a class and one split: what it measures is what it remembers.
STREAMS = {
    "imagenet2012": Splits("train", "validation", 224),
    "tiny_imagenet10": Splits("train", "validation", 64),
    "imagenet_sample1k": Splits("train", "train", 64),
}


def load(name: str, data_dir: str | None = None, image_size: int = 0) -> Stream:
    """Opens a data set, of which nothing is decoded yet.

    Args:
      name: a key of `STREAMS`.
      data_dir: TFDS directory; None takes TFDS_DATA_DIR or TFDS's default.
      image_size: height and width; 0 for the data set's usual one.

    Raises:
      DataError: unknown or missing data, with what to do about it.
    """
    if name not in STREAMS:
        raise DataError(f"dataset must be one of {', '.join(STREAMS)}, got {name!r}")
    splits = STREAMS[name]
    builder = open_tfds(name, data_dir)
    import tensorflow_datasets as tfds

    try:
        train, test = (
            builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
            for split in (splits.train, splits.test)
        )
        empty = not len(train) or not len(test)
    except Exception as e:
        raise DataError(f"{name} in {builder.data_dir} cannot be opened: {e}") from e
    if empty:
        raise DataError(f"{name} in {builder.data_dir}: empty")
    classes = builder.info.features["label"].num_classes
    return Stream(name, train, test, classes, image_size or splits.image_size)


def hold_out(stream: Stream, share: float) -> Stream:
    """As `data.hold_out`: a share of the training examples in place of the test set."""
    if not share:
        return stream
    kept, held = held_out(stream.train_size, share)
    return stream._replace(train=Subset(stream.train, kept), test=Subset(stream.train, held))


def limited(stream: Stream, size: int) -> Stream:
    """As `data.limited`: at most `size` of the training examples, always the same; 0 keeps all."""
    if not 0 < size < stream.train_size:
        return stream
    return stream._replace(train=Subset(stream.train, drawn(stream.train_size, size)))
