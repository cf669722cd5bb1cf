"""Does a factorised convolution pay better as two convolutions, as products, or merged?

    python -m benchmarks.pair [--quick] [--json FILE] [--notes TEXT]

For 3x3 convolutions of the models at batch 128, at three ranks: two convolutions, the vertical one
of V and s and the horizontal one of U; the same as two matrix products of unfolded windows, s
between them; and one convolution with the kernel that the factors make. `SVDConv` runs the first
or the last, by `kernel_pays`. Passes: forward; local, which is the output and the gradients of U,
s and V.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.programs import Row, compare, main
from ssa_jax import factors
from ssa_jax.factors import Factors
from ssa_jax.layers import lowering, matrix_to_kernel

Array = jax.Array

BATCH = 128
RANKS = (0.5, 0.25, 0.125)


class Shape(NamedTuple):
    """Side of the square maps, input and output channels of a 3x3 convolution of stride one."""

    side: int
    c_in: int
    c_out: int

    def __str__(self) -> str:
        return f"3x3, {self.c_in} to {self.c_out} on {self.side}x{self.side}"


SHAPES = (
    Shape(32, 64, 64), Shape(16, 128, 128), Shape(8, 256, 256), Shape(4, 512, 512),
    Shape(2, 512, 512), Shape(32, 16, 16), Shape(16, 32, 32), Shape(8, 64, 64),
)  # fmt: skip

_ONE = (1, 1)
_DOWN = ((1, 1), (0, 0))
_ACROSS = ((0, 0), (1, 1))


def _kernels(w: Factors) -> tuple[Array, Array]:
    rank = w.s.shape[0]
    return w.v.reshape(3, 1, -1, rank), w.u.reshape(1, 3, -1, rank).swapaxes(2, 3)


def convolutions(w: Factors, x: Array) -> Array:
    """As `SVDConv` below the rank from which its kernel pays."""
    down, across = _kernels(w)
    y = lowering.conv(x, down * w.s.reshape(1, 1, 1, -1), _ONE, _DOWN)
    return lowering.conv(y, across, _ONE, _ACROSS)


def products(w: Factors, x: Array) -> Array:
    """Windows times V, times s, windows of that times U."""
    down, across = _kernels(w)
    y = lowering.product(_ONE, _DOWN, x, down) * w.s.reshape(1, 1, 1, -1)
    return lowering.product(_ONE, _ACROSS, y, across)


def merged(w: Factors, x: Array) -> Array:
    """One convolution with K."""
    kernel = matrix_to_kernel(factors.to_dense(w), (3, 3))
    return lowering.conv(x, kernel, _ONE, ((1, 1), (1, 1)))


FORMS: dict[str, Callable[[Factors, Array], Array]] = {
    "two convolutions": convolutions,
    "products": products,
    "merged": merged,
}


def local(form: Callable[[Factors, Array], Array]) -> Callable[[Factors, Array, Array], Any]:
    """The output, and the gradient of the factors at a cotangent."""

    def run(w: Factors, x: Array, g: Array) -> Any:
        y, pullback = jax.vjp(lambda w: form(w, x), w)
        return y, pullback(g)

    return run


def measure(shape: Shape, fraction: float, batch: int, rounds: int) -> list[Row]:
    """The rows of one convolution at one rank."""
    keys = jax.random.split(jax.random.key(0), 3)
    kernel = jax.random.normal(keys[0], (3 * shape.c_out, 3 * shape.c_in))
    rank = factors.rank_of(fraction, *kernel.shape)
    w = factors.from_dense(kernel, rank, keys[1])
    x = jax.random.normal(keys[2], (batch, shape.side, shape.side, shape.c_in))
    passes = {
        "forward": (FORMS, (w, x)),
        "local": (
            {name: local(form) for name, form in FORMS.items()},
            (w, x, jnp.ones((*x.shape[:3], shape.c_out))),
        ),
    }
    return [
        {"shape": str(shape), "batch": batch, "rank": fraction, "pass": name, **row}
        for name, (functions, arguments) in passes.items()
        for row in compare(functions, arguments, rounds, "form", "ratio_to_convolutions")
    ]


def rows(quick: bool) -> Iterator[list[Row]]:
    """Of one convolution and rank after the other."""
    if quick:
        yield measure(Shape(4, 8, 8), 0.5, batch=4, rounds=3)
        return
    for shape in SHAPES:
        for fraction in RANKS:
            yield measure(shape, fraction, BATCH, rounds=9)


if __name__ == "__main__":
    main(__doc__, rows)
