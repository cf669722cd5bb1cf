"""A network in training: its programs and its state, an epoch at a time. Knows no files."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ssa_jax import factors
from ssa_jax.data import Feed
from ssa_jax.errors import DataError, NotFiniteError
from ssa_jax.methods import Method
from ssa_jax.parallel.compiling import Ahead, Compiling
from ssa_jax.parallel.mesh import ONE_DEVICE, Layout
from ssa_jax.reporting.progress import bar
from ssa_jax.runs import build, inputs
from ssa_jax.runs.config import Config
from ssa_jax.runs.given import NOTHING, Given
from ssa_jax.runs.inputs import Data
from ssa_jax.stages.programs import make_programs, over_stages
from ssa_jax.stages.state import StagedState
from ssa_jax.training import metrics, ranks, train
from ssa_jax.training.dispatch import Steps, in_turn, make_steps, steps_of_backend
from ssa_jax.training.running_means import RunningMeans
from ssa_jax.types import Batch, TrainState

Array = jax.Array
Row = dict[str, Any]

# Examples of the fixed batch on which angles and loss terms are measured.
PROBE_SIZE = 512


class Trainer:
    """The state of a run on the device, and what is done to it between two checkpoints.

    Args:
      config: the run.
      data: its data set.
      built: from `build.build`, whose state is taken over.
      compiling: counts compilations of the step.
      layout: where the state lies and batches are spread.
      given: the objects that the run was given in place of names.
    """

    def __init__(
        self,
        config: Config,
        data: Data,
        built: build.Built,
        compiling: Compiling,
        layout: Layout = ONE_DEVICE,
        given: Given = NOTHING,
    ):
        self.given, self.ahead = given, Ahead()
        self.config, self.data, self.compiling, self.layout = config, data, compiling, layout
        self.loader = inputs.make_loader(config, data, layout)
        self._state: TrainState | StagedState = layout.place(built.state)
        self.use(built)

    @property
    def state(self) -> TrainState:
        """The whole state, put together on every device where steps have it in parts."""
        if isinstance(self._state, StagedState):
            self._state = self.programs.whole(self._state)
        return self._state

    @state.setter
    def state(self, state: TrainState) -> None:
        self._state = state

    def use(self, built: build.Built) -> None:
        """Takes over the programs of another build of the same run; the state stays."""
        self.built, self.stages = built, None
        if built.bounds:
            example = build.example_batch(self.config, self.data, jax.device_count())
            parts = self.config.micro_batches
            self.stages = over_stages(built, built.bounds, parts, self.layout, example)
        self.programs = make_programs(built, self.layout, self.stages, self._steps)

    def _steps(self, step: train.Step, method: Method) -> Steps:
        config = self.config
        asked = config.steps_per_dispatch or steps_of_backend()
        most = min(asked, self.loader.steps_at_once or asked)
        periods = (method.refresh_every, config.save_every)
        return make_steps(step, self.loader.batch_at, most, periods, self.compiling)

    @property
    def step(self) -> int:
        """Steps done."""
        return int(jax.device_get(self._state.step))

    def train_epoch(self, epoch: int, means: RunningMeans, between: Callable[[int], None]) -> Row:
        """The rest of an epoch, in the order that seed and epoch give; all metrics are averaged.

        Args:
          epoch: whole epochs done.
          means: of the steps done in this one; counts on.
          between: called before every dispatch with the number of its first step, so before
            every step at which a save or a refresh is due.

        Raises:
          NotFiniteError: the loss is not finite.
        """
        size, per_epoch = self.config.batch_size, self.built.steps_per_epoch
        feeds = self.loader.feeds(self._state.key, epoch, size, means.steps)
        first, begun = epoch * per_epoch, means.steps
        last = first + per_epoch
        if self.config.max_steps:
            last = min(last, self.config.max_steps)
        with (
            contextlib.closing(feeds),
            bar(epoch + 1, self.config.epochs, (last - first) * size, means.steps * size) as shown,
        ):
            for steps, step, count in in_turn(
                self.programs.warmup, self.programs.steps,
                first + means.steps, self.built.takes_over, last, self.built.cuts_at,
            ):  # fmt: skip
                between(step)
                # Whatever comes from the host or goes there in here is asked for explicitly; an
                # operation outside of a program takes its constants from there.
                guard = "allow" if jax.config.values["jax_disable_jit"] else "disallow"
                with jax.transfer_guard(guard):
                    self._dispatch(steps, next(feeds), step, count, means)
                if step == first + begun:
                    self._compile_ahead()
                _check_finite(means.finite)
                shown.update(count * size)
                if means.loss is not None:
                    shown.set_postfix(loss=f"{means.loss:.3f}", refresh=False)
        means.flush()
        _check_finite(means.finite)
        return {"images": means.steps * size, "learning_rate": self._rate(first + means.steps - 1)}

    def _rate(self, step: int) -> float | None:
        """The learning rate at a step; None of an optimiser that has its own."""
        schedule = self.built.learning_rate
        return None if schedule is None else float(schedule(step))

    def _dispatch(
        self, steps: Steps, feed: Feed, step: int, count: int, means: RunningMeans
    ) -> None:
        """The steps from `step` on, after the refresh where one is due."""
        every, _ = steps.periods
        # Paths of the method that takes over may be old.
        if takes_over := 0 < self.built.takes_over == step:
            self._resize()
        due = (every and step % every == 0) or takes_over
        state = self.programs.divided(self._state)
        state = self.programs.refresh(state) if due else state
        self._state, measured = steps.programs[count](state, feed.source)
        means.add(measured | feed.counts, count)
        if self.built.cuts_at(step):
            losses = self.programs.truncation(self.state, self._probe_batch())
            means.add({name: loss[..., None] for name, loss in losses.items()}, 0)

    def _compile_ahead(self) -> None:
        """What the end of the epoch needs is compiled while the device is at its steps.

        Not where a state is put together for it first, nor of streams, whose test images would
        have to be read.
        """
        if not self.ahead.pays() or self.stages or self.loader.steps_at_once:
            return
        state, tested = self.state, next(iter(self.loader.test_batches()))
        calls = [
            (self.programs.evaluate, (state.params, state.mstate, tested)),
            (self.programs.probe, (state, self._probe_batch())),
        ]
        self.ahead.begin(calls, self.layout.active)

    def measure(self) -> Row:
        """Evaluates and probes, and mends and shrinks the factors where that is due.

        Raises:
          NotFiniteError: the test loss or the state is not finite.
        """
        self.ahead.wait()
        row = self.evaluate()
        _check_finite(math.isfinite(row["test_loss"]) and train.all_finite(self.state))
        row |= metrics.probe_row(self.programs.probe(self.state, self._probe_batch()))
        row |= self.built.method.tell(self.state.feedback)
        row |= self._repair(row)
        row |= self._compact(row)
        if self.built.takes_over <= self.step < self.config.epochs * self.built.steps_per_epoch:
            self._resize()
        return row

    def _probe_batch(self) -> Batch:
        size = min(PROBE_SIZE, self.loader.train_size)
        if self.loader.steps_at_once:
            # Of large images a step has as many as the device holds.
            size = min(size, self.config.batch_size)
        with jax.transfer_guard("allow"):
            return self.loader.fixed_batch(np.arange(size))

    def check(self, means: RunningMeans) -> None:
        """Raises NotFiniteError where a metric or an entry of the state is not finite."""
        _check_finite(means.finite and train.all_finite(self.state))

    def evaluate(self) -> Row:
        """Loss and accuracy on the test set, without what cannot be decoded."""
        results = [
            self.programs.evaluate(self.state.params, self.state.mstate, batch)
            for batch in self.loader.test_batches()
        ]
        sums = {name: sum(float(r[name]) for r in results) for name in results[0]}
        n = sums["count"]
        if not n:
            raise DataError("no test image could be decoded; is this the right data set?")
        row = {f"test_{name}": value / n for name, value in sums.items() if name != "count"}
        skipped = self.loader.test_size - int(n)
        return {**row, "test_skipped": skipped} if skipped else row

    def _refreshed(self, state: TrainState) -> None:
        """Takes over a state that was changed between steps, with its feedback made anew."""
        self.state = self.programs.refresh(self.layout.place(state))

    def _resize(self) -> None:
        """Gives the feedback the shapes that it asks for by what is measured."""
        with jax.transfer_guard("allow"):
            resized = train.resized(self.built.method, self.state)
            if resized is not self.state:
                self._refreshed(resized)

    def _repair(self, evaluated: Row) -> Row:
        """Makes factors that have drifted orthonormal again, and evaluates to show what moved.

        Optimiser moments stay: they are averages that forget, of triplets that keep their places
        and nearly their directions, and the chain projects what it makes of them.
        """
        if not 0 < self.config.drift_bound < evaluated["drift"]:
            return {}
        params = factors.map_factors(factors.orthonormalized, self.state.params)
        self._refreshed(self.state._replace(params=params))
        return {
            "drift_repaired": float(factors.orthogonality_error(params)),
            **metrics.before("repair", evaluated),
            **self.evaluate(),
        }

    def _compact(self, evaluated: Row) -> Row:
        """Slices away what truncation zeroed, and evaluates again to show that nothing moved."""
        # Once the schedules have ended ranks are stored as they are: a budget is met exactly, and
        # no step is compiled for them any more.
        ended = self.step >= self.built.total_steps
        chosen = ranks.selection(self.state.params, 1 if ended else None)
        if not chosen:
            return {}
        # Paths that were built at the old ranks are built anew; every other shape was sliced.
        compact = self.layout.returning(self.layout.keep, ranks.make_compaction(chosen))
        self._refreshed(compact(self.state))
        return {**metrics.before("compaction", evaluated), **self.evaluate()}


def _check_finite(finite: bool) -> None:
    if not finite:
        raise NotFiniteError("loss or parameters are not finite")
