"""Batches of a stream, decoded and augmented while training runs.

Grain does the reading, in threads of this process or in worker processes. A batch depends on
the run's key, the epoch and its number in the epoch alone, so any place in training can be gone
on from without a state of the reader, with any number of workers.
"""

import functools
import multiprocessing
import os
import threading
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import grain
import jax
import numpy as np

from ssa_jax.data import images
from ssa_jax.data.streams import Source, Stream
from ssa_jax.errors import DataError

Array = jax.Array
# uint8 images (batch, H, W, 3), int32 labels and int32 "skipped", (batch,) each.
HostBatch = dict[str, np.ndarray]
ON_CORRUPT = ("stop", "skip")
_THREADS = 4
# A data set with more corrupt records in a row is not what it says.
_MOST_SKIPPED = 100


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


class Decoded:
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


def central_crop(size: int, data: bytes, index: int) -> np.ndarray:
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
    decoded = Decoded(stream, stream.train, crop, reading.on_corrupt, replace=True)
    return grain.MapDataset.source(mine).map(decoded.batch)


def test_dataset(stream: Stream, reading: Reading, batch_size: int) -> grain.MapDataset:
    """The test examples of a shard in batches; what cannot be decoded and is skipped has label -1.

    Args:
      stream: what is read.
      reading: how, and which shard: it has every `shards`-th example.
      batch_size: of all shards together, a multiple of them.
    """
    crop = functools.partial(central_crop, stream.image_size)
    decoded = Decoded(stream, stream.test, crop, reading.on_corrupt, replace=False)
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
