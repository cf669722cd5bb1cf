"""Wall-clock times of several contestants, measured side by side."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Timing(NamedTuple):
    """Milliseconds of one call: median and least over the rounds."""

    median_ms: float
    min_ms: float


def side_by_side(
    contestants: list[tuple[Callable[[], Any], Callable[[], Any]]], rounds: int, warm_up: int = 2
) -> list[Timing]:
    """Times every contestant once a round, in turn, so that noise falls on all of them alike.

    Args:
      contestants: pairs (prepare, call): prepare runs off the clock before every call; a call
        returns when its work is done, not merely queued.
      rounds: measured rounds.
      warm_up: calls before the first round, for compilation and caches.
    """
    for prepare, call in contestants:
        for _ in range(warm_up):
            prepare()
            call()
    seconds: list[list[float]] = [[] for _ in contestants]
    for _ in range(rounds):
        for times, (prepare, call) in zip(seconds, contestants, strict=True):
            prepare()
            call()  # Its predecessor left the caches and the threads in another state.
            prepare()
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return [Timing(1e3 * statistics.median(s), 1e3 * min(s)) for s in seconds]
