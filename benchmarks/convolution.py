"""Which lowering of a convolution is fast on this device?

    python -m benchmarks.convolution [--quick] [--json FILE] [--notes TEXT]

For the 3x3 convolutions of the models at batch 128, and the factor pairs at three ranks: XLA's
own, what `ssa_jax.layers.lowering.conv` chooses, and the matrix products that it chooses from.
Passes: forward; kernel gradient; both, which is the output and both gradients. All lowerings of
a pass are timed side by side in one process, compilation excluded.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.programs import Row, compare, main
from ssa_jax import factors
from ssa_jax.layers import lowering

Array = jax.Array
Lowering = Callable[[Array, Array, Array], Any]

BATCH = 128
RANKS = (0.5, 0.25, 0.125)
# Side of the input maps, input and output channels, stride.
DENSE = {
    "vgg13": (
        (32, 3, 64, 1), (32, 64, 64, 1), (16, 64, 128, 1), (16, 128, 128, 1), (8, 128, 256, 1),
        (8, 256, 256, 1), (4, 256, 512, 1), (4, 512, 512, 1), (2, 512, 512, 1),
    ),
    "resnet32": (
        (32, 3, 16, 1), (32, 16, 16, 1), (32, 16, 32, 2), (16, 32, 32, 1), (16, 32, 64, 2),
        (8, 64, 64, 1),
    ),
    "smallconv": ((32, 3, 32, 1), (16, 32, 64, 1), (8, 64, 128, 1)),
}  # fmt: skip


class Shape(NamedTuple):
    """Maps (height, width), kernel (kh, kw, C, N) and strides of one convolution."""

    maps: tuple[int, int]
    kernel: tuple[int, int, int, int]
    strides: tuple[int, int]

    def __str__(self) -> str:
        kh, kw, c, n = self.kernel
        stride = "" if self.strides == (1, 1) else f", stride {self.strides[0]}x{self.strides[1]}"
        return f"{kh}x{kw}, {c} to {n} on {self.maps[0]}x{self.maps[1]}{stride}"


QUICK = (Shape((2, 2), (3, 3, 8, 8), (1, 1)), Shape((8, 8), (3, 1, 8, 4), (1, 1)))


def shapes() -> list[Shape]:
    """Every convolution of the models once, dense and as pairs."""
    found: dict[Shape, None] = {}
    for side, c, n, s in (shape for model in DENSE.values() for shape in model):
        found[Shape((side, side), (3, 3, c, n), (s, s))] = None
        for fraction in RANKS:
            rank = factors.rank_of(fraction, 3 * n, 3 * c)
            found[Shape((side, side), (3, 1, c, rank), (s, 1))] = None
            found[Shape((side // s, side), (1, 3, rank, n), (1, s))] = None
    return list(found)


def lowerings(shape: Shape) -> dict[str, dict[str, Lowering]]:
    """Functions of (x, kernel, cotangent) by pass and name, XLA's own first."""
    kh, kw, *_ = shape.kernel
    pads = ((kh // 2, kh // 2), (kw // 2, kw // 2))
    whole = functools.partial(lowering.by_xla, shape.strides, pads)

    def chosen(x: Array, kernel: Array) -> Array:
        return lowering.conv(x, kernel, shape.strides, pads)

    def both(f: Callable[[Array, Array], Array]) -> Lowering:
        def run(x: Array, kernel: Array, g: Array) -> Any:
            y, pullback = jax.vjp(f, x, kernel)
            return y, pullback(g)

        return run

    def gradient(f: Callable[[Array, Array], Array]) -> Lowering:
        return lambda x, kernel, g: jax.vjp(functools.partial(f, x), kernel)[1](g)

    def product(f: Callable[..., Array]) -> Lowering:
        return lambda x, kernel, g: f(shape.strides, pads, shape.kernel, x, g)

    return {
        "forward": {
            "lax": lambda x, kernel, g: whole(x, kernel),
            "chosen": lambda x, kernel, g: chosen(x, kernel),
            "product": lambda x, kernel, g: lowering.product(shape.strides, pads, x, kernel),
        },
        "kernel gradient": {
            "lax": gradient(whole),
            "chosen": gradient(chosen),
            "windows of x": product(lowering.gradient_from_x),
            "windows of g": product(lowering.gradient_from_g),
        },
        "both": {"lax": both(whole), "chosen": both(chosen)},
    }


def measure(shape: Shape, batch: int, rounds: int) -> list[Row]:
    """The rows of one convolution."""
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (batch, *shape.maps, shape.kernel[2]))
    kernel = jax.random.normal(keys[1], shape.kernel)
    passes = lowerings(shape)
    out = jax.eval_shape(passes["forward"]["lax"], x, kernel, x)
    arguments = (x, kernel, jnp.ones(out.shape))
    return [
        {"shape": str(shape), "batch": batch, "pass": name, **row}
        for name, functions in passes.items()
        for row in compare(functions, arguments, rounds, "lowering", "ratio_to_lax")
    ]


def rows(quick: bool) -> Iterator[list[Row]]:
    """Of one convolution after the other."""
    for shape in QUICK if quick else shapes():
        yield measure(shape, 8 if quick else BATCH, rounds=3 if quick else 9)


if __name__ == "__main__":
    main(__doc__, rows)
