"""How long inference takes: compiled programs on one batch, side by side."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.measure.timing import contestant, side_by_side

Array = jax.Array

# More than any contestant here takes: every one runs all rounds.
_BUDGET_S = 600.0


class Latency(NamedTuple):
    """One program at one batch size: median and least time, rounds, and how long it compiled."""

    ms: float
    min_ms: float
    rounds: int
    compile_s: float


def latencies(
    calls: Mapping[str, Callable[[Array], Array]],
    input_shape: Sequence[int],
    batch: int,
    rounds: int = 11,
) -> dict[str, Latency]:
    """Times every call on one batch of normal images, in turn, compilation excluded.

    Args:
      calls: images (batch, H, W, C) -> logits, by name; what they close over is compiled in.
      input_shape: (H, W, C).
      batch: number of images.
      rounds: measured calls of each.
    """
    images = jax.random.normal(jax.random.key(0), (batch, *input_shape), jnp.float32)
    contestants, compile_s = [], []
    for call in calls.values():
        start = time.perf_counter()
        program = jax.jit(lambda x, call=call: call(x)).lower(images).compile()
        compile_s.append(time.perf_counter() - start)
        contestants.append(contestant(program, images))
    times = side_by_side(contestants, rounds, _BUDGET_S)
    return {
        name: Latency(t.median_ms, t.min_ms, t.rounds, seconds)
        for name, t, seconds in zip(calls, times, compile_s, strict=True)
    }
