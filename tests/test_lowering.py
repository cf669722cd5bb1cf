"""The convolution and its gradients are those of lax, in every lowering and transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import first
from jax import lax

from ssa_jax.layers import lowering
from ssa_jax.training import costs

LATE = ((0, 2), (2, 0))


def reference(x, kernel, strides, padding):
    dims = lowering.DIMENSIONS
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=dims)


def arrays(maps, size, channels=(3, 4), batch=6, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed))
    x = jax.random.normal(keys[0], (batch, *maps, channels[0]), dtype)
    return x, jax.random.normal(keys[1], (*size, *channels), dtype)


def both(function, x, kernel, strides, padding):
    """Output and gradients at a fixed cotangent."""
    y, pullback = jax.vjp(lambda x, k: function(x, k, strides, padding), x, kernel)
    cotangent = jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    return y, *pullback(cotangent.astype(y.dtype))


def agree(ours, theirs, tolerance=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        assert np.abs(a - b).max(initial=0) <= tolerance * np.abs(b).max(initial=0)


CASES = [
    # maps, kernel size, strides, padding, channels
    ((1, 1), (3, 3), (1, 1), "SAME", (3, 4)),
    ((1, 1), (3, 1), (2, 1), ((1, 1), (0, 0)), (5, 2)),
    ((2, 2), (3, 3), (1, 1), "SAME", (4, 4)),
    ((2, 2), (3, 3), (2, 2), ((1, 1), (1, 1)), (3, 4)),
    ((2, 2), (1, 3), (1, 2), ((0, 0), (1, 1)), (5, 2)),
    ((4, 4), (3, 3), (2, 2), ((1, 1), (1, 1)), (5, 2)),
    ((5, 6), (3, 3), (1, 1), "VALID", (3, 4)),
    ((5, 6), (3, 3), (2, 2), "VALID", (5, 2)),
    ((7, 9), (3, 3), (2, 2), "SAME", (4, 4)),
    ((7, 9), (2, 4), (2, 3), LATE, (3, 4)),
    ((7, 9), (3, 3), (1, 1), LATE, (5, 2)),
    ((7, 9), (1, 1), (2, 2), "SAME", (4, 8)),
    ((7, 9), (3, 1), (1, 1), "SAME", (3, 9)),
    ((7, 9), (1, 3), (1, 2), "SAME", (9, 3)),
]


@pytest.mark.parametrize("chunk", first([4 * 2**20, 1], 1))
@pytest.mark.parametrize(("maps", "size", "strides", "padding", "channels"), CASES)
def test_output_and_gradients_are_those_of_lax(
    monkeypatch, maps, size, strides, padding, channels, chunk
):
    monkeypatch.setattr(lowering, "_CHUNK_BYTES", chunk)
    x, kernel = arrays(maps, size, channels)
    agree(*(jax.jit(lambda x, k, f=f: both(f, x, k, strides, padding))(x, kernel)
            for f in (lowering.conv, reference)))  # fmt: skip


@pytest.mark.parametrize("maps", [(2, 2), (6, 6)])
def test_half_precision_keeps_its_dtype(maps):
    x, kernel = arrays(maps, (3, 3), dtype=jnp.bfloat16)
    ours = both(lowering.conv, x, kernel, (1, 1), "SAME")
    exact = both(reference, *(a.astype(jnp.float32) for a in (x, kernel)), (1, 1), "SAME")
    assert all(a.dtype == jnp.bfloat16 for a in ours)
    agree(ours, [a.astype(jnp.bfloat16) for a in exact], tolerance=2e-2)


@pytest.mark.parametrize("maps", [(2, 2), (6, 6)])
def test_double_precision_is_kept_and_single_goes_to_it(monkeypatch, maps):
    monkeypatch.setattr(lowering, "_CHUNK_BYTES", 1)
    with jax.enable_x64(True):
        x, kernel = arrays(maps, (3, 3), dtype=jnp.float64)
        ours, theirs = (both(f, x, kernel, (1, 1), "SAME") for f in (lowering.conv, reference))
        assert all(a.dtype == jnp.float64 for a in ours)
        agree(ours, theirs, tolerance=1e-14)
        single = x.astype(jnp.float32)
        y = lowering.conv(single, kernel, (1, 1), "SAME")
        agree([y], [reference(single.astype(jnp.float64), kernel, (1, 1), "SAME")], 1e-14)


@pytest.mark.parametrize("maps", [(2, 2), (6, 6)])
def test_vmap_over_seeds_is_a_loop(maps):
    cases = [arrays(maps, (3, 3), seed=seed) for seed in range(3)]
    xs, kernels = (jnp.stack(a) for a in zip(*cases, strict=True))
    together = jax.jit(jax.vmap(lambda x, k: both(lowering.conv, x, k, (1, 1), "SAME")))
    looped = [both(reference, x, k, (1, 1), "SAME") for x, k in cases]
    agree(together(xs, kernels), [jnp.stack(a) for a in zip(*looped, strict=True)])
    # One input, stacked kernels.
    shared = jax.vmap(lambda k: both(lowering.conv, xs[0], k, (1, 1), "SAME"))(kernels)
    looped = [both(reference, xs[0], k, (1, 1), "SAME") for k in kernels]
    agree(shared, [jnp.stack(a) for a in zip(*looped, strict=True)])


def test_steps_in_a_scan_are_steps_in_a_loop():
    x, kernel = arrays((5, 5), (3, 3), (3, 3))

    def step(k, _):
        return k - 0.01 * both(lowering.conv, x, k, (1, 1), "SAME")[2], None

    looped = kernel
    for _ in range(3):
        looped = looped - 0.01 * both(reference, x, looped, (1, 1), "SAME")[2]
    agree([jax.lax.scan(step, kernel, length=3)[0]], [looped])


def test_the_kernel_gradient_holds_part_of_the_windows_at_a_time():
    x, kernel = arrays((32, 32), (3, 3), (32, 32), batch=32)
    gradient = jax.jit(lambda x, k: both(lowering.conv, x, k, (1, 1), "SAME")[2])
    memory = gradient.lower(x, kernel).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 9 * x.nbytes


@pytest.mark.parametrize("maps", [(2, 2), (6, 6)])
def test_multiply_accumulates_are_those_of_the_convolution(maps):
    x, kernel = arrays(maps, (3, 3))
    ours, theirs = (
        costs.macs(lambda x, k, f=f: f(x, k, (1, 1), "SAME"), x, kernel)
        for f in (lowering.conv, reference)
    )
    assert ours == theirs == 6 * maps[0] * maps[1] * 9 * 3 * 4


@pytest.mark.parametrize("maps", [(2, 2), (6, 6)])
def test_other_platforms_get_one_convolution_and_no_product(maps):
    x, kernel = arrays(maps, (3, 3))
    run = jax.jit(lambda x, k: lowering.conv(x, k, (1, 1), "SAME"))
    text = jax.export.export(run, platforms=["cuda"])(x, kernel).mlir_module()
    assert text.count("stablehlo.convolution") == 1
    assert "stablehlo.dot_general" not in text


OPTIONS = [
    {},
    {"kernel_dilation": 2},
    {"input_dilation": 2, "padding": 1},
    {"feature_group_count": 2},
    {"precision": "highest"},
    {"padding": "CIRCULAR"},
    {"strides": 2, "padding": ((0, 1), (1, 0))},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_flax_layers_take_it_with_every_option(options):
    def layer(**more):
        return nnx.Conv(4, 6, (3, 3), **options, **more, rngs=nnx.Rngs(0))

    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 4))
    agree([layer(conv_general_dilated=lowering.conv_general_dilated)(x)], [layer()(x)])


def test_arrays_that_do_not_fit_and_other_paddings_are_refused():
    x, kernel = arrays((4, 4), (3, 3))
    with pytest.raises((ValueError, TypeError), match="feature"):
        lowering.conv(x[..., :2], kernel, (1, 1), "SAME")
    with pytest.raises((ValueError, RuntimeError), match="padding"):
        lowering.conv(x, kernel, (1, 1), "ODD")
