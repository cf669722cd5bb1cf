"""Batch norm by groups of a batch."""

import jax
import jax.numpy as jnp
from flax import nnx

from ssa_jax.factors.linalg import devices_that_share

Array = jax.Array


class BatchNorm(nnx.BatchNorm):
    """Batch norm that can take the moments of groups of a batch instead of the whole one.

    Of a batch whose rows are spread over as many devices each has a group, and none waits for
    another. Running statistics follow the mean over the groups.

    Source: Hoffer, Hubara and Soudry 2017, ghost batch normalisation.

    Attributes:
      groups: of neighbouring rows; a batch that they do not divide is one group.
      by_device: in place of `groups` the rows of each device that the batch is spread over.
    """

    groups = 1
    by_device = False

    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        """Normalises x (batch, ..., features)."""
        stored = self.use_running_average if use_running_average is None else use_running_average
        groups = devices_that_share() if self.by_device else self.groups
        if stored or groups == 1 or len(x) % groups:
            return super().__call__(x, use_running_average, mask=mask)

        def alone(rows: Array) -> tuple[Array, Array, Array]:
            norm = nnx.clone(self)
            y = nnx.BatchNorm.__call__(norm, rows, use_running_average=False)
            return y, norm.mean.get_value(), norm.var.get_value()

        y, mean, var = jax.vmap(alone)(x.reshape(groups, -1, *x.shape[1:]))
        self.mean.set_value(jnp.mean(mean, axis=0))
        self.var.set_value(jnp.mean(var, axis=0))
        return y.reshape(x.shape)
