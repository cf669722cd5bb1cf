"""An optax transformation that bounds every array of a gradient, all of them looked at at once."""

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ssa_jax.transforms.mapping import is_matrix, map_stacked, on_mesh, padded, stacks
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

    def update(updates: optax.Updates, params: optax.Params | None = None) -> optax.Updates:
        del params
        leaves, structure = jax.tree.flatten(updates)
        if not leaves:
            return updates
        if stacks():
            leaves = _laid_down(leaves, jax.tree.leaves(kinds_of(updates)))
        clipped = [
            (u / jnp.maximum(1, jnp.sqrt(square) / threshold)).astype(u.dtype)
            for u, square in zip(leaves, _mean_squares(leaves), strict=True)
        ]
        return jax.tree.unflatten(structure, clipped)

    return optax.with_extra_args_support(optax.stateless(update))


def _mean_squares(leaves: list[Array]) -> list[Array]:
    """Mean square of each array, in at least float32."""
    wide = [x.astype(jnp.result_type(jnp.float32, x.dtype)) for x in leaves]
    # Rows that lie on several devices would be sent to be together.
    if on_mesh():
        return [jnp.mean(jnp.square(x)) for x in wide]
    sums = _rows_of_stacks(wide) if stacks() else list(map(_rows, wide))
    longest = max(len(s) for s in sums)
    table = jnp.stack([jnp.pad(s, (0, longest - len(s))) for s in sums])
    return list(jnp.sum(table, axis=1) / jnp.array([x.size for x in leaves]))


def _rows(x: Array) -> Array:
    """The sums of squares of the rows of an array, flat."""
    squares = jnp.square(x)
    return jnp.sum(squares, axis=-1).ravel() if x.ndim > 1 else squares.ravel()


def _rows_of_stacks(arrays: list[Array]) -> list[Array]:
    """The same, matrices brought to few shapes, whose rows are summed at once."""
    matrices = padded([x for x in arrays if x.ndim == 2])
    if not matrices:
        return list(map(_rows, arrays))
    stacked = iter(map_stacked(lambda x: (jnp.sum(jnp.square(x), axis=-1),), matrices)[0])
    return [next(stacked)[: len(x)] if x.ndim == 2 else _rows(x) for x in arrays]


def _laid_down(leaves: list[Array], kinds: list[str]) -> list[Array]:
    """The same gradients, those of U and V of `Factors` computed once, in stacks.

    They are products with s. XLA would multiply anew in every kernel that reads one, and as some of
    these follow the update of s, keep a copy of each s for them.
    """
    places = [i for i, kind in enumerate(kinds) if is_matrix(kind)]
    if not places:
        return leaves
    matrices = padded([leaves[i] for i in places])
    (held,) = map_stacked(lambda x: (lax.optimization_barrier(x),), matrices)
    laid = dict(zip(places, held, strict=True))
    return [laid[i][tuple(map(slice, x.shape))] if i in laid else x for i, x in enumerate(leaves)]
