"""Wall-clock times of several contestants, measured side by side; latencies of inference."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# How a contestant prepares itself, and what is timed.
Contestant = tuple[Callable[[], Any], Callable[[], Any]]


def contestant(program: Callable[..., Any], *args: Any) -> Contestant:
    """A compiled program that keeps its arguments, and so needs no preparation."""
    return lambda: None, lambda: jax.block_until_ready(program(*args))


class Timing(NamedTuple):
    """Milliseconds of one call: median and least over so many rounds."""

    median_ms: float
    min_ms: float
    rounds: int


def side_by_side(
    contestants: Sequence[Contestant], rounds: int, budget_s: float = 3.0
) -> list[Timing]:
    """Times every contestant once a round, in turn, so that noise falls on all of them alike.

    Args:
      contestants: pairs (prepare, call): prepare runs off the clock before every call; a call
        returns when its work is done, not merely queued. The first call, which compiles, is
        not measured.
      rounds: measured rounds.
      budget_s: a contestant whose calls took this long rests after its third round.
    """
    for prepare, call in contestants:
        prepare()
        call()
    seconds: list[list[float]] = [[] for _ in contestants]
    for _ in range(rounds):
        for times, (prepare, call) in zip(seconds, contestants, strict=True):
            if len(times) >= 3 and sum(times) > budget_s:
                continue
            if not times or times[-1] < 0.1:
                # Its predecessor left the caches and the threads in another state.
                prepare()
                call()
            prepare()
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return [Timing(1e3 * statistics.median(s), 1e3 * min(s), len(s)) for s in seconds]


class Latency(NamedTuple):
    """One program at one batch size: median and least time, rounds, and how long it compiled."""

    ms: float
    min_ms: float
    rounds: int
    compile_s: float


def latencies(
    calls: Mapping[str, Callable[[jax.Array], jax.Array]],
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
    # More than any of them takes: every one runs all rounds.
    times = side_by_side(contestants, rounds, budget_s=600.0)
    return {
        name: Latency(t.median_ms, t.min_ms, t.rounds, seconds)
        for name, t, seconds in zip(calls, times, compile_s, strict=True)
    }
