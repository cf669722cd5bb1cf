"""How much memory a process holds at most that does nothing but build and train one contestant.

    python -m benchmarks.peak CASE_JSON ENTRY_JSON

prints the two numbers of `Peak` as JSON.
"""

import importlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax

from benchmarks import contestants
from benchmarks.contestants import Contestant, Entry
from benchmarks.networks import Case, random_batch

STEPS = 3


class Peak(NamedTuple):
    """Largest resident size in bytes: with libraries and batch alone, and after some steps.

    Compiling takes memory too, unless the programs are in the cache on disk.
    """

    base_bytes: int
    peak_bytes: int


def in_process(case: Case, entry: Entry) -> Peak:
    """The peak of an entry in a fresh process, which reads what this one has compiled and kept."""
    command = [sys.executable, "-m", "benchmarks.peak", json.dumps(case), json.dumps(entry)]
    kept = jax.config.values["jax_compilation_cache_dir"]
    cache = {"JAX_COMPILATION_CACHE_DIR": kept} if kept else {}
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **cache}
    )
    return Peak(*json.loads(done.stdout.splitlines()[-1]))


def largest_resident() -> int:
    """Bytes of this process's largest resident size since it was started.

    `ru_maxrss` of a program that another one started is at least the size of its parent, on
    Linux; the status file tells of the program alone.
    """
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        if "VmHWM" in fields:
            return 1024 * int(fields["VmHWM"].split()[0])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(case: Case, entry: Entry) -> Peak:
    """The peak of this process, which should have done nothing before."""
    random_batch(case).images.block_until_ready()
    if entry.method == contestants.TORCH:
        importlib.import_module("torch")
    base = largest_resident()
    contestant: Contestant = contestants.prepare(case, entry)
    for _ in range(STEPS - 1):
        contestant.step()
    return Peak(base, largest_resident())


if __name__ == "__main__":
    print(json.dumps(measure(Case(*json.loads(sys.argv[1])), Entry(*json.loads(sys.argv[2])))))
