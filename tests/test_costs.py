import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from helpers import CLASSES, apart, make_batch, make_method, split
from jax import lax

from ssa_jax import factors, transforms
from ssa_jax.factors import linalg
from ssa_jax.models import MODELS
from ssa_jax.networks.forward import predict
from ssa_jax.training import costs
from ssa_jax.training.losses import LossWeights
from ssa_jax.training.train import init_state, make_step


def model_macs(name, rank):
    units, params, mstate = apart(
        MODELS[name]((32, 32, 3), 10, rank=rank, rngs=nnx.Rngs(0)), (32, 32, 3)
    )
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


def test_zeros_that_bring_matrices_to_one_shape_count_where_they_are():
    """On accelerators: here every matrix is multiplied as it is."""

    def of(*shapes):
        given = [factors.from_dense(jnp.ones((m, n)), r) for m, n, r in shapes]
        chain = transforms.ssa(1e-3)
        return costs.macs(chain.update, given, chain.init(given), given)

    alone = of((12, 20, 4)) + of((30, 16, 5))
    assert of((12, 20, 4), (30, 16, 5)) == alone
    with linalg.traced_for("cuda"):
        assert of((12, 20, 4), (30, 16, 5)) > alone


def test_the_compiler_agrees_where_no_tap_is_padding():
    x, k, w = jnp.ones((2, 9, 9, 4)), jnp.ones((3, 3, 4, 8)), jnp.ones((8, 5))

    def fn(x, k, w):
        dims = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, k, (1, 1), "VALID", dimension_numbers=dims) @ w

    flops = jax.jit(fn).lower(x, k, w).compile().cost_analysis()["flops"]
    assert 2 * costs.macs(fn, x, k, w) == pytest.approx(flops, rel=1e-3)


def test_parameters():
    assert costs.parameters({"a": jnp.ones((2, 3)), "b": [jnp.ones(4)]}) == 10


def test_what_no_result_needs_and_what_repeats_is_not_counted():
    a, b = jnp.ones((3, 4)), jnp.ones((4, 5))
    assert costs.macs(lambda a, b: (a @ b, a.T @ a)[0], a, b) == 3 * 4 * 5
    assert costs.macs(lambda a, b: a @ b + a @ b, a, b) == 3 * 4 * 5
    # Of a nested program too.
    nested = jax.jit(lambda a, b: (a @ b, a.T @ a))
    assert costs.macs(lambda a, b: nested(a, b)[0], a, b) == 3 * 4 * 5


def test_a_scan_counts_every_turn_and_a_conditional_its_costliest_branch():
    a = jnp.ones((4, 4))
    assert costs.macs(lambda a: lax.scan(lambda x, _: (x @ a, None), a, None, 7)[0], a) == 7 * 64
    branches = (lambda a: a, lambda a: a @ a @ a)
    assert costs.macs(lambda a: lax.cond(a[0, 0] > 0, *branches, a), a) == 2 * 64


def test_zeros_of_a_strided_gradient_are_no_work():
    x, k = jnp.ones((2, 8, 8, 4)), jnp.ones((2, 2, 4, 6))

    def conv(x):
        return lax.conv_general_dilated(
            x, k, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    forward = 2 * 4 * 4 * 6 * 16
    assert costs.macs(conv, x) == forward
    assert costs.macs(lambda x, g: jax.vjp(conv, x)[1](g), x, jnp.ones((2, 4, 4, 6))) == forward


def costs_of(name, network="conv", rank=None, batch=8):
    units, params, mstate = split(network, rank)
    method = make_method(name, units, params, mstate)
    optimizer = optax.adam(1e-3)
    state = init_state(method, optimizer, params, mstate, jax.random.key(0))
    args = units, method, optimizer, LossWeights(), state, make_batch(batch)
    return costs.step_costs(*args), args


def test_costs_of_a_step_of_dense_layers():
    shapes = [(3, 3, 6), (2, 2, 8), (7,), (CLASSES,)]
    forward = [8 * 36 * 18 * 6, 8 * 4 * 54 * 8, 8 * 32 * 7, 8 * 7 * CLASSES]
    bp, dfa = costs_of("bp")[0], costs_of("dfa")[0]
    assert [r.forward for r in bp] == forward == [r.update for r in bp]
    # A unit's signal is pulled back through the unit after it; a direct one is sent from e.
    assert [r.signal for r in bp[1:]] == [*forward[2:], 0]
    sizes = [h * w * c for h, w, c in shapes[:2]] + [7]
    assert [r.signal for r in dfa] == [8 * CLASSES * n for n in sizes] + [0]
    assert [r.update for r in dfa] == forward
    for row in bp:
        assert row.optimizer == 0
        assert row.optimizer_bytes == 2 * 4 * row.params
    # The hidden dense layer keeps its input, and of the activation something of its output.
    assert 8 * 32 * 4 < dfa[2].activation_bytes <= 8 * (32 + 2 * 7) * 4
    assert all(a.activation_bytes <= b.activation_bytes for a, b in zip(dfa, bp, strict=True))


@pytest.mark.parametrize(
    "name", ["bp", "ssa", *(pytest.param(n, marks=pytest.mark.long) for n in ("fa", "dfa"))]
)
def test_units_of_a_step_add_up_to_what_the_compiler_counts(name):
    units, params, mstate = apart(
        MODELS["mlp"]((8, 8, 3), 10, rank=0.5, rngs=nnx.Rngs(0), hidden=(256, 256)), (8, 8, 3)
    )
    method = make_method(name, units, params, mstate, shape=(8, 8, 3))
    optimizer = optax.sgd(1e-3)
    state = init_state(method, optimizer, params, mstate, jax.random.key(0))
    batch = make_batch(64, shape=(8, 8, 3), classes=10)
    rows = costs.step_costs(units, method, optimizer, LossWeights(), state, batch)
    ours = sum(r.forward + r.signal + r.update + r.optimizer for r in rows)
    program = make_step(units, method, optimizer, LossWeights()).lower(state, batch).compile()
    assert 2 * ours == pytest.approx(program.cost_analysis()["flops"], rel=0.06)
