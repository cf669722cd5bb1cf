"""Flax NNX layers on low-rank factors, drop-in beside ``nnx.Linear`` and ``nnx.Conv``.

The rank is read from the arrays, so a layer whose factors were sliced needs no new module.
"""

from ssa_jax.layers.conv import SVDConv, kernel_pays
from ssa_jax.layers.dense import SVDDense, SVDLinearGeneral
from ssa_jax.layers.pooling import Pool, max_pool
from ssa_jax.layers.products import kernel_to_matrix, matrix_to_kernel, split_padding

__all__ = [
    "Pool",
    "SVDConv",
    "SVDDense",
    "SVDLinearGeneral",
    "kernel_pays",
    "kernel_to_matrix",
    "matrix_to_kernel",
    "max_pool",
    "split_padding",
]
