"""The depthwise convolution and its gradients are those of lax, in every precision."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax
from test_lowering import LATE, agree, arrays, both

from ssa_jax.layers import lowering
from ssa_jax.training import costs


def ours(x, kernel, strides, padding):
    return lowering.conv_general_dilated(
        x, kernel, strides, padding,
        dimension_numbers=lowering.DIMENSIONS, feature_group_count=x.shape[-1],
    )  # fmt: skip


def reference(x, kernel, strides, padding):
    return lax.conv_general_dilated(
        x, kernel, strides, padding,
        dimension_numbers=lowering.DIMENSIONS, feature_group_count=x.shape[-1],
    )  # fmt: skip


def of(maps, size, channels=5, **options):
    x, kernel = arrays(maps, size, (channels, channels), **options)
    return x, kernel[:, :, :1]


CASES = [
    ((1, 1), (3, 3), (1, 1), "SAME"),
    ((2, 2), (5, 5), (1, 1), "SAME"),
    ((7, 9), (3, 3), (2, 2), "SAME"),
    ((8, 8), (5, 5), (2, 2), ((2, 2), (2, 2))),
    ((7, 9), (2, 4), (2, 3), LATE),
    ((5, 6), (3, 3), (1, 1), "VALID"),
    ((7, 9), (1, 3), (1, 2), "SAME"),
]


@pytest.mark.parametrize(("maps", "size", "strides", "padding"), CASES)
def test_output_and_gradients_are_those_of_lax(maps, size, strides, padding):
    x, kernel = of(maps, size)
    agree(*(jax.jit(lambda x, k, f=f: both(f, x, k, strides, padding))(x, kernel)
            for f in (ours, reference)))  # fmt: skip


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 1e-2), ("float64", 1e-14)])
def test_other_precisions_are_kept(dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        x, kernel = of((6, 6), (3, 3), dtype=dtype)
        exact = both(
            reference, *(a.astype(jnp.promote_types(dtype, "float32")) for a in (x, kernel)),
            (1, 1), "SAME",
        )  # fmt: skip
        agree(both(ours, x, kernel, (1, 1), "SAME"), [a.astype(dtype) for a in exact], tolerance)


def test_vmap_over_seeds_is_a_loop():
    cases = [of((6, 6), (3, 3), seed=seed) for seed in range(3)]
    together = jax.vmap(lambda x, k: both(ours, x, k, (1, 1), "SAME"))
    looped = [both(reference, x, k, (1, 1), "SAME") for x, k in cases]
    agree(
        together(*(jnp.stack(a) for a in zip(*cases, strict=True))),
        [jnp.stack(a) for a in zip(*looped, strict=True)],
    )


def test_a_cpu_gets_no_convolution_and_other_platforms_one():
    x, kernel = of((6, 6), (3, 3))
    run = jax.jit(lambda x, k: both(ours, x, k, (1, 1), "SAME"))

    def convolutions(platform):
        text = run.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        return text.count("stablehlo.convolution")

    assert convolutions("cpu") == 0
    assert convolutions("cuda") == convolutions("tpu") == 3


def test_multiply_accumulates_are_those_of_the_convolution():
    x, kernel = of((6, 6), (3, 3))
    macs = [costs.macs(lambda x, k, f=f: f(x, k, (1, 1), "SAME"), x, kernel)
            for f in (ours, reference)]  # fmt: skip
    assert macs == [6 * 6 * 6 * 9 * 5] * 2


@pytest.mark.parametrize(
    "options", [{}, {"strides": 2}, {"kernel_dilation": 2}, {"padding": "CIRCULAR"}]
)
def test_flax_layers_take_it_with_every_option(options):
    def layer(**more):
        return nnx.Conv(4, 4, (3, 3), feature_group_count=4, **options, **more, rngs=nnx.Rngs(0))

    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 4))
    agree([layer(conv_general_dilated=lowering.conv_general_dilated)(x)], [layer()(x)])
