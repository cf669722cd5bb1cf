"""Folders of results: new ones, ones that cannot be written, and ones that processes share."""

import contextlib
import datetime
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from ssa_jax.runs.workdir import WorkdirError


def new(name: str) -> Path:
    """A folder under runs/ with the time and a name, not made yet."""
    return Path(f"runs/{datetime.datetime.now():%Y%m%d-%H%M%S}-{name}")


@contextlib.contextmanager
def writing(folder: Path, flag: str = "--folder") -> Iterator[None]:
    """Makes a folder and lets it be written; the flag is what names another one.

    Raises:
      WorkdirError: it cannot be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as e:
        raise WorkdirError(f"cannot write to {folder}: {e.strerror}; give another {flag}") from e


@contextlib.contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Holds a folder against other processes; False where another holds it and we do not wait.

    The lock is the system's, so it ends with the process, however that ends.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            ours = True
        except BlockingIOError:
            ours = False
        yield ours
    finally:
        os.close(handle)
