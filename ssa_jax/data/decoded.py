"""Splits of data sets that are decoded once, and then kept in the user's cache folder."""

import contextlib
import hashlib
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ssa_jax.parallel.compiling import user_cache

# Images and labels.
Split = tuple[np.ndarray, np.ndarray]

# Of fewer records decoding takes less than a second or two.
LEAST = 10_000


def kept(folder: Path, split: str, read: Callable[[], Split]) -> Split:
    """What `read` gives of a split of a prepared data set, from the cache where it was kept.

    A file there is named by the path of the data set and the sizes and times of its files, so
    that what has changed is read anew; nothing is kept of a small split, nor where the cache
    cannot be written.

    Args:
      folder: of the prepared data set.
      split: its name.
      read: decodes the split.
    """
    file = user_cache() / "data" / f"{_digest(folder)}-{split}.npz"
    # Where it is damaged the zip file's checksums tell.
    damaged = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
    with contextlib.suppress(*damaged), np.load(file) as stored:
        return stored["images"], stored["labels"]
    images, labels = read()
    if len(labels) >= LEAST:
        with contextlib.suppress(OSError):
            _write(file, images, labels)
    return images, labels


def _digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def _write(file: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Writes the file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            np.savez(stream, images=images, labels=labels)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
