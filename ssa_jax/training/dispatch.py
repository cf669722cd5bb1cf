"""Runs of training steps as one program each, fed on the device."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from ssa_jax.training.train import Step
from ssa_jax.types import Batch, TrainState

Array = jax.Array
Tree = Any
Metrics = dict[str, Array]

# (state, epoch) -> (state, metrics), one or several steps.
Dispatch = Callable[[TrainState, Any], tuple[TrainState, Metrics]]

# Steps in a program by backend. A CPU runs the backward pass of a convolution slower in a loop
# than as single programs, and starts a program in no time.
_LENGTHS = {"cpu": 1}
_LENGTH_ELSE = 10


def steps_of_backend() -> int:
    """Steps in a program where nothing else is asked for."""
    return _LENGTHS.get(jax.default_backend(), _LENGTH_ELSE)


def make_dispatch(
    step: Step,
    batch_at: Callable[[Tree, Array], Batch],
    length: int,
    on_compile: Callable[[], None] = lambda: None,
) -> Dispatch:
    """The jitted program of `length` steps in a row; its state is donated.

    Which batches they see is read off `TrainState.step`, so nothing comes from the host.

    Args:
      step: (state, batch) -> (state, metrics), such as `train.make_step` gives.
      batch_at: (epoch, step) -> the batch of a step of an epoch, from arrays on the device.
      length: number of steps; more than one are a `lax.scan`.
      on_compile: called whenever the program is traced, which is once a set of shapes.

    Returns:
      (state, epoch) -> (state, metrics), every metric of shape (length,), in order.

    Raises:
      ValueError: length below one.
    """
    if length < 1:
        raise ValueError(f"a dispatch needs at least one step, got {length}")

    def one(state: TrainState, epoch: Tree) -> tuple[TrainState, Metrics]:
        return step(state, batch_at(epoch, state.step))

    def dispatch(state: TrainState, epoch: Tree) -> tuple[TrainState, Metrics]:
        on_compile()
        if length == 1:
            state, metrics = one(state, epoch)
            return state, {name: value[None] for name, value in metrics.items()}
        return lax.scan(lambda s, _: one(s, epoch), state, length=length)

    return jax.jit(dispatch, donate_argnums=0)


def dispatches(
    first: int,
    last: int,
    length: int,
    periods: Sequence[int] = (),
    alone: Callable[[int], bool] = lambda step: False,
) -> Iterator[tuple[int, int]]:
    """Cuts the steps first, ..., last - 1 into runs of `length` steps and of one.

    No run has a multiple of a period behind its first step: what is due before such a step can
    be done between two runs. Runs of other lengths would each be a compilation. Where a run
    starts decides alone what follows, so that one that is interrupted goes on as it was.

    Args:
      first: number of the first step.
      last: one more than that of the last one.
      length: most steps of a run, at least one.
      periods: steps between what is due; 0 for never.
      alone: says which steps are runs of their own, to be looked at when they are done.

    Yields:
      (start, steps) of every run in turn.
    """
    step = first
    while step < last:
        due = min((step - step % p + p for p in periods if p), default=last)
        whole = step + length <= min(due, last) and not any(map(alone, range(step, step + length)))
        steps = length if whole else 1
        yield step, steps
        step += steps


class Steps(NamedTuple):
    """Training steps: what is due at which of them, and their programs by length."""

    periods: tuple[int, ...]
    length: int
    programs: dict[int, Dispatch]


def in_turn(
    first: Steps, then: Steps, start: int, border: int, last: int, alone: Callable[[int], bool]
) -> Iterator[tuple[Steps, int, int]]:
    """The `dispatches` of steps start, ..., last - 1: those below a border by the first programs.

    Yields:
      (steps, start, number) of every run in turn.
    """
    border = min(max(start, border), last)
    for steps, begin, end in ((first, start, border), (then, border, last)):
        for at, count in dispatches(begin, end, steps.length, steps.periods, alone):
            yield steps, at, count


def make_steps(
    step: Step, batch_at: Callable[[Tree, Array], Batch], most: int, periods: tuple[int, ...],
    on_compile: Callable[[], None],
) -> Steps:  # fmt: skip
    """The programs of one step and of `most`, or of the shortest period where that is less.

    No longer run would ever start; arguments as those of `make_dispatch` and `dispatches`.
    """
    length = min([most, *(p for p in periods if p)])
    programs = {n: make_dispatch(step, batch_at, n, on_compile) for n in {1, length}}
    return Steps(periods, length, programs)
