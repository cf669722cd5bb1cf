"""An optax transformation that bounds every array of a gradient, all of them looked at at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ssa_jax.transforms.mapping import alike, is_matrix, map_stacked, on_mesh, padded, stacks
from ssa_jax.transforms.selection import kinds_of

Array = jax.Array


def clip_by_rms(threshold: float | Array) -> optax.GradientTransformationExtraArgs:
    """Shortens each update u to a root mean square of at most c: u / max(1, rms(u)/c).

    What `optax.clip_by_block_rms` does to rounding, in fewer kernels: rows are summed where the
    gradient is made, and the sums of all rows of all arrays by one reduction more.

    Args:
      threshold: c, above zero.

    Raises:
      ValueError: a threshold of zero or less.

    References:
      Shazeer & Stern, Adafactor: adaptive learning rates with sublinear memory cost, 2018,
      section 6.

    >>> import jax.numpy as jnp
    >>> clip = clip_by_rms(1.0)
    >>> u, _ = clip.update((jnp.full(4, 2.0), jnp.full((2, 3), 0.5)), clip.init(None))
    >>> print(u[0], u[1][0])
    [1. 1. 1. 1.] [0.5 0.5 0.5]
    """
    if isinstance(threshold, int | float) and threshold <= 0:
        raise ValueError(f"the clipping threshold must be above 0, got {threshold}")

    def longer(squares: Array) -> Array:
        """How many times too long arrays of these mean squares are, at least one."""
        return jnp.maximum(1, jnp.sqrt(squares) / threshold)

    def update(updates: optax.Updates, params: optax.Params | None = None) -> optax.Updates:
        del params
        leaves, structure = jax.tree.flatten(updates)
        if not leaves:
            return updates
        if on_mesh() and not stacks():
            # Rows that lie on several devices would be sent to be together.
            clipped = [_over(x, longer(jnp.mean(jnp.square(_wide(x))))) for x in leaves]
        else:
            kinds = jax.tree.leaves(kinds_of(updates)) if stacks() else []
            places = [i for i, kind in enumerate(kinds) if is_matrix(kind)]
            clipped = _clipped_at_once(leaves, places, longer)
        return jax.tree.unflatten(structure, clipped)

    return optax.with_extra_args_support(optax.stateless(update))


def _over(x: Array, by: Array) -> Array:
    return (x / by).astype(x.dtype)


def _wide(x: Array) -> Array:
    return x.astype(jnp.result_type(jnp.float32, x.dtype))


def _rows(x: Array) -> Array:
    """The sums of squares of the rows of an array, flat, in at least float32."""
    squares = jnp.square(_wide(x))
    return jnp.sum(squares, axis=-1).ravel() if x.ndim > 1 else squares.ravel()


def _rows_of_all(arrays: list[Array]) -> list[Array]:
    return list(map(_rows, arrays))


def _mean_squares(rows: list[Array], sizes: list[int]) -> Array:
    """Mean squares of arrays of some sizes, from stacks (arrays, rows) of `_rows`."""
    longest = max(x.shape[1] for x in rows)
    table = jnp.concatenate([jnp.pad(x, ((0, 0), (0, longest - x.shape[1]))) for x in rows])
    return jnp.sum(table, axis=1) / jnp.array(sizes)


def _clipped_at_once(
    leaves: list[Array], places: list[int], longer: Callable[[Array], Array]
) -> list[Array]:
    """All arrays over `longer` of their mean squares; those at some places as stacks of few shapes.

    Places of U and V of factors, whose gradients are products with s: XLA would multiply anew in
    every kernel that reads one, and as some of those follow the update of s, would copy every s for
    them. So they are laid down.
    """
    others = [i for i in range(len(leaves)) if i not in set(places)]
    matrices, rest = padded([leaves[i] for i in places]), [leaves[i] for i in others]
    groups = alike(matrices)
    held = [lax.optimization_barrier(jnp.stack([matrices[i] for i in group])) for group in groups]
    order = [*(places[i] for group in groups for i in group), *others]
    rows = [jnp.sum(jnp.square(_wide(x)), axis=-1).reshape(len(x), -1) for x in held]
    sums = lax.platform_dependent(rest, cpu=_rows_of_all, default=_rows_of_stacks)
    rows += [x[None] for x in sums]
    by = longer(_mean_squares(rows, [leaves[i].size for i in order]))
    clipped: list[Array] = []
    for x in held:
        of_stack = by[len(clipped) : len(clipped) + len(x)]
        clipped += list(_over(x, of_stack.reshape(-1, *(1,) * (x.ndim - 1))))
    clipped = [x[tuple(map(slice, leaves[i].shape))] for i, x in zip(order, clipped, strict=False)]
    clipped += [_over(x, of_one) for x, of_one in zip(rest, by[len(places) :], strict=True)]
    back = dict(zip(order, clipped, strict=True))
    return [back[i] for i in range(len(leaves))]


def _rows_of_stacks(arrays: list[Array]) -> list[Array]:
    """`_rows` of each, matrices brought to few shapes, whose rows are summed at once."""
    matrices = padded([x for x in arrays if x.ndim == 2])
    if not matrices:
        return _rows_of_all(arrays)
    stacked = iter(map_stacked(lambda x: (jnp.sum(jnp.square(_wide(x)), axis=-1),), matrices)[0])
    return [next(stacked)[: len(x)] if x.ndim == 2 else _rows(x) for x in arrays]
