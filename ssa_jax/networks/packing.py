"""Several arrays of one batch as one array, which is what crosses a cut."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssa_jax.networks.cut import CutError

Array = jax.Array


class Packing:
    """Several arrays of one batch as one array of floating-point numbers, and back.

    A single floating-point array is left as it is. Arrays that differ in their last axis alone
    are joined along it, others flattened. Whole numbers and truth values are kept exactly, as
    two numbers below 2^16 each.

    Args:
      avals: shape and dtype of each array.
      where: the line of the cut, for errors.

    Raises:
      CutError: an array without the batch as its first axis, or of a kind that cannot be kept.
    """

    def __init__(self, avals: Sequence[Any], batch: int, where: str):
        self.avals = tuple(avals)
        for aval in self.avals:
            if not aval.shape or aval.shape[0] != batch:
                raise CutError(
                    f"a value of shape {aval.shape} crosses the cut at {where}, whose first axis "
                    f"is not the batch of {batch}"
                )
            if aval.dtype not in _KEPT:
                raise CutError(f"a value of dtype {aval.dtype} crosses the cut at {where}")
        self.floats = [x.dtype for x in self.avals if jnp.issubdtype(x.dtype, jnp.floating)]
        self.dtype = jnp.result_type(*self.floats) if self.floats else jnp.dtype(jnp.float32)
        if len(self.floats) < len(self.avals) and jnp.finfo(self.dtype).nmant < 16:
            self.dtype = jnp.dtype(jnp.float32)
        self._whole = len({x.shape[:-1] for x in self.avals}) == 1 and self.avals[0].ndim > 1

    def pack(self, arrays: Sequence[Array]) -> Array:
        """The one array, (batch, ...)."""
        parts = [p for x in arrays for p in _halves(x)]
        if len(parts) == 1:
            return parts[0]
        if not self._whole:
            parts = [p.reshape(len(p), -1) for p in parts]
        return jnp.concatenate([p.astype(self.dtype) for p in parts], axis=-1)

    def unpack(self, packed: Array) -> list[Array]:
        """The arrays of `pack`."""
        if len(self.avals) == 1 and self.floats:
            return [packed]
        arrays, start = [], 0
        for aval in self.avals:
            parts = []
            for _ in range(1 if jnp.issubdtype(aval.dtype, jnp.floating) else 2):
                width = aval.shape[-1] if self._whole else int(np.prod(aval.shape[1:]))
                part = packed[..., start : start + width]
                parts.append(part.reshape(len(packed), *aval.shape[1:]))
                start += width
            arrays.append(_whole(parts, aval.dtype))
        return arrays


_KEPT = (*(jnp.dtype(t) for t in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)),
         *(jnp.dtype(t) for t in (jnp.bool_, jnp.int8, jnp.int16, jnp.int32, jnp.uint8,
                                  jnp.uint16)))  # fmt: skip
_HALF = 2**16


def _halves(x: Array) -> list[Array]:
    if jnp.issubdtype(x.dtype, jnp.floating):
        return [x]
    x = x.astype(jnp.int32)
    high, low = jnp.floor_divide(x, _HALF), jnp.mod(x, _HALF)
    return [high.astype(jnp.float32), low.astype(jnp.float32)]


def _whole(parts: Sequence[Array], dtype: Any) -> Array:
    if len(parts) == 1:
        return parts[0].astype(dtype)
    high, low = (p.astype(jnp.int32) for p in parts)
    return (high * _HALF + low).astype(dtype)
