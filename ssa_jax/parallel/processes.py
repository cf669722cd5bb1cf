"""One run by several devices and processes: what fits them, how one joins, how it ends.

A config is here whatever has the fields of `runs.config.Config` that are read.
"""

import faulthandler
import os
import sys
import time
from typing import Any

import jax

from ssa_jax.errors import ConfigError
from ssa_jax.parallel import mesh, pulse
from ssa_jax.parallel.mesh import Layout

EXIT_LOST = 4
# A process that fails leaves at once; one that is done waits so long for the others.
_SHUTDOWN_S = 50
LOST = "another process of this run is gone; go on from the newest checkpoint with --resume"


def validate(config: Any) -> None:
    """Checks the flags that tell of other processes.

    Raises:
      ConfigError: they do not fit each other.
    """
    address, number, own = config.coordinator_address, config.num_processes, config.process_id
    if not address:
        if number or own >= 0:
            flag = "num_processes" if number else "process_id"
            raise ConfigError(
                f"--{flag} needs --coordinator_address, HOST:PORT of the first process"
            )
        return
    if config.distributed:
        raise ConfigError("give --distributed or --coordinator_address, not both")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--coordinator_address must be HOST:PORT, got {address}")
    if not number or own < 0:
        raise ConfigError(
            "--coordinator_address needs --num_processes and, from 0 on, --process_id"
        )
    if own >= number:
        raise ConfigError(f"--process_id must be less than --num_processes={number}, got {own}")


def join(config: Any) -> None:
    """Makes this process one of several, where the flags say so, and all but the first silent.

    To be called before anything is computed.

    Raises:
      ConfigError: flags that do not fit, or no other processes are found.
    """
    validate(config)
    addressed = bool(config.coordinator_address)
    if not addressed and not config.distributed:
        return
    try:
        jax.distributed.initialize(
            coordinator_address=config.coordinator_address,
            num_processes=config.num_processes if addressed else None,
            process_id=config.process_id if addressed else None,
            cluster_detection_method="deactivate" if addressed else None,
            shutdown_timeout_seconds=_SHUTDOWN_S,
        )
    except ValueError as e:
        raise ConfigError(
            "--distributed finds no TPU pod, SLURM or Open MPI job; give --coordinator_address, "
            "--num_processes and --process_id"
        ) from e
    # JAX ends a process whose first process is gone in a thread of its own, with a line that
    # should not be followed by pages of ours.
    faulthandler.disable()
    pulse.start(_lost)
    if jax.process_index():
        # The descriptor, since Gloo writes there too.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)


def layout(config: Any) -> Layout:
    """Where the arrays of a run lie: on all devices of all processes.

    Raises:
      ConfigError: the devices do not divide a batch, or stages the devices.
    """
    if config.stages > 1 or config.micro_batches > 1:
        return _staged_layout(config)
    layout = mesh.make_layout(config.shard_params)
    if config.batch_size % layout.devices:
        raise ConfigError(
            f"--batch_size must be a multiple of {layout.devices}, the number of devices, got "
            f"{config.batch_size}"
        )
    return layout


def _staged_layout(config: Any) -> Layout:
    flag = "stages" if config.stages > 1 else "micro_batches"
    refused = {
        "shard_params": config.shard_params,
        f"warmup_method={config.warmup_method}": config.warmup_method != "none",
    }
    for other, given in refused.items():
        if given:
            raise ConfigError(f"--{other} is not for --{flag}={getattr(config, flag)}")
    if jax.device_count() % config.stages:
        raise ConfigError(
            f"--stages must divide {jax.device_count()}, the number of devices, got {config.stages}"
        )
    layout = mesh.make_staged_layout(config.stages)
    parts = layout.devices * config.micro_batches
    if config.batch_size % parts:
        raise ConfigError(
            f"--batch_size must be a multiple of {parts}, --micro_batches for each of "
            f"{layout.devices} rows of stages, got {config.batch_size}"
        )
    return layout


def several() -> bool:
    """Whether there are other processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def _lost(gone: list[int]) -> None:
    what = ", ".join(map(str, gone))
    print(f"error: {LOST} (nothing heard of process {what})", file=sys.stderr)
    leave(EXIT_LOST)


def hear_of_others() -> None:
    """Gives the pulse time to find another process gone, and to end this one with that line.

    Where one is gone a checkpoint cannot be written either, and that says less.
    """
    if several():
        time.sleep(pulse.LIMIT_S + 2 * pulse.EVERY_S)


def leave(code: int) -> None:
    """Ends this process at once, without waiting for others that wait for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
