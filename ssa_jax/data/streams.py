"""Image data sets too large for memory: read, decoded and augmented while training runs.

Grain does the reading, in threads of this process or in worker processes. A batch depends on
the run's key, the epoch and its number in the epoch alone, so any place in training can be gone
on from without a state of the reader, with any number of workers.
"""

import contextlib
import functools
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import grain
import jax
import jax.numpy as jnp
import numpy as np

from ssa_jax.data import Feed, drawn, held_out, images, open_tfds
from ssa_jax.errors import DataError
from ssa_jax.parallel.mesh import ONE_DEVICE, Layout
from ssa_jax.types import Batch

Array = jax.Array
# uint8 images (batch, H, W, 3), int32 labels and int32 "skipped", (batch,) each.
HostBatch = dict[str, np.ndarray]

ON_CORRUPT = ("stop", "skip")

# Of the colours of ImageNet's training images, for pixels in [0, 255].
MEAN = np.array([123.675, 116.28, 103.53], np.float32)
STD = np.array([58.395, 57.12, 57.375], np.float32)

# Batches that wait on the device, and threads of a process, each at work on one batch.
_AHEAD = 2
_THREADS = 4
# A data set with more corrupt records in a row is not what it says.
_MOST_SKIPPED = 100


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


class Reading(NamedTuple):
    """How records are read.

    Attributes:
      crop_area: least share of an image that a random crop shows.
      on_corrupt: ``"stop"`` raises at a record that cannot be used; ``"skip"`` takes the next
        one that can in its place, and leaves it out of the measurement.
      workers: processes that decode; 0 for threads of this one.
      shard, shards: which part of every batch this process reads, of how many.
    """

    crop_area: float = 0.08
    on_corrupt: str = "stop"
    workers: int = 0
    shard: int = 0
    shards: int = 1


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


class _Decoded:
    """Records as arrays, by index.

    Args:
      stream: names, classes and size.
      source: its records for training or for measuring.
      crop: (file, index) -> uint8 (H, W, 3).
      on_corrupt: see `Reading`.
      replace: takes the next record in place of one to be skipped; else its label is -1.
    """

    def __init__(
        self,
        stream: Stream,
        source: Source,
        crop: Callable[[bytes, int], np.ndarray],
        on_corrupt: str,
        replace: bool,
    ):
        self.stream, self.source, self.crop = stream, source, crop
        self.on_corrupt, self.replace = on_corrupt, replace

    def batch(self, indices: Array | np.ndarray) -> HostBatch:
        """The records at some indices: the function that worker processes run.

        Raises:
          DataError: one is corrupt and not to be skipped, or too many are.
        """
        images, labels, skipped = zip(*(self._record(int(i)) for i in indices), strict=True)
        return {
            "image": np.stack(images),
            "label": np.array(labels, np.int32),
            "skipped": np.array(skipped, np.int32),
        }

    def _record(self, index: int) -> tuple[np.ndarray, int, bool]:
        for offset in range(min(_MOST_SKIPPED, len(self.source)) if self.replace else 1):
            try:
                image, label = self._read((index + offset) % len(self.source), index)
            except DataError:
                if self.on_corrupt == "stop":
                    raise
            else:
                return image, label, offset > 0
        if self.replace:
            raise DataError(f"{self.stream.name}: all of {offset + 1} records in a row are corrupt")
        return np.zeros(self.stream.image_shape, np.uint8), -1, True

    def _read(self, index: int, place: int) -> tuple[np.ndarray, int]:
        name, classes = self.stream.name, self.stream.classes
        try:
            example = self.source[index]
            label = int(example["label"])
            if not 0 <= label < classes:
                raise ValueError(f"label {label} outside [0, {classes})")
            return self.crop(example["image"], place), label
        except Exception as e:
            raise DataError(
                f"{name}: record {index} is corrupt: {e}; --on_corrupt=skip goes on without it"
            ) from e


def _random_crop(
    size: int, least: float, seed: tuple[int, ...], data: bytes, index: int
) -> np.ndarray:
    """A crop whose randomness is that of a run, an epoch and an index."""
    # The first of these seeds is that of the order.
    return images.random_crop(data, size, least, np.random.default_rng((*seed, index + 1)))


def _central_crop(size: int, data: bytes, index: int) -> np.ndarray:
    del index
    return images.central_crop(data, size)


def train_dataset(
    stream: Stream, reading: Reading, seed: Sequence[int], epoch: int, batch_size: int
) -> grain.MapDataset:
    """The batches of an epoch, by their number in it.

    All records in an order that the seed and the epoch give are cut into batches, and each shard
    has every `shards`-th record of a batch: together they are the batch, whatever their number.

    Args:
      stream: what is read.
      reading: how, and which shard.
      seed: non-negative integers.
      epoch: its number.
      batch_size: of all shards together.

    Returns:
      ``"image"`` uint8 (batch / shards, H, W, 3), ``"label"`` and ``"skipped"`` int32.

    Raises:
      ValueError: a batch that the shards cannot share equally.
    """
    if batch_size % reading.shards:
        raise ValueError(
            f"a batch of {batch_size} cannot be shared equally by {reading.shards} processes"
        )
    words = (*seed, epoch)
    order = np.random.default_rng((*words, 0)).permutation(stream.train_size)
    whole = stream.train_size // batch_size * batch_size
    mine = order[:whole].reshape(-1, batch_size)[:, reading.shard :: reading.shards]
    crop = functools.partial(_random_crop, stream.image_size, reading.crop_area, words)
    decoded = _Decoded(stream, stream.train, crop, reading.on_corrupt, replace=True)
    return grain.MapDataset.source(mine).map(decoded.batch)


def test_dataset(stream: Stream, reading: Reading, batch_size: int) -> grain.MapDataset:
    """The test examples of a shard in batches; what cannot be decoded and is skipped has label -1.

    Args:
      stream: what is read.
      reading: how, and which shard: it has every `shards`-th example.
      batch_size: of all shards together, a multiple of them.
    """
    crop = functools.partial(_central_crop, stream.image_size)
    decoded = _Decoded(stream, stream.test, crop, reading.on_corrupt, replace=False)
    mine = np.arange(reading.shard, len(stream.test), reading.shards)
    size = batch_size // reading.shards
    batches = [mine[i : i + size] for i in range(0, len(mine), size)]
    return grain.MapDataset.source(batches).map(decoded.batch)


def _end_with_parent(index: int, count: int) -> None:
    """Ends this worker when the process that started it is gone, however that ended.

    A worker alone would wait for ever to hand its batches on. With the last worker the tracker of
    shared memory ends too, and takes what they had of it away.
    """
    del index, count
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def read(dataset: grain.MapDataset, workers: int) -> Generator[HostBatch]:
    """The batches in their order, made ahead of their use; close it to end the workers."""
    ahead = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_THREADS)
    batches = dataset.to_iter_dataset(ahead)
    if workers:
        processes = grain.MultiprocessingOptions(num_workers=workers)
        batches = batches.mp_prefetch(processes, worker_init_fn=_end_with_parent)
    iterator = iter(batches)
    try:
        yield from iterator
    finally:
        iterator.close()


class StreamLoader(NamedTuple):
    """The functions of `data.Loader` that training uses, for a stream."""

    train_size: int
    test_size: int
    steps_at_once: int
    feeds: Callable[[Array, int, int, int], Generator[Feed]]
    batch_at: Callable[[Batch, Array], Batch]
    fixed_batch: Callable[[Array | np.ndarray], Batch]
    test_batches: Callable[[], Iterator[Batch]]


def make_loader(
    stream: Stream, reading: Reading, eval_batch_size: int, layout: Layout = ONE_DEVICE
) -> StreamLoader:
    """Readers of a stream, whose batches are normalised on the device.

    Args:
      stream: what is read.
      reading: how; each process is a shard.
      eval_batch_size: test examples at a time, rounded up to a multiple of the devices.
      layout: over whose devices the rows of a batch are spread; a process has the rows it read.
    """
    size = min(eval_batch_size, len(stream.test))
    size += -size % layout.devices
    mean, std = (x.reshape(1, 1, 1, -1) for x in (MEAN, STD))

    @jax.jit
    def normalised(batch: Batch) -> Batch:
        images = (batch.images.astype(jnp.float32) - mean) / std
        return layout.rows(batch._replace(images=images))

    @jax.jit
    def total(skipped: Array) -> Array:
        return layout.whole(jnp.sum(skipped, keepdims=True))

    def feeds(key: Array, number: int, batch_size: int, done: int) -> Generator[Feed]:
        seed = jax.device_get(jax.random.key_data(key)).tolist()
        batches = train_dataset(stream, reading, seed, number, batch_size)[done:]
        waiting: deque[Feed] = deque()
        # Transfers run while the device computes.
        for batch in read(batches, reading.workers):
            placed = layout.place_rows(batch)
            waiting.append(Feed(_batch(placed), {"skipped": total(placed["skipped"])}))
            if len(waiting) > _AHEAD:
                yield waiting.popleft()
        yield from waiting

    def fixed_batch(indices: Array | np.ndarray) -> Batch:
        crop = functools.partial(_central_crop, stream.image_size)
        decoded = _Decoded(stream, stream.train, crop, reading.on_corrupt, replace=True)
        return normalised(_batch(layout.place(decoded.batch(indices), whole=True)))

    def test_batches() -> Iterator[Batch]:
        batches = read(test_dataset(stream, reading, size), reading.workers)
        # Of the last batch a shard may have nothing.
        nothing: HostBatch = {"image": np.zeros((0, *stream.image_shape), np.uint8),
                              "label": np.zeros(0, np.int32)}  # fmt: skip
        with contextlib.closing(batches):
            for _ in range(0, len(stream.test), size):
                padded = _padded(next(batches, nothing), size // reading.shards)
                yield normalised(_batch(layout.place_rows(padded)))

    return StreamLoader(
        train_size=stream.train_size,
        test_size=len(stream.test),
        steps_at_once=1,
        feeds=feeds,
        batch_at=lambda batch, step: normalised(batch),
        fixed_batch=fixed_batch,
        test_batches=test_batches,
    )


def _padded(batch: HostBatch, size: int) -> HostBatch:
    """Images and labels of a test batch, with black images of label -1 behind them."""
    missing = size - len(batch["label"])
    return {
        "image": np.pad(batch["image"], ((0, missing), (0, 0), (0, 0), (0, 0))),
        "label": np.pad(batch["label"], (0, missing), constant_values=-1),
    }


def _batch(arrays: dict[str, Array]) -> Batch:
    return Batch(arrays["image"], arrays["label"])
