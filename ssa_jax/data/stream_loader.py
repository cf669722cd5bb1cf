"""Streamed batches on the device, read ahead of their use and normalised there."""

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssa_jax.data.decoding import (
    Decoded,
    HostBatch,
    Reading,
    central_crop,
    read,
    test_dataset,
    train_dataset,
)
from ssa_jax.data.loader import Feed
from ssa_jax.data.streams import Stream
from ssa_jax.parallel.mesh import ONE_DEVICE, Layout
from ssa_jax.types import Batch

Array = jax.Array
# Of the colours of ImageNet's training images, for pixels in [0, 255].
MEAN = np.array([123.675, 116.28, 103.53], np.float32)
STD = np.array([58.395, 57.12, 57.375], np.float32)
# Batches that wait on the device, and threads of a process, each at work on one batch.
_AHEAD = 2


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
        crop = functools.partial(central_crop, stream.image_size)
        decoded = Decoded(stream, stream.train, crop, reading.on_corrupt, replace=True)
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
