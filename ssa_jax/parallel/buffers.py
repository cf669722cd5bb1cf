"""Lists of arrays as one flat buffer a dtype, so that unequal ones can be parts of one array."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
# Entries by dtype: (n,) each, or (stages, n) of several lists.
Buffers = dict[str, Array]
Sizes = dict[str, int]


def sizes(lists: Sequence[Sequence[Any]]) -> Sizes:
    """Entries of each dtype that the largest of several lists needs.

    Args:
      lists: of arrays, or of their shapes and dtypes; typed PRNG keys among them.
    """
    found: Sizes = {}
    for arrays in lists:
        own: Sizes = {}
        for x in map(_raw_shape, arrays):
            own[x.dtype.name] = own.get(x.dtype.name, 0) + math.prod(x.shape)
        found = {name: max(found.get(name, 0), own.get(name, 0)) for name in found | own}
    return found


def pack(arrays: Sequence[Array], size: Sizes) -> Buffers:
    """The arrays one after another, zeros behind them: (n,) for every dtype of `size`."""
    flat: dict[str, list[Array]] = {name: [] for name in size}
    for x in map(_raw, arrays):
        flat[x.dtype.name].append(x.reshape(-1))
    return {name: _padded(parts, size[name], name) for name, parts in flat.items()}


def unpack(buffers: Buffers, shapes: Sequence[Any]) -> list[Array]:
    """The arrays of `pack`, of their shapes and dtypes."""
    arrays, starts = [], dict.fromkeys(buffers, 0)
    for shape in shapes:
        raw = _raw_shape(shape)
        name, start = raw.dtype.name, starts[raw.dtype.name]
        starts[name] = start + math.prod(raw.shape)
        x = buffers[name][start : starts[name]].reshape(raw.shape)
        # A key is of the implementation that all keys of a program are of.
        arrays.append(jax.random.wrap_key_data(x) if _is_key(shape) else x)
    return arrays


def _padded(parts: Sequence[Array], size: int, name: str) -> Array:
    missing = size - sum(len(x) for x in parts)
    return jnp.concatenate([*parts, jnp.zeros(missing, name)])


def _is_key(x: Any) -> bool:
    return bool(jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key))


def _raw(x: Array) -> Array:
    return jax.random.key_data(x) if _is_key(x) else jnp.asarray(x)


def _raw_shape(x: Any) -> Any:
    return jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x
