"""Truncated singular value decompositions."""

import jax
import jax.numpy as jnp

Array = jax.Array

# Above this many entries `truncated_svd` uses the randomised range finder.
EXACT_SVD_LIMIT = 512 * 512


def randomized_svd(
    w: Array, rank: int, key: Array, *, oversampling: int = 10, power_iterations: int = 2
) -> tuple[Array, Array, Array]:
    """Randomised truncated SVD (Halko, Martinsson & Tropp 2011, algorithms 4.4 and 5.1).

    Args:
      w: (m, n) float.
      rank: number of singular triplets, 1 <= rank <= min(m, n).
      key: PRNG key of the Gaussian test matrix.
      oversampling: extra columns of the test matrix.
      power_iterations: subspace iterations, each with a QR on both sides.

    Returns:
      u (m, rank), s (rank,) descending, v (n, rank) with w ≈ u diag(s) vᵀ.
    """
    width = min(rank + oversampling, min(w.shape))
    q = jnp.linalg.qr(w @ jax.random.normal(key, (w.shape[1], width), w.dtype))[0]
    for _ in range(power_iterations):
        q = jnp.linalg.qr(w @ jnp.linalg.qr(w.T @ q)[0])[0]
    u, s, vt = jnp.linalg.svd(q.T @ w, full_matrices=False)
    return q @ u[:, :rank], s[:rank], vt[:rank].T


def truncated_svd(w: Array, rank: int, key: Array | None = None) -> tuple[Array, Array, Array]:
    """Leading singular triplets of w: exact for small matrices, randomised for large ones.

    Args:
      w: (m, n) float.
      rank: 1 <= rank <= min(m, n).
      key: PRNG key, needed above `EXACT_SVD_LIMIT` entries when rank < min(m, n).

    Returns:
      u (m, rank), s (rank,) descending, v (n, rank).

    Raises:
      ValueError: w is no matrix, the rank does not fit, or a needed key is missing.
    """
    if w.ndim != 2 or not 1 <= rank <= min(w.shape):
        raise ValueError(f"rank {rank} does not fit a matrix of shape {w.shape}")
    if w.size > EXACT_SVD_LIMIT and rank < min(w.shape):
        if key is None:
            raise ValueError(f"a matrix of shape {w.shape} needs a PRNG key for its SVD")
        return randomized_svd(w, rank, key)
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank].T
