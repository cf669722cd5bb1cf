"""A data set on the device: the order of its epochs, and its batches made inside jit."""

import functools
import itertools
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssa_jax.data.datasets import Dataset, moments, normalise
from ssa_jax.parallel.mesh import ONE_DEVICE, Layout
from ssa_jax.types import Batch

Array = jax.Array


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
    statistics = moments(data)
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
        images = normalise(source.images[indices], statistics)
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
        whole = Feed(epoch(key, number, size), {})
        # Good for any number of programs.
        return (whole for _ in itertools.count())

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
