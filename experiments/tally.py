"""Means of training metrics over an epoch that may be left and gone on with."""

import math

import jax

Array = jax.Array


class Tally:
    """Sums of metrics over the steps of an epoch, in float64.

    A step's metrics are read when the next step has begun, so that the device never waits for
    the host.

    Args:
      sums: of the steps done before.
      steps: their number.
    """

    def __init__(self, sums: dict[str, float], steps: int):
        self.sums, self.steps = dict(sums), steps
        self._latest: dict[str, Array] = {}

    def add(self, measured: dict[str, Array]) -> None:
        """Counts a step, and reads the one before."""
        self.flush()
        self._latest = measured
        self.steps += 1

    def flush(self) -> None:
        """Reads the last step."""
        for name, value in self._latest.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
        self._latest = {}

    @property
    def finite(self) -> bool:
        """Whether every value that was read is finite."""
        return all(map(math.isfinite, self.sums.values()))

    def means(self) -> dict[str, float]:
        """Mean of each metric over the steps."""
        self.flush()
        return {name: total / self.steps for name, total in self.sums.items()}
