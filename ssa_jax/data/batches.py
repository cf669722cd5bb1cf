"""Data that come as batches: any iterable of them, such as a Grain data set or a loader."""

import dataclasses
import itertools
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from ssa_jax.data.arrays import check_shares
from ssa_jax.data.loader import Feed
from ssa_jax.errors import DataError
from ssa_jax.parallel.mesh import ONE_DEVICE, Layout
from ssa_jax.types import Batch

Array = jax.Array
HostBatch = tuple[np.ndarray, np.ndarray]

# Steps of a pass over what has no length, unless they are given.
_NO_LENGTH = (
    "an iterable without a length needs steps_per_epoch, the number of batches that count as one "
    "pass"
)


@dataclasses.dataclass(frozen=True)
class Batches:
    """A stream of batches (inputs, targets), in the order and the size in which they come.

    Inputs are taken as they are, floats as float32. A pass begins with a new iterator where the
    object can be iterated again; what can be iterated once, such as a generator, goes on where it
    is, and a run that is resumed begins with whatever it gives then.

    Attributes:
      source: the iterable.
      steps: batches in a pass.
      first: the first batch, which also tells shapes.
      test: inputs and targets to test on.
      classes: number of classes, or of outputs.
      labelled: whether targets are labels below that number.
      name: of the data.
      once: whether the source can be iterated once only.
    """

    source: Iterable[Any]
    steps: int
    first: HostBatch
    test: HostBatch
    classes: int
    labelled: bool
    name: str
    once: bool
    _rest: Iterator[Any]

    @property
    def batch_size(self) -> int:
        """Examples in a batch."""
        return len(self.first[0])

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return self.first[0].shape[1:]

    @property
    def train_size(self) -> int:
        """Number of examples in a pass."""
        return self.steps * self.batch_size

    @property
    def example(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of one input, (1, ...)."""
        return jax.ShapeDtypeStruct((1, *self.image_shape), self.first[0].dtype)

    def batches(self, done: int) -> Iterator[HostBatch]:
        """The rest of a pass of which `done` batches are done.

        Raises:
          DataError: it has ended too early, or a batch has another shape.
        """
        if self.once:
            # The first batch was taken to see its shape.
            source, done = self._rest, 0
        else:
            source = iter(self.source)
        taken = itertools.islice(source, done, None)
        for i in range(self.steps - done):
            batch = next(taken, None)
            if batch is None:
                raise DataError(f"the batches ended after {i} of the {self.steps} of a pass")
            x, y = _pair(batch)
            if len(x) != self.batch_size:
                raise DataError(f"batch {i} has {len(x)} examples, the first {self.batch_size}")
            self.check(f"batch {i}", x, y)
            yield x, y

    def check(self, which: str, x: np.ndarray, y: np.ndarray) -> None:
        """Raises DataError unless inputs and targets are of the first batch's kind."""
        shapes, wanted = (x.shape[1:], y.shape[1:]), [a.shape[1:] for a in self.first]
        if len(x) != len(y) or list(shapes) != wanted:
            raise DataError(
                f"{which} has inputs {x.shape} and targets {y.shape}, the first batch "
                f"{self.first[0].shape} and {self.first[1].shape}"
            )
        if self.labelled and len(wrong := y[(y < 0) | (y >= self.classes)]):
            raise DataError(f"{which} has a label {wrong[0]}, outside [0, {self.classes})")


def from_batches(
    source: Iterable[Any], test: Any, *, name: str = "batches", classes: bool = True,
    outputs: int | None = None, steps_per_epoch: int | None = None,
) -> Batches:  # fmt: skip
    """A stream of batches; see `Batches`.

    Args:
      source: gives pairs (inputs, targets), or mappings with ``image`` and ``label``, of equal
        shapes.
      test: inputs and targets, or a finite iterable of batches, which is read whole.
      name: of the data.
      classes: whether targets (n,) are labels.
      outputs: number of classes, or of what a model gives for one example; None: one more than
        the largest label of the first batch and the test examples, or the targets' size.
      steps_per_epoch: batches in a pass; None: the length of `source`.

    Raises:
      DataError: no length, no batch, no test examples, batches that are no pairs of arrays, or
        targets (n, classes) of cross-entropy that are no distributions.
    """
    once = iter(source) is source
    if steps_per_epoch is None and not hasattr(source, "__len__"):
        raise DataError(_NO_LENGTH)
    steps = steps_per_epoch or len(source)  # type: ignore[arg-type]
    iterator = iter(source)
    try:
        first = next(iterator)
    except StopIteration:
        raise DataError("the iterable of batches is empty") from None
    if test is None:
        raise DataError("batches need examples to test on: test=(inputs, targets)")
    pair, tested = _pair(first), _read(test)
    if classes:
        check_shares("the first batch's", pair[1])
        check_shares("test", tested[1])
    if classes and pair[1].ndim == 1:
        labels = np.concatenate([pair[1], tested[1]])
        outputs = int(labels.max()) + 1 if outputs is None else outputs
    elif outputs is None:
        outputs = int(np.prod(pair[1].shape[1:]))
    labelled = classes and pair[1].ndim == 1
    stream = Batches(
        source, steps, pair, tested, outputs, labelled, name, once,
        itertools.chain([first], iterator),
    )  # fmt: skip
    stream.check("test", *tested)
    return stream


def _pair(batch: Any) -> HostBatch:
    if isinstance(batch, dict):
        batch = (batch["image"], batch["label"])
    try:
        x, y = (np.asarray(a) for a in batch)
    except (TypeError, ValueError) as e:
        raise DataError(f"a batch must be a pair of arrays (inputs, targets): {e}") from e
    floats = np.issubdtype(x.dtype, np.inexact) or x.dtype == np.uint8
    kinds = np.float32 if floats else np.int32, _kind(y)
    return x.astype(kinds[0]), y.astype(kinds[1])


def _kind(y: np.ndarray) -> type:
    return np.float32 if np.issubdtype(y.dtype, np.inexact) else np.int32


def _read(test: Any) -> HostBatch:
    if isinstance(test, tuple) and len(test) == 2 and hasattr(test[0], "shape"):
        return _pair(test)
    pairs = [_pair(batch) for batch in test]
    if not pairs:
        raise DataError("test is empty")
    x, y = (np.concatenate(part) for part in zip(*pairs, strict=True))
    return x, y


@dataclasses.dataclass(frozen=True)
class BatchLoader:
    """The functions of `data.Loader` that training uses, for `Batches`."""

    data: Batches
    layout: Layout = ONE_DEVICE
    steps_at_once: int = 1

    @property
    def train_size(self) -> int:
        """Number of examples in a pass."""
        return self.data.train_size

    @property
    def test_size(self) -> int:
        """Number of test examples."""
        return len(self.data.test[0])

    def feeds(self, key: Array, number: int, size: int, done: int) -> Generator[Feed]:
        """The feeds of the rest of a pass, a batch each."""
        del key, number, size
        for x, y in self.data.batches(done):
            yield Feed(Batch(*self.layout.place_rows((x, y))), {})

    def batch_at(self, batch: Batch, step: Array) -> Batch:
        """The batch of a step, as it comes."""
        del step
        return batch

    def fixed_batch(self, indices: Any) -> Batch:
        """Examples of the first batch."""
        rows = np.asarray(indices) % self.data.batch_size
        x, y = (a[rows] for a in self.data.first)
        return Batch(*self.layout.place((x, y), whole=True))

    def test_batches(self) -> Iterator[Batch]:
        """Test examples, the last batch filled with examples of weight zero."""
        x, y = self.data.test
        size = min(self.data.batch_size, len(x))
        for begin in range(0, len(x), size):
            rows = np.arange(begin, begin + size)
            weight = (rows < len(x)).astype(np.float32)
            rows = np.minimum(rows, len(x) - 1)
            yield Batch(*self.layout.place((x[rows], y[rows], weight), whole=True))
