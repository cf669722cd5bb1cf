"""Each of several processes tells that it is alive, and ends where another one does not.

JAX has a heartbeat of its own, a hundred seconds long, which ends a process in C++ with a page of
its own words, and a process may wait for another in a place that no error reaches. So this one is
quicker, and says what to do in a line.
"""

import atexit
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

# The service that JAX's processes share has no public name; Orbax goes this way too.
from jax._src import distributed

EVERY_S = 2.0
# Threads beat while a program is compiled; a busy machine may keep one waiting for some seconds.
LIMIT_S = 20.0
_KEY = "ssa_jax/pulse"
_DONE = "done"


class Heard:
    """What was last heard of every other process, and when. Thread safe.

    Args:
      others: their numbers.
      now: seconds of a clock.
    """

    def __init__(self, others: set[int], now: float):
        self._lock = threading.Lock()
        self._last = dict.fromkeys(others, ("", now))

    def hear(self, pulses: dict[int, str], now: float) -> None:
        """Takes the pulses that are known now; one that has not changed is not news."""
        with self._lock:
            for other, value in pulses.items():
                if other in self._last and self._last[other][0] != value:
                    self._last[other] = (value, now)

    def gone(self, now: float) -> list[int]:
        """Those that are not done and have told nothing for too long."""
        with self._lock:
            return [
                other
                for other, (value, at) in sorted(self._last.items())
                if value != _DONE and now - at > LIMIT_S
            ]


def start(lost: Callable[[list[int]], None]) -> None:
    """Beats and listens in the background until this process ends.

    Args:
      lost: called with the processes that are gone, from a thread.
    """
    client: Any = distributed.global_state.client
    own = jax.process_index()
    heard = Heard(set(range(jax.process_count())) - {own}, time.monotonic())
    ended = threading.Event()

    def tell(value: str) -> None:
        client.key_value_set(f"{_KEY}/{own}", value, allow_overwrite=True)

    def beat() -> None:
        for count in itertools.count():
            try:
                tell(str(count))
                found = client.key_value_dir_get(_KEY)
            except jax.errors.JaxRuntimeError:
                # Where the service does not answer, silence says enough.
                found = []
            pulses = {int(key.rpartition("/")[2]): value for key, value in found}
            heard.hear(pulses, time.monotonic())
            if ended.wait(EVERY_S):
                return

    def watch() -> None:
        # In a thread of its own, since the service may keep the other one waiting.
        while not ended.wait(EVERY_S / 2):
            if gone := heard.gone(time.monotonic()):
                lost(gone)
                return

    beating = threading.Thread(target=beat, daemon=True)
    watching = threading.Thread(target=watch, daemon=True)

    def end() -> None:
        ended.set()
        beating.join(2 * EVERY_S)
        watching.join(EVERY_S)
        try:
            tell(_DONE)
        except jax.errors.JaxRuntimeError:
            return

    beating.start()
    watching.start()
    # Before JAX leaves the service, which it registered earlier.
    atexit.register(end)
