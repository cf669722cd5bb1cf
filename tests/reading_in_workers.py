"""Run by its test in a process of its own: reads in two workers and waits to be killed."""

import multiprocessing
import sys

import grain
import numpy as np
from absl import flags

from ssa_jax.data import decoding


def make(i):
    return np.full((1024, 1024), i, np.uint8)


if __name__ == "__main__":
    # Grain reads flags of its own.
    flags.FLAGS(sys.argv)
    batches = decoding.read(grain.MapDataset.source(list(range(1000))).map(make), workers=2)
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    sys.stdin.read()
