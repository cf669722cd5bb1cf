"""Image data sets as uint8 arrays on the device; batches made inside jit."""

import functools
import importlib.util
import itertools
import os
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ssa_jax.errors import DataError
from ssa_jax.parallel.mesh import ONE_DEVICE, Layout
from ssa_jax.types import Batch

Array = jax.Array


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
    return data._replace(
        train_images=data.train_images[kept],
        train_labels=data.train_labels[kept],
        test_images=data.train_images[held],
        test_labels=data.train_labels[held],
    )


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
    kept = drawn(data.train_size, size)
    return data._replace(train_images=data.train_images[kept], train_labels=data.train_labels[kept])


def drawn(n: int, size: int) -> np.ndarray:
    """Indices of `size` of n examples, always the same, in the order in which files have them."""
    return np.sort(np.random.default_rng(0).permutation(n)[:size])


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


def _tfds(name: str, crop: int, flip: bool) -> Callable[[str | None], Dataset]:
    return lambda data_dir: _load_tfds(name, crop, flip, data_dir)


def _load_tfds(name: str, crop: int, flip: bool, data_dir: str | None) -> Dataset:
    builder = open_tfds(name, data_dir)
    train, test = (_read_split(builder, name, split) for split in ("train", "test"))
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


DATASETS: dict[str, Callable[[str | None], Dataset]] = {
    "cifar10": _tfds("cifar10", 4, True),
    "cifar100": _tfds("cifar100", 4, True),
    "fashion_mnist": _tfds("fashion_mnist", 2, True),
    "mnist": _tfds("mnist", 2, False),
    "digits": _digits,
}


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


def normalise(x: Any, found: tuple[np.ndarray, np.ndarray] | None) -> Any:
    """(x - mean) / deviation in float32, of NumPy or JAX arrays; x itself without moments."""
    if found is None:
        return x
    mean, std = (m.reshape((1,) * (x.ndim - 1) + (-1,)) for m in found)
    return (x.astype(np.float32) - mean) / std


def epoch_order(key: Array, epoch: int, n: int) -> Array:
    """The order (n,) of an epoch's examples; depends on the run's key and the epoch alone."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), n)


def shift_and_flip(key: Array, images: Array, crop: int, flip: bool) -> Array:
    """Random shifts by up to `crop` pixels, zeros moving in, and random mirror images.

    One gather for the whole batch: on the CPU twice as fast as a vmapped dynamic slice.

    Args:
      key: PRNG key.
      images: (batch, H, W, C) float32, zero being the mean.
      crop: largest shift in pixels.
      flip: mirrors half of the images.
    """
    n, height, width, _ = images.shape
    key_shift, key_flip = jax.random.split(key)
    shift = jax.random.randint(key_shift, (n, 2), -crop, crop + 1)
    # Index 0 and size + 1 of the padded image are the zeros.
    rows = jnp.clip(jnp.arange(height)[None, :] + shift[:, :1], -1, height) + 1
    cols = jnp.clip(jnp.arange(width)[None, :] + shift[:, 1:], -1, width) + 1
    if flip:
        mirror = jax.random.bernoulli(key_flip, 0.5, (n, 1))
        cols = jnp.where(mirror, cols[:, ::-1], cols)
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jax.vmap(lambda image, r, c: image[r[:, None], c[None, :]])(padded, rows, cols)


class Epoch(NamedTuple):
    """All that the batches of an epoch are made of, on the device.

    Attributes:
      source: the training examples as they are stored.
      rows: int32 (steps, batch size), the examples of every step.
      key: of the augmentation.
    """

    source: Batch
    rows: Array
    key: Array


class Feed(NamedTuple):
    """What a program of training steps is fed with.

    Attributes:
      source: on the device; the loader's `batch_at` makes batches of it.
      counts: what is to be counted of each step beside its metrics, arrays (steps,) by name.
    """

    source: Any
    counts: dict[str, Any]


def repeated(epoch: Epoch) -> Generator[Feed]:
    """The feeds of an epoch that lies on the device: all of it, for any number of programs."""
    whole = Feed(epoch, {})
    return (whole for _ in itertools.count())


class Loader(NamedTuple):
    """A data set on the device, as jitted functions.

    Attributes:
      train_size, test_size: numbers of examples.
      steps_at_once: most steps that a feed is good for; 0 for any number.
      feeds: (key, number, batch size, steps done) -> a generator of the `Feed` of each program
        in the rest of an epoch.
      epoch: (key, number, batch size) -> the `Epoch` of that number in a run of that key.
      batch_at: (epoch, step) -> the augmented training `Batch` of a step, an int32 scalar on the
        device that counts from the start of the run.
      train_batch: (key, indices) -> augmented training `Batch`.
      fixed_batch: (indices) -> the same examples without augmentation.
      test_batches: normalised test batches; the last is padded with labels of -1.
    """

    train_size: int
    test_size: int
    steps_at_once: int
    feeds: Callable[[Array, int, int, int], Generator[Feed]]
    epoch: Callable[[Array, int, int], Epoch]
    batch_at: Callable[[Epoch, Array], Batch]
    train_batch: Callable[[Array, Array | np.ndarray], Batch]
    fixed_batch: Callable[[Array | np.ndarray], Batch]
    test_batches: Callable[[], Any]


def _placed(layout: Layout, images: np.ndarray, labels: np.ndarray) -> Batch:
    """Examples as they are stored, whole on every device."""
    kind = np.float32 if np.issubdtype(labels.dtype, np.floating) else np.int32
    return Batch(*layout.place((images, labels.astype(kind)), whole=True))


def _extended(x: np.ndarray, rows: int, value: int = 0) -> np.ndarray:
    """X with more rows of one value behind it."""
    return np.pad(x, ((0, rows), *((0, 0),) * (x.ndim - 1)), constant_values=value)


def make_loader(data: Dataset, eval_batch_size: int = 500, layout: Layout = ONE_DEVICE) -> Loader:
    """Puts a data set on the device as uint8 and closes the batch functions over it.

    Args:
      data: the data set; every device of the layout has it whole.
      eval_batch_size: test examples at a time, rounded up to a multiple of the devices.
      layout: over whose devices the rows of a batch are spread.
    """
    # Left on the host: a program takes them for constants, and would fetch them from the device.
    found = moments(data)
    train = _placed(layout, data.train_images, data.train_labels)
    size = min(eval_batch_size, len(data.test_labels))
    size += -size % layout.devices
    missing = -len(data.test_labels) % size
    test = _placed(
        layout, _extended(data.test_images, missing), _extended(data.test_labels, missing, -1)
    )
    weight = layout.place(
        (np.arange(len(test.labels)) < len(data.test_labels)).astype(np.float32), whole=True
    )

    # The arrays are arguments, since a closed-over array would be compiled in as a constant.
    @jax.jit
    def pick(source: Batch, indices: Array) -> Batch:
        indices = layout.rows(indices)
        images = normalise(source.images[indices], found)
        weight = None if source.weight is None else source.weight[indices]
        return layout.rows(Batch(images, source.labels[indices], weight))

    @jax.jit
    def augmented(source: Batch, key: Array, indices: Array) -> Batch:
        batch = pick(source, indices)
        if not (data.crop or data.flip):
            return batch
        images = shift_and_flip(key, batch.images, data.crop, data.flip)
        return layout.rows(batch._replace(images=images))

    def epoch(key: Array, number: int, size: int) -> Epoch:
        order_key, crop_key = jax.random.split(key)
        order = epoch_order(order_key, number, len(train.labels))
        steps = len(order) // size
        return Epoch(train, order[: steps * size].reshape(steps, size), crop_key)

    def feeds(key: Array, number: int, size: int, done: int) -> Generator[Feed]:
        del done
        return repeated(epoch(key, number, size))

    @jax.jit
    def batch_at(epoch: Epoch, step: Array) -> Batch:
        indices = epoch.rows[step % len(epoch.rows)]
        return augmented(epoch.source, jax.random.fold_in(epoch.key, step), indices)

    def test_batches() -> Any:
        for start in range(0, len(test.labels), size):
            yield pick(test._replace(weight=weight), np.arange(start, start + size))

    return Loader(
        train_size=data.train_size,
        test_size=len(data.test_labels),
        steps_at_once=0,
        feeds=feeds,
        epoch=epoch,
        batch_at=batch_at,
        train_batch=functools.partial(augmented, train),
        fixed_batch=functools.partial(pick, train),
        test_batches=test_batches,
    )
