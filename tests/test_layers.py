import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import first

from ssa_jax import cut, factors, layers
from ssa_jax.factors import Factors, linalg
from ssa_jax.layers import Pool, SVDConv, SVDDense, lowering, matrix_to_kernel, products
from ssa_jax.networks.forward import predict
from ssa_jax.networks.models import split
from ssa_jax.training import costs


def images(seed=0, shape=(3, 9, 8, 4)):
    return jax.random.normal(jax.random.key(seed), shape)


def convolutions(conv, x):
    """How many convolutions a layer runs: that of its kernel, or those of its pair."""
    graph, state = nnx.split(conv)
    return str(jax.make_jaxpr(lambda s, x: nnx.merge(graph, s)(x))(state, x)).count("name=_conv\n")


@pytest.mark.parametrize(
    ("size", "strides", "padding"),
    [
        *[((3, 3), strides, "SAME") for strides in (1, 2, (1, 2), (3, 1))],
        *[((3, 3), (2, 1), padding) for padding in ("VALID", 1, ((0, 2), (1, 0)), (2, (1, 1)))],
        ((1, 1), 2, "SAME"),
        ((2, 3), 1, "VALID"),
        ((5, 2), (1, 2), "SAME"),
    ],
)
@pytest.mark.parametrize(
    ("rank", "training", "forms"),
    first([(1.0, True, 1), (0.2, False, 2)], 1),
)
def test_conv_equals_the_dense_convolution_by_its_matrix(
    size, strides, padding, rank, training, forms
):
    conv = SVDConv(4, 6, size, strides=strides, padding=padding, rank=rank, rngs=nnx.Rngs(1))
    conv.set_attributes(deterministic=not training)
    kernel = layers.matrix_to_kernel(factors.to_dense(conv.kernel.get_value()), size)
    dense = nnx.Conv(4, 6, size, strides=strides, padding=padding, rngs=nnx.Rngs(0))
    dense.kernel = nnx.Param(kernel)
    conv.bias = nnx.Param(jnp.arange(6.0))
    dense.bias = nnx.Param(jnp.arange(6.0))
    x = images()
    assert convolutions(conv, x) == forms
    assert conv(x).shape == dense(x).shape
    assert jnp.allclose(conv(x), dense(x), atol=2e-5)


def local_pass(conv, pays, monkeypatch):
    """(factors, x, g) -> output and gradients of the factors, in one of both forms."""

    def run(weights, x, g):
        monkeypatch.setattr(layers.conv, "kernel_pays", lambda *args: pays)
        graph, state = nnx.split(conv)
        state["kernel"] = state["kernel"].replace(weights)
        y, pullback = jax.vjp(
            lambda w: nnx.merge(graph, nnx.State({**state, "kernel": nnx.Param(w)}))(x), weights
        )
        return y, pullback(g)[0]

    return run


def moved(conv, pays, monkeypatch, *args):
    """Entries of maps that the convolutions of `local_pass` read and write."""
    sizes = []

    def recorded(x, *rest, **options):
        y = lowering.conv_general_dilated(x, *rest, **options)
        sizes.append(x.size + y.size)
        return y

    with monkeypatch.context() as patch:
        patch.setattr(layers.conv, "conv", recorded)
        patch.setattr(layers.products, "conv_general_dilated", recorded)
        jax.eval_shape(local_pass(conv, pays, patch), *args)
    # Each goes forward and has a gradient of its kernel, and all but the first one of their input.
    return 3 * sum(sizes) - sizes[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels", "shape", "strides", "rank"),
    [
        *itertools.product([16], [(8, 8, 8, 12)], [1, 2, (1, 2)], [0.1, 0.2, 0.25]),
        *itertools.product([16], [(2, 4, 4, 12)], [1], [0.4, 0.54]),
        *itertools.product([64], [(8, 8, 8, 64)], [1], [0.3, 0.5]),
    ],
)
def test_a_convolution_runs_the_form_of_less_work(channels, shape, rank, strides, monkeypatch):
    conv = SVDConv(
        shape[-1], channels, 3, rank=rank, strides=strides, use_bias=False, rngs=nnx.Rngs(0)
    )
    x, weights = images(shape=shape), conv.kernel.get_value()
    pays = layers.kernel_pays(weights, x.shape, conv.kernel_size, conv.strides)
    g = images(1, conv(x).shape)
    kernel, pair = (
        costs.macs(local_pass(conv, form, monkeypatch), weights, x, g)
        + layers.conv.macs_per_float() * moved(conv, form, monkeypatch, weights, x, g)
        for form in (True, False)
    )
    assert pays == (kernel < pair)
    found, expected = (local_pass(conv, f, monkeypatch)(weights, x, g) for f in (True, False))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert jnp.allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
    ("channels", "on_cpu", "on_accelerator"),
    [(16, True, True), (64, False, True), (128, False, True), (512, False, False)],
)
def test_an_accelerator_takes_the_kernel_up_to_more_channels(channels, on_cpu, on_accelerator):
    """There reading a map costs ten times the arithmetic that it costs on a CPU."""
    rank = 3 * channels // 4
    weights = Factors(
        *(jax.ShapeDtypeStruct(s, jnp.float32) for s in
          ((3 * channels, rank), (rank,), (3 * channels, rank)))
    )  # fmt: skip
    shape = (128, 16, 16, channels)

    def pays():
        return layers.kernel_pays(weights, shape, (3, 3), (1, 1))

    assert pays() == on_cpu
    for platform in ("cuda", "tpu"):
        with linalg.traced_for(platform):
            assert pays() == on_accelerator
    assert pays() == on_cpu


def test_what_was_traced_for_another_platform_is_traced_anew():
    """Also what a network keeps of its own tracing."""

    class Model(nnx.Module):
        def __init__(self):
            self.conv = SVDConv(64, 64, 3, rank=0.25, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return cut(self.conv(x)) + 1

    x = jnp.zeros((128, 16, 16, 64))
    units, params, mstate = split(Model(), x[:1])[:3]
    run = jax.jit(lambda x: predict(units, params, mstate, x, train=True))

    def convolutions():
        return run.lower(x).as_text().count("stablehlo.convolution")

    assert convolutions() == 2
    with linalg.traced_for("cuda"):
        assert convolutions() == 1
    assert convolutions() == 2


def test_in_evaluation_on_a_mesh_and_in_less_than_float32_no_kernel_is_put_together():
    conv = SVDConv(4, 6, 3, rngs=nnx.Rngs(0))
    assert convolutions(conv, images()) == 1
    conv.eval()
    assert convolutions(conv, images()) == 2
    conv.train()
    x = images()
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("devices",))):
        assert convolutions(conv, x) == 2
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), conv.kernel.get_value())
    conv.kernel = nnx.Param(half)
    assert convolutions(conv, images().astype(jnp.bfloat16)) == 2


def test_kernel_and_matrix_are_inverse_and_indexed_as_documented():
    kernel = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    matrix = layers.kernel_to_matrix(kernel)
    assert matrix.shape == (3 * 5, 2 * 4)
    assert matrix[2 * 5 + 4, 1 * 4 + 3] == kernel[1, 2, 3, 4]
    assert jnp.array_equal(layers.matrix_to_kernel(matrix, (2, 3)), kernel)


def test_dense_equals_its_matrix_on_any_leading_axes():
    dense = SVDDense(5, 3, rank=0.67, rngs=nnx.Rngs(0))
    dense.bias = nnx.Param(jnp.arange(3.0))
    x = jax.random.normal(jax.random.key(1), (2, 4, 5))
    w = factors.to_dense(dense.kernel.get_value())
    assert dense.kernel.get_value().rank == 2
    assert jnp.allclose(dense(x), jnp.einsum("abi,oi->abo", x, w) + jnp.arange(3.0)[None, None, :],
                        atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("rows", [4, 40])
def test_a_dense_layer_and_its_gradients_are_those_of_its_matrix_at_any_number_of_rows(rows):
    dense = SVDDense(20, 7, rank=0.5, rngs=nnx.Rngs(0))
    weights = dense.kernel.get_value()._replace(s=jnp.arange(1.0, 5.0))
    x = jax.random.normal(jax.random.key(1), (rows, 20))

    def loss(forward, weights, x):
        return jnp.sum(jnp.sin(forward(weights, x)))

    def plain(weights, x):
        return x @ factors.to_dense(weights).T

    made, wanted = (
        jax.grad(loss, (1, 2))(forward, weights, x) for forward in (products.dense, plain)
    )
    for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    # s scales the batch or V, whichever has fewer rows.
    scaled = str(jax.make_jaxpr(products.dense)(weights, x))
    assert f":f32[{min(rows, 20)},4] = mul" in scaled


def test_initialisation_is_he_before_truncation():
    dense = SVDDense(400, 300, rngs=nnx.Rngs(0))
    w = factors.to_dense(dense.kernel.get_value())
    assert jnp.std(w) == pytest.approx((2 / 400) ** 0.5, rel=0.02)
    conv = SVDConv(32, 48, 3, rngs=nnx.Rngs(0))
    w = factors.to_dense(conv.kernel.get_value())
    assert jnp.std(w) == pytest.approx((2 / (9 * 32)) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(SVDDense, nnx.Linear), (lambda *a, **k: SVDConv(*a, 3, **k), nnx.Conv)]
)
def test_layers_tell_their_features_as_the_stock_ones_do(ours, theirs):
    size = ((3, 3),) if theirs is nnx.Conv else ()
    a, b = ours(4, 6, rngs=nnx.Rngs(0)), theirs(4, 6, *size, rngs=nnx.Rngs(0))
    assert (a.in_features, a.out_features) == (b.in_features, b.out_features) == (4, 6)


def test_layers_differ_by_seed_and_repeat_with_it():
    a, b, c = (SVDDense(6, 5, rngs=nnx.Rngs(s)).kernel.get_value().u for s in (0, 0, 1))
    assert jnp.array_equal(a, b)
    assert not jnp.array_equal(a, c)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rank": 0.0}, "rank fraction"),
        ({"rank": 1.5}, "rank fraction"),
        ({"padding": "CIRCULAR"}, "padding must be"),
        ({"padding": (1, 1, 1)}, "one entry per spatial"),
        ({"strides": (1, 2, 3)}, "one int or two"),
    ],
)
def test_bad_settings_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SVDConv(4, 6, 3, rngs=nnx.Rngs(0), **kwargs)


@pytest.mark.parametrize("shape", first([(2, 7, 5, 1), ((2, 6, 6, 3),)], 1))
@pytest.mark.parametrize("pool", [Pool(2, 2), Pool(3, 3), Pool(3, 2, 1), Pool(3, 1)])
def test_max_pool_and_its_gradient_equal_reduce_window(shape, pool):
    x = images(3, shape)

    def reference(x):
        return nnx.max_pool(x, **pool.options)

    assert jnp.array_equal(layers.max_pool(x, pool), reference(x))
    weights = images(4, reference(x).shape)
    ours, theirs = (
        jax.jit(jax.grad(lambda x, f=f: jnp.sum(weights * f(x))))(x)
        for f in (lambda x: layers.max_pool(x, pool), reference)
    )
    # Where windows overlap the terms of a sum may come in another order.
    assert jnp.allclose(ours, theirs, atol=1e-6)


def test_max_pool_gives_ties_one_gradient():
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(layers.max_pool(x, Pool(2, 2)))))(
        jnp.zeros((1, 4, 4, 1))
    )
    assert float(jnp.sum(gradient)) == 4
    assert float(jnp.max(gradient)) == 1


@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (0,), (2, 0, 3)])
@pytest.mark.parametrize("training", [True, False])
def test_layers_take_the_batch_axes_that_the_stock_ones_take(batch, training):
    rngs = nnx.Rngs(0)
    pairs = [
        (SVDDense(4, 6, rngs=rngs), nnx.Linear(4, 6, rngs=rngs), ()),
        (SVDConv(4, 6, (3, 2), rngs=rngs), nnx.Conv(4, 6, (3, 2), rngs=rngs), (5, 7)),
    ]
    for layer, stock, maps in pairs:
        weight = factors.to_dense(layer.kernel.get_value())
        dense = weight.T if not maps else matrix_to_kernel(weight, (3, 2))
        stock.kernel.set_value(dense)
        layer.train() if training else layer.eval()
        x = jax.random.normal(jax.random.key(1), (*batch, *maps, 4))
        assert layer(x).shape == stock(x).shape
        np.testing.assert_allclose(layer(x), stock(x), atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (SVDDense, (3, 5), r"SVDDense takes \(..., 4\), got an input of shape \(3, 5\)"),
        (SVDDense, (), r"SVDDense takes \(..., 4\), got an input of shape \(\)"),
        (SVDConv, (7, 4), r"SVDConv takes \(..., H, W, 4\), got an input of shape \(7, 4\)"),
        (SVDConv, (2, 7, 7, 3), r"got an input of shape \(2, 7, 7, 3\)"),
    ],
)
def test_an_input_of_another_shape_is_refused_by_its_shape(layer, shape, message):
    sizes = (4, 6) if layer is SVDDense else (4, 6, 3)
    with pytest.raises(ValueError, match=message):
        layer(*sizes, rngs=nnx.Rngs(0))(jnp.zeros(shape))
