"""What this machine can do at most, for judging how much of it a program uses."""

import jax
import jax.numpy as jnp

from experiments.measure.timing import side_by_side


def rates(quick: bool) -> dict[str, float]:
    """Measured rates of float32 arithmetic and of memory.

    Args:
      quick: small arrays, to see that it runs.

    Returns:
      ``matmul_gflops``, of a square matrix product, two operations a multiply-accumulate;
      ``copy_gb_s``, bytes read and written by x + 1, over 10⁹. Both are of the fastest round:
      a bound, not a habit.
    """
    side, length = (256, 2**20) if quick else (2048, 2**26)
    a = jax.random.normal(jax.random.key(0), (side, side))
    x = jnp.zeros(length)
    product, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    times = side_by_side(
        [
            (lambda: None, lambda: jax.block_until_ready(product(a, a))),
            (lambda: None, lambda: jax.block_until_ready(copy(x))),
        ],
        rounds=3 if quick else 11,
        budget_s=60.0,
    )
    return {
        "matmul_gflops": round(2 * side**3 / times[0].min_ms / 1e6, 2),
        "copy_gb_s": round(2 * x.nbytes / times[1].min_ms / 1e6, 2),
    }


def share(macs: int, ms: float, matmul_gflops: float) -> float:
    """Which part of the rate of a matrix product a program reaches: 2 MACs/(time · rate)."""
    return 2 * macs / (ms * 1e6 * matmul_gflops)
