"""How much memory a process holds at most that does nothing but build and train one contestant.

    python -m benchmarks.peak CASE_JSON ENTRY_JSON

prints the numbers of `Peak` as JSON.
"""

import gc
import importlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks import contestants
from benchmarks.contestants import Entry
from benchmarks.networks import Case, random_batch

STEPS = 3

# Blocks of this size and larger go back to the system when they are freed, so that the resident
# size is what is in use; by itself glibc keeps freed ones of up to 32 MiB.
_KEPT_BELOW = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}


class Peak(NamedTuple):
    """Sizes of a process in bytes.

    Attributes:
      base_bytes: largest resident size with libraries and batch alone.
      peak_bytes: largest resident size after some steps. Tracing takes memory too, and so does
        compiling, unless the programs are in the cache on disk.
      steps_bytes: what steps take beyond what is resident between them: the largest resident size
        while some more run, less the size before. None where the system does not tell it.
    """

    base_bytes: int
    peak_bytes: int
    steps_bytes: int | None


def in_process(case: Case, entry: Entry) -> Peak:
    """The peak of an entry in a fresh process, which reads what this one has compiled and kept."""
    return fresh("benchmarks.peak", case, entry)


def fresh(module: str, *arguments: Any) -> Peak:
    """What a program prints as its last line that is called with these arguments as JSON."""
    command = [sys.executable, "-m", module, *map(json.dumps, arguments)]
    kept = jax.config.values["jax_compilation_cache_dir"]
    cache = {"JAX_COMPILATION_CACHE_DIR": kept} if kept else {}
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True,
        env={**os.environ, **_KEPT_BELOW, **cache},
    )  # fmt: skip
    return Peak(*json.loads(done.stdout.splitlines()[-1]))


def largest_resident() -> int:
    """Bytes of this process's largest resident size since it was started.

    `ru_maxrss` of a program that another one started is at least the size of its parent, on
    Linux; the status file tells of the program alone.
    """
    found = _status("VmHWM")
    if found is not None:
        return found
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _status(field: str) -> int | None:
    """Bytes of a size in Linux's status file of this process."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return 1024 * int(fields[field].split()[0]) if field in fields else None


def beyond(call: Callable[[], Any]) -> int | None:
    """Bytes by which the resident size rises above what it is now, at most, during a call.

    None where the largest resident size cannot be reset: that takes Linux.
    """
    gc.collect()
    before = _status("VmRSS")
    try:
        # The kernel takes 5 to mean the largest resident size (proc_pid_clear_refs(5)).
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    call()
    after = _status("VmHWM")
    return None if before is None or after is None else max(0, after - before)


def measure(case: Case, entry: Entry) -> Peak:
    """The peak of this process, which should have done nothing before."""
    random_batch(case).images.block_until_ready()
    if entry.method == contestants.TORCH:
        importlib.import_module("torch")
    return of(lambda: contestants.prepare(case, entry).step, done=1)


def of(prepare: Callable[[], Callable[[], Any]], done: int = 0) -> Peak:
    """The peak of this process as it makes a step and takes it some times.

    Args:
      prepare: makes the step; all that it imports and is fed with should be there before.
      done: steps that `prepare` takes itself.
    """
    base = largest_resident()
    step = prepare()

    def steps(number: int = STEPS) -> None:
        for _ in range(number):
            step()

    steps(STEPS - done)
    # Read before the next line resets it.
    return Peak(base, largest_resident(), beyond(steps))


if __name__ == "__main__":
    print(json.dumps(measure(Case(*json.loads(sys.argv[1])), Entry(*json.loads(sys.argv[2])))))
