"""Ctrl-C and SIGTERM at a moment that suits the run."""

import itertools
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a machine sends it that is about to be taken away."""


class Interruptible:
    """Makes the first Ctrl-C or SIGTERM a request that is honoured between steps.

    In the middle of a save it would leave the checkpoint's threads behind with an error of
    their own. A second signal acts at once, as the system has it, even within compiled code.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> "Interruptible":
        # Python delivers signals to the main thread alone.
        if threading.current_thread() is threading.main_thread():
            self._earlier = {s: signal.signal(s, self._request) for s in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _request(self, number: int, _: object) -> None:
        self._received = number
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._received is not None

    def check(self) -> None:
        """Raises KeyboardInterrupt or `Terminated` when asked for."""
        if self._received is not None:
            raise Terminated if self._received == signal.SIGTERM else KeyboardInterrupt


class Together(Interruptible):
    """SIGTERM to any of several processes, honoured by all of them before the same step.

    JAX, which was told of the other processes, has heard the signal first and agrees with them
    on the step. Ctrl-C acts at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._asked = itertools.count()

    def __enter__(self) -> "Together":
        return self

    @property
    def requested(self) -> bool:
        """Whether all stop here; to be asked as often, and in the same order, by each process."""
        if multihost_utils.reached_preemption_sync_point(next(self._asked)):
            self._received = signal.SIGTERM
        return self._received is not None


def interruptible() -> Interruptible:
    """What suits the number of processes."""
    return Interruptible() if jax.process_count() == 1 else Together()
