"""What a step holds of the forward pass, and whether a run keeps it on the device."""

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core

from ssa_jax.methods import Method
from ssa_jax.methods.base import streams
from ssa_jax.networks.forward import forward
from ssa_jax.networks.units import Unit

Tree = Any


# Of a tape, what a streamed pass may hold and still be worth a forward pass more.
_WORTH = 0.8


def choose(method: Method, held: Sequence[int], device_bytes: float) -> str:
    """The mode of ``--memory=auto``: streamed where a tape would fill more than half the device.

    But not where one unit is nearly all of a tape that fits: streaming would spare nothing.

    Args:
      method: one that reads the tape keeps it.
      held: what that is of every unit; see `held_bytes`.
      device_bytes: memory of the device; see `device_bytes`.
    """
    tape = sum(held)
    if not streams(method) or tape <= device_bytes / 2:
        return "taped"
    spares = max(held) <= _WORTH * tape
    return "streamed" if spares or tape > device_bytes else "taped"


def held_bytes(
    units: Sequence[Unit], method: Method, params: Tree, mstate: Tree, images: Any
) -> list[int]:
    """What a tape holds of a batch, in bytes, by unit.

    Args:
      units: the network.
      method: see `activation_bytes`.
      params: one parameter tree a unit.
      mstate: one state tree a unit.
      images: of a batch, (batch, ...), or their shape and dtype.
    """
    inputs = jax.eval_shape(
        lambda p, m, x: forward(units, p, m, x)[2].inputs, params, mstate, images
    )
    return activation_bytes(units, method, params, mstate, inputs)


def device_bytes() -> int:
    """Memory of the first device: what its allocator may give, or all of the host's on a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def nbytes(tree: Tree) -> int:
    """Bytes of all arrays of a tree; typed PRNG keys count for nothing."""
    keys = jax.dtypes.prng_key
    leaves = (x for x in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(x.dtype, keys))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


def activation_bytes(
    units: Sequence[Unit], method: Method, params: Tree, mstate: Tree, inputs: Sequence[Any]
) -> list[int]:
    """Bytes that the gradient of every unit keeps of the forward pass, its input included.

    Their sum is what a taped step holds, their maximum what a streamed one does, but for what
    the compiler recomputes. Direct methods keep nothing for a gradient of the input.

    Args:
      units: the network.
      method: with or without direct signals.
      params: one parameter tree a unit.
      mstate: one state tree a unit.
      inputs: of the units, (batch, ...).
    """
    return [
        nbytes(x) + _residual_bytes(unit, p, m, x, direct=method.direct is not None)
        for unit, p, m, x in zip(units, params, mstate, inputs, strict=True)
    ]


def _residual_bytes(unit: Unit, params: Tree, mstate: Tree, x: Any, *, direct: bool) -> int:
    def residuals(params: Tree, mstate: Tree, x: Any) -> Any:
        def apply(p: Tree, x: Any) -> Any:
            return unit.apply(p, mstate, x, train=True)

        if direct:
            return jax.vjp(lambda p: apply(p, x), params, has_aux=True)[1]
        return jax.vjp(apply, params, x, has_aux=True)[1]

    jaxpr = jax.make_jaxpr(residuals)(params, mstate, x).jaxpr
    # A reshaped array is no second one.
    origin: dict[Any, Any] = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "reshape":
            origin[eqn.outvars[0]] = origin.get(eqn.invars[0], eqn.invars[0])
    results = {origin.get(v, v) for v in jaxpr.outvars if not isinstance(v, core.Literal)}
    return nbytes([v.aval for v in results - set(jaxpr.invars)])
