"""Ctrl-C at a moment that suits the run."""

import signal
import threading
from typing import Any


class Interruptible:
    """Makes the first Ctrl-C a request that is honoured between steps.

    In the middle of a save it would leave the checkpoint's threads behind with an error of
    their own. A second Ctrl-C acts at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self._earlier: Any = None

    def __enter__(self) -> "Interruptible":
        # Python delivers signals to the main thread alone.
        if threading.current_thread() is threading.main_thread():
            self._earlier = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        if self._earlier is not None:
            signal.signal(signal.SIGINT, self._earlier)

    def _request(self, *_: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def check(self) -> None:
        """Raises KeyboardInterrupt when asked for."""
        if self.requested:
            raise KeyboardInterrupt
