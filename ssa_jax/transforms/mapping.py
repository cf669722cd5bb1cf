"""Maps over the orthonormal matrices and the spectra of a tree, those of one shape at once."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ssa_jax.factors.linalg import are_whole, platform_of_trace
from ssa_jax.transforms.selection import COLUMNS, ROWS, SPECTRUM

Array = jax.Array

# Multiply-accumulates that padding may add to a product to spare a shape. A shape less is some 25
# kernels less in a step of projections and retractions, five of them products with tall matrices; a
# GPU starts 25 kernels in some 60 µs, in a fifth of which it does so many in float32.
_WORTH_A_SHAPE = 3e8


def is_matrix(kind: str) -> bool:
    """True for the kinds with orthonormal columns or rows.

    >>> [is_matrix(kind) for kind in (COLUMNS, ROWS, SPECTRUM)]
    [True, True, False]
    """
    return kind in (COLUMNS, ROWS)


def compute_dtype(*arrays: Array) -> Any:
    """The dtype that small matrices are computed in: the widest given, at least float32."""
    return jnp.result_type(jnp.float32, *(x.dtype for x in arrays))


def on_mesh() -> bool:
    """Whether what is traced is for several devices, on which arrays may lie differently."""
    return not jax.sharding.get_abstract_mesh().empty


def stacks() -> bool:
    """Whether few large kernels are worth zeros and copies: on an accelerator.

    Not on a CPU, which starts an operation in no time, and adds and multiplies zeros like other
    numbers. On a mesh of GPUs where factors are whole on each; not on one of TPUs, for which
    programs of stacks compile longer.
    """
    platform = platform_of_trace()
    if on_mesh():
        return are_whole() and platform not in ("cpu", "tpu")
    return platform != "cpu"


def alike(*columns: Sequence[Array]) -> list[list[int]]:
    """The places at which lists of arrays have the same shapes and dtypes, together.

    >>> alike([jnp.zeros(3), jnp.zeros(2), jnp.ones(3)])
    [[0, 2], [1]]
    """
    found: dict[Any, list[int]] = {}
    for i, row in enumerate(zip(*columns, strict=True)):
        found.setdefault(tuple((x.shape, x.dtype) for x in row), []).append(i)
    return list(found.values())


def map_stacked(fn: Callable[..., tuple[Array, ...]], *columns: list[Array]) -> list[list[Array]]:
    """Applies fn at every place of lists of arrays, at those of one shape and dtype at once.

    So an update is few large operations instead of many small ones. On a mesh where `stacks` are
    not worth it every place is a group of its own: a stack of arrays that lie differently would lie
    like none of them.

    Args:
      fn: takes arrays with one more axis in front, treats what lies along it alone, and returns
        a tuple of such arrays.
      *columns: lists of one length.

    Returns:
      For each of fn's results a list of it at every place.
    """

    def stacked(columns: tuple[list[Array], ...]) -> list[list[Array]]:
        return [list(made) for made in fn(*(jnp.stack(column) for column in columns))]

    results: list[Any] = [None] * len(columns[0])
    apart = on_mesh() and not stacks()
    for places in [[i] for i in range(len(results))] if apart else alike(*columns):
        done = jax.jit(stacked)(tuple([column[i] for i in places] for column in columns))
        for i, of_place in zip(places, zip(*done, strict=True), strict=True):
            results[i] = of_place
    return [list(result) for result in zip(*results, strict=True)]


def map_matrices(
    fn: Callable[[list[Array], list[Array]], list[Array]], kinds: Any, updates: Any, params: Any
) -> Any:
    """Replaces the updates of all orthonormal matrices by fn(matrices, updates); keeps the others.

    fn sees tall matrices (..., n, r) in at least float32, see `each` and `map_stacked`; the
    results have the updates' dtypes.
    """
    structure, kinds = jax.tree.structure(kinds), jax.tree.leaves(kinds)
    out, xs = jax.tree.leaves(updates), jax.tree.leaves(params)
    places = [i for i, kind in enumerate(kinds) if is_matrix(kind)]

    def tall(i: int, arrays: list[Array]) -> Array:
        x = arrays[i].astype(compute_dtype(out[i], xs[i]))
        return x.mT if kinds[i] == ROWS else x

    done = fn([tall(i, xs) for i in places], [tall(i, out) for i in places]) if places else []
    for i, new in zip(places, done, strict=True):
        out[i] = (new.mT if kinds[i] == ROWS else new).astype(out[i].dtype)
    return jax.tree.unflatten(structure, out)


def each(fn: Callable[[Array, Array], Array], *, pad: bool = False) -> Callable[..., list[Array]]:
    """For `map_matrices`: fn(x, g) of every matrix and its update, those of one shape at once.

    Args:
      fn: of stacks of both, see `map_stacked`.
      pad: fn leaves rows and columns of zeros at zero and the rest as without them, so matrices
        of nearly one shape are brought to one by zeros, see `common_shapes`, on one accelerator.
    """

    def by_shape(xs: list[Array], gs: list[Array]) -> list[Array]:
        return map_stacked(lambda x, g: (fn(x, g),), xs, gs)[0]

    def by_common_shape(xs: list[Array], gs: list[Array]) -> list[Array]:
        done = by_shape(padded(xs), padded(gs))
        return [y[..., : x.shape[-2], : x.shape[-1]] for x, y in zip(xs, done, strict=True)]

    def mapped(xs: list[Array], gs: list[Array]) -> list[Array]:
        return by_common_shape(xs, gs) if pad and stacks() else by_shape(xs, gs)

    return mapped


def padded(xs: list[Array]) -> list[Array]:
    """Matrices with zeros behind their entries, up to their `common_shapes`."""

    def pad(x: Array, shape: tuple[int, ...]) -> Array:
        return jnp.pad(x, [(0, n - m) for n, m in zip(shape, x.shape, strict=True)])

    return list(map(pad, xs, common_shapes([x.shape for x in xs])))


def common_shapes(shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """For each matrix's shape (..., n, r) the one, at least as large, that it is brought to.

    Every distinct shape is a program of its own to compile, to tune and to start. The two shapes
    whose union adds the fewest multiply-accumulates, n r² a matrix, become one, again and again,
    while these are within `_WORTH_A_SHAPE`.

    >>> common_shapes([(96, 16), (80, 32), (2048, 512), (2048, 512)])
    [(96, 32), (96, 32), (2048, 512), (2048, 512)]
    """
    places: dict[tuple[int, ...], list[int]] = {}
    for i, shape in enumerate(shapes):
        places.setdefault(shape, []).append(i)

    def cost(shape: tuple[int, ...], *like: tuple[int, ...]) -> int:
        return math.prod(shape) * shape[-1] * sum(len(places[one]) for one in like)

    def union(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(map(max, a, b))

    def added(pair: tuple[tuple[int, ...], tuple[int, ...]]) -> int:
        a, b = pair
        return cost(union(a, b), a, b) - cost(a, a) - cost(b, b)

    while pairs := [p for p in itertools.combinations(places, 2) if p[0][:-2] == p[1][:-2]]:
        least = min(pairs, key=added)
        if added(least) > _WORTH_A_SHAPE:
            break
        moved = [i for shape in least for i in places.pop(shape)]
        places.setdefault(union(*least), []).extend(moved)
    brought = {i: shape for shape, members in places.items() for i in members}
    return [brought[i] for i in range(len(shapes))]


def map_spectra(fn: Callable[..., Array], kinds: Any, updates: Any, params: Any) -> Any:
    """Replaces the update g of every spectrum s (..., r) by fn(s, g), computed in float32."""

    def one(kind: str, g: Array, s: Array) -> Array:
        if kind != SPECTRUM:
            return g
        dtype = compute_dtype(g, s)
        return fn(s.astype(dtype), g.astype(dtype)).astype(g.dtype)

    return jax.tree.map(one, kinds, updates, params)
