"""Whether a run keeps a tape: what its steps would hold against the memory of the device."""

import os
from collections.abc import Sequence
from typing import Any

import jax

from ssa_jax.methods import Method
from ssa_jax.networks.forward import forward
from ssa_jax.networks.units import Unit
from ssa_jax.runs.config import Config
from ssa_jax.training import costs

Tree = Any


def require_direct(methods: dict[str, Method], config: Config) -> None:
    """Raises ValueError for the first of the methods, by flag, whose steps cannot be streamed."""
    for flag, method in methods.items():
        if method.direct is None:
            raise ValueError(
                "--memory=streamed needs signals made of the output error alone, and "
                f"--{flag}={getattr(config, flag)}, as set here, reads the tape of the forward "
                "pass; give --memory=taped or auto"
            )


def choose(
    units: Sequence[Unit], method: Method, params: Tree, mstate: Tree, images: Any,
    device_bytes: int,
) -> str:  # fmt: skip
    """The mode of ``--memory=auto``: streamed where a tape would fill more than half the device.

    Args:
      units: the network.
      method: one that reads the tape keeps it.
      params: at the initial ranks.
      mstate: the model state.
      images: of a batch, (batch, ...), or their shape and dtype.
      device_bytes: memory of the device; see `device_bytes`.
    """
    if method.direct is None:
        return "taped"
    held = held_bytes(units, method, params, mstate, images)
    return "streamed" if held > device_bytes / 2 else "taped"


def held_bytes(
    units: Sequence[Unit], method: Method, params: Tree, mstate: Tree, images: Any
) -> int:
    """What a tape holds of a batch, in bytes; arguments as those of `choose`."""
    inputs = jax.eval_shape(
        lambda p, m, x: forward(units, p, m, x)[2].inputs, params, mstate, images
    )
    return sum(costs.activation_bytes(units, method, params, mstate, inputs))


def device_bytes() -> int:
    """Memory of the first device: what its allocator may give, or all of the host's on a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
