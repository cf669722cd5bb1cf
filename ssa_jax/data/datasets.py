"""Data sets in memory: their parts, and how their inputs are normalised."""

import functools
import itertools
import operator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ssa_jax.errors import DataError


class Images(Protocol):
    """What a network and a run need to know of a data set, wherever its images are."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one input, such as (H, W, C)."""

    @property
    def classes(self) -> int:
        """Number of classes, or of outputs."""

    @property
    def train_size(self) -> int:
        """Number of training examples."""

    @property
    def example(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of one input as the model gets it, (1, ...)."""


class Dataset(NamedTuple):
    """A data set in memory.

    Attributes:
      train_images, test_images: inputs, such as images, uint8 (n, H, W, C).
      train_labels, test_labels: targets, such as labels, int32 (n,), in [0, classes).
      classes: number of classes, or of a model's outputs for one example.
      crop: augmentation shifts images by up to this many pixels.
      flip: augmentation mirrors images.
      name: of the data, with a digest of it; empty for one of `DATASETS`.
      moments: mean and deviation by which inputs are normalised, of the shape of their last axis;
        None: those of the training inputs.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: int
    crop: int
    flip: bool
    name: str = ""
    moments: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one input, such as (H, W, C)."""
        return self.train_images.shape[1:]

    @property
    def train_size(self) -> int:
        """Number of training examples."""
        return len(self.train_labels)

    @property
    def example(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of one input as the model gets it, (1, ...)."""
        x = self.train_images
        kept = x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating)
        return jax.ShapeDtypeStruct((1, *self.image_shape), x.dtype if kept else jnp.float32)


def hold_out(data: Dataset, share: float) -> Dataset:
    """The data set with a share of its training examples in place of the test set.

    Always the same examples, drawn at random; a choice made by them leaves the test set unseen.

    Args:
      data: whole.
      share: in [0, 1); 0 leaves all as it is, and of any other at least one example is held out.
    """
    if not share:
        return data
    kept, held = held_out(data.train_size, share)
    tested = {"test_images": data.train_images[held], "test_labels": data.train_labels[held]}
    return _only(data, kept)._replace(**tested)


def held_out(n: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of n examples that are kept and held out, in the order in which files have them."""
    order = np.random.default_rng(0).permutation(n)
    held, kept = np.split(order, [max(1, round(share * n))])
    return np.sort(kept), np.sort(held)


def limited(data: Dataset, size: int) -> Dataset:
    """The data set with at most `size` of its training examples, always the same; 0 keeps all.

    Drawn at random, so that the classes stay about as frequent as they are. The test set stays.
    """
    if not 0 < size < data.train_size:
        return data
    return _only(data, drawn(data.train_size, size))


def _only(data: Dataset, kept: np.ndarray) -> Dataset:
    return data._replace(train_images=data.train_images[kept], train_labels=data.train_labels[kept])


def drawn(n: int, size: int) -> np.ndarray:
    """Indices of `size` of n examples, always the same, in the order in which files have them."""
    return np.sort(np.random.default_rng(0).permutation(n)[:size])


def channel_moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (C,) float32 of uint8 images, exact, from their histogram."""
    values = np.arange(256)
    counts = np.stack(
        [np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])]
    )
    mean = counts @ values / counts.sum(1)
    var = counts @ values**2 / counts.sum(1) - mean**2
    return mean.astype(np.float32), np.sqrt(np.maximum(var, 1e-8)).astype(np.float32)


def moments(data: Dataset) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean and deviation by the last axis, float32, by which inputs are normalised.

    Those of the training inputs unless the data set has others; None where inputs are whole
    numbers other than uint8, such as tokens.
    """
    if data.moments is not None:
        return data.moments
    x = data.train_images
    if x.dtype == np.uint8:
        return channel_moments(x)
    if not np.issubdtype(x.dtype, np.floating):
        return None
    axes = tuple(range(x.ndim - 1)) if x.ndim > 1 else (0,)
    mean, std = x.mean(axes, dtype=np.float64), x.std(axes, dtype=np.float64)
    # What never changes stays zero.
    return mean.astype(np.float32), np.where(std > 0, std, 1).astype(np.float32)


def normalise(x: Any, moments: tuple[np.ndarray, np.ndarray] | None) -> Any:
    """(x - mean) / deviation in float32, of NumPy or JAX arrays; x itself without moments."""
    if moments is None:
        return x
    mean, std = (m.reshape((1,) * (x.ndim - 1) + (-1,)) for m in moments)
    return (x.astype(np.float32) - mean) / std


def shrunk(data: Dataset, size: int) -> Dataset:
    """The data set with square images of side `size`, each pixel the mean of a square of them.

    Shifts of augmentation shrink alike.

    Raises:
      DataError: images that are not square, or whose side is no multiple of `size`.
    """
    side = data.image_shape[0]
    if len(data.image_shape) != 3 or data.image_shape[1] != side or side % size:
        shape = "x".join(map(str, data.image_shape))
        raise DataError(
            f"images of {shape} cannot be shrunk to squares of {size}: a divisor of "
            "their side is needed"
        )
    by = side // size
    if by == 1:
        return data

    def means(images: np.ndarray) -> np.ndarray:
        # NumPy takes ten times as long for a mean over two short axes.
        places = itertools.product(range(by), repeat=2)
        parts = (images[:, i::by, j::by].astype(np.float32) for i, j in places)
        pixels = functools.reduce(operator.iadd, parts) / np.float32(by**2)
        return (np.rint(pixels) if images.dtype == np.uint8 else pixels).astype(images.dtype)

    return data._replace(
        train_images=means(data.train_images),
        test_images=means(data.test_images),
        crop=data.crop // by,
    )
