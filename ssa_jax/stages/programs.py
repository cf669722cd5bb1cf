"""The jitted functions of a run, whether its steps go over stages or not."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from ssa_jax.methods import Method
from ssa_jax.parallel.mesh import Layout
from ssa_jax.stages.state import StagedState
from ssa_jax.stages.step import Stages
from ssa_jax.training import metrics, train
from ssa_jax.training.dispatch import Steps
from ssa_jax.types import Batch, TrainState

Array = jax.Array


class Programs(NamedTuple):
    """What a run does to its state, and finds out about it.

    Attributes:
      steps, warmup: of the method, and of the one before it.
      refresh: of the feedback, of a whole state or of one as steps have it.
      evaluate, probe, truncation: of a whole state; see `training.train` and `metrics`.
      divided: a state as steps have it, and `whole` the way back; without stages both leave it.
    """

    steps: Steps
    warmup: Steps
    refresh: Callable[[Any], Any]
    evaluate: Callable[..., dict[str, Array]]
    probe: Callable[[TrainState, Batch], metrics.Probe]
    truncation: Callable[[TrainState, Batch], dict[str, Array]]
    divided: Callable[[Any], Any]
    whole: Callable[[Any], TrainState]


def over_stages(
    built: Any, bounds: Sequence[int], micro_batches: int, layout: Layout, example: Batch
) -> Stages:
    """The steps of a `runs.build.Built` over stages; see `Stages`."""
    return Stages(
        built.units, built.method, built.optimizer, built.weights, layout, bounds, micro_batches,
        example, built.memory,
    )  # fmt: skip


def step_of_all(built: Any, method: Method, layout: Layout) -> Any:
    """The step of a `runs.build.Built` without stages; its state is donated."""
    step = train.make_step(built.units, method, built.optimizer, built.weights, memory=built.memory)
    return layout.returning(layout.stepped, step, donate=(0,))


def make_programs(
    built: Any, layout: Layout, stages: Stages | None, steps: Callable[[Any, Method], Steps]
) -> Programs:
    """The programs of a `runs.build.Built`.

    Args:
      built: the run.
      layout: where its state lies.
      stages: over which its steps go, if they do.
      steps: (step, method) -> the programs of one step and of several.
    """
    keep, whole, returning = layout.keep, layout.whole, layout.returning

    def step_of(method: Method) -> Any:
        if stages is not None:
            return stages.step
        return step_of_all(built, method, layout)

    of_whole = returning(keep, train.make_refresh(built.method))

    def refresh(state: Any) -> Any:
        if stages is not None and isinstance(state, StagedState):
            return stages.refresh(state)
        return of_whole(state)

    return Programs(
        steps=steps(step_of(built.method), built.method),
        warmup=steps(step_of(built.warmup), built.warmup),
        refresh=of_whole if stages is None else refresh,
        evaluate=returning(whole, train.make_eval(built.units, built.task)),
        probe=returning(whole, metrics.make_probe(built.units, built.method, built.weights)),
        truncation=returning(
            whole, train.make_truncation_losses(built.units, built.memory, built.task)
        ),
        divided=_same if stages is None else lambda state: _divided(stages, state),
        whole=_same if stages is None else stages.whole,
    )


def _same(state: Any) -> Any:
    return state


def _divided(stages: Stages, state: TrainState | StagedState) -> StagedState:
    return state if isinstance(state, StagedState) else stages.divide(state)
