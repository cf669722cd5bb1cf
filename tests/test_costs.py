import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

from ssa_jax import costs
from ssa_jax.forward import predict
from ssa_jax.models import MODELS
from ssa_jax.units import split_units


def model_macs(name, rank):
    units, params, mstate = split_units(MODELS[name]((32, 32, 3), 10, rank=rank, rngs=nnx.Rngs(0)))
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), "float32")
    return costs.macs(lambda p, x: predict(units, p, mstate, x), params, image)


def test_matrix_product_and_convolution():
    a, b = jnp.ones((3, 4, 5)), jnp.ones((3, 5, 6))
    assert costs.macs(lambda a, b: a @ b, a, b) == 3 * 4 * 5 * 6
    x, k = jnp.ones((2, 9, 9, 4)), jnp.ones((3, 3, 4, 8))

    def conv(x, k):
        return lax.conv_general_dilated(
            x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert costs.macs(conv, x, k) == 2 * 5 * 5 * 8 * 9 * 4
    # Nested programs count too.
    assert costs.macs(jax.jit(lambda x, k: conv(x, k) + 1), x, k) == 2 * 5 * 5 * 8 * 9 * 4


def test_smallconv_by_hand():
    convs = 32 * 32 * 27 * 32 + 16 * 16 * 288 * 64 + 8 * 8 * 576 * 128
    assert model_macs("smallconv", None) == convs + 2048 * 512 + 512 * 10


def test_factorised_pair_costs_its_rank():
    # r (kh C + kw N) a pixel, r = 0.5 min(kw N, kh C), but all of it in the first layer.
    pairs = 32 * 32 * 9 * (9 + 96) + 16 * 16 * 48 * (96 + 192) + 8 * 8 * 96 * (192 + 384)
    assert model_macs("smallconv", 0.5) == pairs + 256 * (2048 + 512) + 512 * 10


def test_the_compiler_agrees_where_no_tap_is_padding():
    x, k, w = jnp.ones((2, 9, 9, 4)), jnp.ones((3, 3, 4, 8)), jnp.ones((8, 5))

    def fn(x, k, w):
        dims = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, k, (1, 1), "VALID", dimension_numbers=dims) @ w

    flops = jax.jit(fn).lower(x, k, w).compile().cost_analysis()["flops"]
    assert 2 * costs.macs(fn, x, k, w) == pytest.approx(flops, rel=1e-3)


def test_parameters():
    assert costs.parameters({"a": jnp.ones((2, 3)), "b": [jnp.ones(4)]}) == 10
