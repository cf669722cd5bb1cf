"""`factorize`: models of any kind, by patterns of names."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx
from helpers import max_difference

from ssa_jax import cut, factorize
from ssa_jax.factors import is_factors
from ssa_jax.layers import SVDConv, SVDDense, SVDLinearGeneral
from ssa_jax.networks.factorize import LeftDense, from_dense, has_factors
from ssa_jax.networks.models import Functional, split, start, without_factors

X = jax.random.normal(jax.random.key(0), (2, 8, 8, 16))


pytestmark = pytest.mark.usefixtures("other_peoples_code")


class Convs(nnx.Module):
    """Convolutions of every kind, attention and a classifier."""

    def __init__(self, rngs):
        def conv(n=32, **options):
            return nnx.Conv(16, n, (3, 3), rngs=rngs, **options)

        self.strided = conv(strides=(2, 1), padding=1)
        self.dilated = conv(kernel_dilation=(2, 1))
        self.grouped = conv(feature_group_count=2, padding="VALID")
        self.attention = nnx.MultiHeadAttention(4, 32, decode=False, rngs=rngs)
        self.head = nnx.Linear(32, 3, rngs=rngs)

    def __call__(self, x):
        parts = [f(x).mean((1, 2)) for f in (self.strided, self.dilated, self.grouped)]
        h = cut(jnp.stack(parts, 1))
        return self.head(self.attention(h).mean(1))


def test_at_full_rank_every_kind_of_layer_is_the_dense_one():
    model = Convs(nnx.Rngs(0))
    on_factors = factorize(model, rank=1.0)
    kinds = {name: type(getattr(on_factors, name)) for name in ("strided", "dilated", "grouped")}
    assert set(kinds.values()) == {SVDConv}
    for name in ("query", "key", "value", "out"):
        assert type(getattr(on_factors.attention, name)) is SVDLinearGeneral
    # Three classes: few directions to lose.
    assert type(on_factors.head) is nnx.Linear
    assert jnp.allclose(on_factors(X), model(X), atol=1e-5)
    assert has_factors(on_factors)
    assert not has_factors(model)


def test_the_gradient_of_a_grouped_layer_is_that_of_its_kernel():
    layer = Convs(nnx.Rngs(0)).grouped
    model = from_dense(nnx.Sequential(layer), rank=1.0).layers[0]
    f = model.kernel.get_value()

    def dense(kernel):
        graph, state = nnx.split(layer)
        state["kernel"] = state["kernel"].replace(kernel)
        return jnp.sum(jnp.sin(nnx.merge(graph, state)(X)))

    def on_factors(f):
        graph, state = nnx.split(model)
        state["kernel"] = state["kernel"].replace(f)
        return jnp.sum(jnp.sin(nnx.merge(graph, state)(X)))

    kernel = layer.kernel.get_value()
    step = 1e-3 * jnp.cos(jnp.arange(f.s.size)).reshape(f.s.shape)
    own = jnp.vdot(jax.grad(on_factors)(f).s, step)
    from ssa_jax.layers import matrix_to_kernel

    moved = matrix_to_kernel((f.u * step[None, :]) @ f.v.T, (3, 3))
    assert float(own) == pytest.approx(float(jnp.vdot(jax.grad(dense)(kernel), moved)), rel=1e-3)


def test_a_depthwise_convolution_stays_dense_with_its_reason():
    class Depthwise(nnx.Module):
        def __init__(self, rngs):
            self.depth = nnx.Conv(16, 16, (3, 3), feature_group_count=16, rngs=rngs)
            self.point = nnx.Conv(16, 32, (1, 1), rngs=rngs)

    with pytest.warns(LeftDense, match=r"depth \(depthwise: its factors would hold more"):
        made = factorize(Depthwise(nnx.Rngs(0)))
    assert type(made.depth) is nnx.Conv
    assert made.point.kernel.get_value().rank == 8


def test_patterns_choose_layers_and_those_that_fit_none_are_told():
    model = Convs(nnx.Rngs(0))
    made = factorize(model, include=["attention/*"], exclude=["*/value"])
    assert type(made.strided) is nnx.Conv
    assert type(made.attention.query) is SVDLinearGeneral
    assert type(made.attention.value) is nnx.LinearGeneral
    with pytest.raises(ValueError, match=r"no layer fits 'blocks/\*', there are"):
        factorize(model, include=["blocks/*"])
    with pytest.raises(ValueError, match="no layer is left"):
        factorize(model, include=["head"])
    with pytest.raises(ValueError, match=r"rank must lie in \(0, 1\]"):
        factorize(model, rank=0.0)
    with pytest.raises(ValueError, match=r"takes an nnx\.Module or a LinenModel"):
        factorize(Functional(lambda p, x: x, {}))


class InLinen(linen.Module):
    @linen.compact
    def __call__(self, x):
        y = linen.Conv(32, (3, 3), strides=2, feature_group_count=2)(x)
        y = cut(y + linen.Conv(32, (3, 3), strides=2, kernel_dilation=2)(x))
        y = y.reshape(len(y), -1, 32)
        y = y + linen.MultiHeadDotProductAttention(4)(y)
        return linen.Dense(3)(linen.relu(linen.Dense(32, name="hidden")(y.mean(1))))


def in_linen():
    return start(InLinen(), jax.ShapeDtypeStruct((1, *X.shape[1:]), X.dtype), 0)


def test_a_linen_model_is_put_on_factors_layer_by_layer():
    model = in_linen()
    on_factors = factorize(model, rank=1.0)
    assert jnp.allclose(on_factors(X), model(X), atol=1e-5)
    params = on_factors.variables["params"]
    assert is_factors(params["hidden"]["kernel"])
    assert is_factors(params["MultiHeadDotProductAttention_0"]["query"]["kernel"])
    assert not is_factors(params["Dense_0"]["kernel"])
    assert not has_factors(model)
    half = factorize(model, include=["hidden"])
    assert half.variables["params"]["hidden"]["kernel"].rank == 16
    assert not is_factors(half.variables["params"]["Conv_0"]["kernel"])


@pytest.mark.parametrize("make", [lambda: Convs(nnx.Rngs(0)), in_linen])
def test_without_factors_there_are_the_layers_of_before(make):
    model = make()
    on_factors = factorize(model, rank=0.5, lowest=0.0)
    dense = without_factors(on_factors)
    assert not has_factors(dense)
    assert has_factors(on_factors)
    shapes = [jax.tree.map(jnp.shape, split(m, X[:1]).params) for m in (model, dense)]
    assert shapes[0] == shapes[1]
    if isinstance(model, nnx.Module):
        assert jnp.allclose(dense(X), on_factors(X), atol=1e-5)


@pytest.mark.parametrize("make", [lambda: Convs(nnx.Rngs(0)), in_linen])
def test_the_units_of_a_factorised_model_are_the_model(make):
    model = factorize(make(), rank=0.5)
    units, params, mstate, merge = split(model, X[:1])
    assert len(units) == 2
    assert max_difference(merge(params, mstate)(X), model(X)) < 1e-5


def test_layers_refuse_groups_that_do_not_divide_their_channels():
    with pytest.raises(ValueError, match="3 groups do not divide 16 and 32 channels"):
        SVDConv(16, 32, 3, feature_group_count=3, rngs=nnx.Rngs(0))
    assert SVDDense(4, 4, rngs=nnx.Rngs(0)).kernel.get_value().rank == 4
