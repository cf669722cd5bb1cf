"""Which lowering of a convolution is fast on this device?

    python -m benchmarks.convolution [--depthwise] [--quick] [--json FILE] [--notes TEXT]

For the 3x3 convolutions of the models at batch 128, and the factor pairs at three ranks: XLA's
own, what `ssa_jax.layers.lowering.conv` chooses, and the matrix products that it chooses from.
Passes: forward; kernel gradient; both, which is the output and both gradients. All lowerings of
a pass are timed side by side in one process, compilation excluded. With `--depthwise`: those of
MobileNetV2 on images of 32 pixels, and 5x5 ones of the same maps.
"""

import argparse
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
# Side of the input maps, channels, stride.
DEPTHWISE = (
    (32, 32, 1), (32, 96, 1), (32, 144, 2), (16, 192, 1), (16, 192, 2), (8, 384, 1), (8, 576, 2),
    (4, 960, 1),
)  # fmt: skip


class Shape(NamedTuple):
    """Maps (height, width), kernel (kh, kw, C, N), strides and groups of one convolution."""

    maps: tuple[int, int]
    kernel: tuple[int, int, int, int]
    strides: tuple[int, int]
    groups: int = 1

    def __str__(self) -> str:
        kh, kw, c, n = self.kernel
        c *= self.groups
        stride = "" if self.strides == (1, 1) else f", stride {self.strides[0]}x{self.strides[1]}"
        kind = "depthwise, " if self.groups > 1 else ""
        return f"{kind}{kh}x{kw}, {c} to {n} on {self.maps[0]}x{self.maps[1]}{stride}"


QUICK = (
    Shape((2, 2), (3, 3, 8, 8), (1, 1)),
    Shape((8, 8), (3, 1, 8, 4), (1, 1)),
    Shape((8, 8), (3, 3, 1, 8), (2, 2), groups=8),
)


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


def depthwise_shapes() -> list[Shape]:
    """Depthwise convolutions of both sizes."""
    return [
        Shape((side, side), (size, size, 1, c), (s, s), groups=c)
        for size in (3, 5)
        for side, c, s in DEPTHWISE
    ]


def lowerings(shape: Shape) -> dict[str, dict[str, Lowering]]:
    """Functions of (x, kernel, cotangent) by pass and name, XLA's own first."""
    kh, kw, *_ = shape.kernel
    pads = ((kh // 2, kh // 2), (kw // 2, kw // 2))
    options: dict[str, Any] = {
        "dimension_numbers": lowering.DIMENSIONS, "feature_group_count": shape.groups,
    }  # fmt: skip

    def whole(x: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(x, kernel, shape.strides, pads, **options)

    def chosen(x: Array, kernel: Array) -> Array:
        return lowering.conv_general_dilated(x, kernel, shape.strides, pads, **options)

    def both(f: Callable[[Array, Array], Array]) -> Lowering:
        def run(x: Array, kernel: Array, g: Array) -> Any:
            y, pullback = jax.vjp(f, x, kernel)
            return y, pullback(g)

        return run

    def gradient(f: Callable[[Array, Array], Array]) -> Lowering:
        return lambda x, kernel, g: jax.vjp(functools.partial(f, x), kernel)[1](g)

    def product(f: Callable[..., Array]) -> Lowering:
        return lambda x, kernel, g: f(shape.strides, pads, shape.kernel, x, g)

    passes: dict[str, dict[str, Lowering]] = {
        "forward": {
            "lax": lambda x, kernel, g: whole(x, kernel),
            "chosen": lambda x, kernel, g: chosen(x, kernel),
        },
        "kernel gradient": {"lax": gradient(whole), "chosen": gradient(chosen)},
        "both": {"lax": both(whole), "chosen": both(chosen)},
    }
    if shape.groups == 1:
        passes["forward"]["product"] = lambda x, kernel, g: lowering.product(
            shape.strides, pads, x, kernel
        )
        passes["kernel gradient"] |= {
            "windows of x": product(lowering.gradient_from_x),
            "windows of g": product(lowering.gradient_from_g),
        }
    return passes


def measure(shape: Shape, batch: int, rounds: int) -> list[Row]:
    """The rows of one convolution."""
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (batch, *shape.maps, shape.kernel[2] * shape.groups))
    kernel = jax.random.normal(keys[1], shape.kernel)
    passes = lowerings(shape)
    out = jax.eval_shape(passes["forward"]["lax"], x, kernel, x)
    arguments = (x, kernel, jnp.ones(out.shape))
    return [
        {"shape": str(shape), "batch": batch, "pass": name, **row}
        for name, functions in passes.items()
        for row in compare(functions, arguments, rounds, "lowering", "ratio_to_lax")
    ]


def rows(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Of one convolution after the other."""
    of_models = depthwise_shapes() if args.depthwise else shapes()
    for shape in QUICK if args.quick else of_models:
        yield measure(shape, 8 if args.quick else BATCH, rounds=3 if args.quick else 9)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that other benchmarks do not have."""
    parser.add_argument("--depthwise", action="store_true", help="as many groups as channels")


if __name__ == "__main__":
    main(__doc__, rows, add_flags)
