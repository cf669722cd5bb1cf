"""Run by its test in a process of its own with eight host devices: steps over stages of units.

    python stages_on_devices.py DTYPE CASE...

A case is MODEL:METHOD:STAGES:MICRO_BATCHES, streamed, or with :taped behind. Trains three steps,
with a refresh after the first, on the stages and on one device by micro-batches in turn, and prints
as JSON how far the former end from the latter, and which share of the state's bytes a device has.
Of one micro-batch on one device for each stage the other step is `train.make_step` itself.
"""

import json
import os
import sys
import warnings

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from staged_steps import run

from ssa_jax.networks.factorize import LeftDense


def main():
    dtype = sys.argv[1]
    jax.config.update("jax_enable_x64", dtype == "float64")
    with warnings.catch_warnings(action="ignore", category=LeftDense):
        print(json.dumps({case: run(case, dtype) for case in sys.argv[2:]}))


if __name__ == "__main__":
    main()
