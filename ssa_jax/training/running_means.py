"""Means of training metrics over an epoch that may be left and gone on with."""

import math
from typing import Any

import jax
import numpy as np

Array = jax.Array

# What the step reports of truncation, NaN where it truncated nothing.
_BEFORE, _AFTER = "loss_before_truncation", "loss_after_truncation"
_COUNT = "truncations"
# Records that a loader replaced.
_SKIPPED = "skipped"
_COUNTED = (_COUNT, _BEFORE, _AFTER, _SKIPPED)


class RunningMeans:
    """Sums of metrics over the steps of an epoch, in float64, and its worst truncation.

    The metrics of a dispatch are read when the next one has begun, so that the device never
    waits for the host.

    Args:
      sums: of the steps done before; with the number of steps that truncated, and the loss
        before and after where it rose most, once there is one.
      steps: their number.

    Attributes:
      loss: of the last step that was read; None before.
    """

    def __init__(self, sums: dict[str, float], steps: int):
        self.sums, self.steps = dict(sums), steps
        self.loss: float | None = None
        self._latest: dict[str, Array] = {}

    def add(self, measured: dict[str, Array], steps: int) -> None:
        """Counts the steps of a dispatch, each metric (steps,), and reads the one before."""
        self.flush()
        self._latest = measured
        self.steps += steps

    def flush(self) -> None:
        """Reads the last dispatch."""
        # The one transfer of the loop, and asked for in so many words.
        latest = jax.device_get(self._latest)
        self._latest = {}
        self.read(latest)

    def read(self, measured: dict[str, np.ndarray]) -> None:
        """Sums the metrics of a dispatch, each (steps,), whose steps are counted already."""
        for values in zip(*(metric.tolist() for metric in measured.values()), strict=True):
            self._read(dict(zip(measured, values, strict=True)))

    def _read(self, values: dict[str, float]) -> None:
        """Counts one step."""
        before, after = (values.pop(name, math.nan) for name in (_BEFORE, _AFTER))
        self.loss = values.get("loss", self.loss)
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        if not math.isnan(before):
            self._count_truncation(before, after)

    def _count_truncation(self, before: float, after: float) -> None:
        sums = self.sums
        sums[_COUNT] = sums.get(_COUNT, 0) + 1
        if _AFTER not in sums or after - before > sums[_AFTER] - sums[_BEFORE]:
            sums |= {_BEFORE: before, _AFTER: after}

    @property
    def finite(self) -> bool:
        """Whether every value that was read is finite."""
        return all(map(math.isfinite, self.sums.values()))

    def row(self) -> dict[str, Any]:
        """Mean loss and metrics over the steps, what truncation did, and records skipped."""
        self.flush()
        counts = {n: self.sums[n] for n in (_COUNT, _BEFORE, _AFTER) if n in self.sums}
        if _SKIPPED in self.sums:
            counts[_SKIPPED] = int(self.sums[_SKIPPED])
        means = {n: v / self.steps for n, v in self.sums.items() if n not in _COUNTED}
        return {**{f"train_{name}": value for name, value in means.items()}, **counts}
