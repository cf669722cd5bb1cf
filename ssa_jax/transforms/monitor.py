"""An optax transformation that changes nothing and measures the drift off the manifold."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from ssa_jax.factors import linalg
from ssa_jax.transforms.manifold import check_every, when_due
from ssa_jax.transforms.mapping import compute_dtype, is_matrix
from ssa_jax.transforms.selection import ROWS, Mask, kinds_at_init, kinds_of, with_params

Array = jax.Array


class DriftState(NamedTuple):
    """Steps done, and the largest |XᵀX - I| of the last measurement, float32."""

    count: chex.Array
    drift: chex.Array


def orthogonality_drift(
    every: int = 1, *, mask: Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    """Measures max |YᵀY - I| over the orthonormal matrices Y = x + u; passes updates unchanged.

    At the end of a chain Y is what `optax.apply_updates` makes of the parameters; before
    `retract` it is where the step would land without. Read the value from the state with
    ``optax.tree.get(state, "drift")``.

    Args:
      every: measure in every k-th step only.
      mask: which leaves outside `Factors` are orthonormal, (..., n, r) by columns or
        (..., r, n) by rows; see `ssa_jax.transforms.selection`.

    Raises:
      ValueError: `every` below one; no params at update; a leaf that does not fit its label.

    References:
      Edelman, Arias & Smith, The geometry of algorithms with orthogonality constraints, 1998.

    >>> import jax.numpy as jnp
    >>> import optax
    >>> x = jnp.eye(3, 2)
    >>> monitor = orthogonality_drift(mask=True)
    >>> _, state = monitor.update(x, monitor.init(x), x)
    >>> print(optax.tree.get(state, "drift"))
    3.0
    """
    check_every(every, "measure")

    def init(params: optax.Params) -> DriftState:
        kinds_at_init("orthogonality_drift", params, mask)
        return DriftState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32))

    def update(
        updates: optax.Updates, state: DriftState, params: optax.Params
    ) -> tuple[optax.Updates, DriftState]:
        kinds = kinds_of(params, mask)
        count = optax.safe_increment(state.count)

        def error(kind: str, g: Array, x: Array) -> Array | None:
            if not is_matrix(kind):
                return None
            dtype = compute_dtype(g, x)
            # Rounded as `optax.apply_updates` rounds.
            y = (x + g).astype(x.dtype).astype(dtype)
            return linalg.orthogonality_error(y.mT if kind == ROWS else y).astype(jnp.float32)

        def measure() -> Array:
            errors = jax.tree.leaves(jax.tree.map(error, kinds, updates, params))
            return jnp.max(jnp.stack(errors)) if errors else jnp.zeros([], jnp.float32)

        def keep() -> Array:
            return linalg.varying_as(state.drift, *jax.tree.leaves((updates, params)))

        return updates, DriftState(count, when_due(count, every, measure, keep))

    return with_params(init, update)
