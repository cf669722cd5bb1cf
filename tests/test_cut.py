"""Cuts: an ordinary model taken apart at its marks is the same network."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from helpers import max_difference, walk

from ssa_jax import CutError, Functional, cut, factors
from ssa_jax.methods import METHODS, FeedbackOptions, Network
from ssa_jax.methods.bp import chain as pulled_back
from ssa_jax.networks.forward import forward, predict
from ssa_jax.networks.models import LinenModel, split, start
from ssa_jax.networks.packing import Packing
from ssa_jax.networks.units import sum_shared
from ssa_jax.training.losses import LossWeights
from ssa_jax.training.optim import scale_by_depth
from ssa_jax.training.train import init_state, make_step
from ssa_jax.types import Batch

CLASSES = 3
X = jax.random.normal(jax.random.key(0), (4, 6, 6, 2))
TOKENS = jnp.array([[3, 1, 4, 0], [1, 5, 0, 0], [2, 6, 5, 3]])


pytestmark = pytest.mark.usefixtures("other_peoples_code")


class Residual(nnx.Module):
    """Convolutions with batch norm, dropout, a cut inside of the block and one behind it."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.body = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.body_norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.head = nnx.Linear(4, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        y = cut(x)
        # The skip goes around the cut.
        y = cut(nnx.relu(self.body_norm(self.body(y)) + x))
        return self.head(self.dropout(y).mean((1, 2)))


class Attention(nnx.Module):
    """Embedded tokens, attention over those that are not padding, one table for both ends."""

    def __init__(self, rngs):
        self.table = nnx.Embed(CLASSES + 5, 8, rngs=rngs)
        self.place = nnx.Param(jax.random.normal(rngs.params(), (4, 8)))
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.dense = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, tokens):
        h = cut(self.table(tokens) + self.place[...])
        mask = nnx.make_attention_mask(tokens > 0, tokens > 0)
        h = cut(h + self.attention(self.norm(h), mask=mask))
        h = cut(h + nnx.gelu(self.dense(h)))
        return self.table.attend(h.mean(1))


class Branches(nnx.Module):
    """Two units side by side that meet, marked alone and together."""

    def __init__(self, rngs):
        self.a = nnx.Linear(72, 5, rngs=rngs)
        self.b = nnx.Linear(72, 7, rngs=rngs)
        self.c = nnx.Linear(12, 6, rngs=rngs)
        self.d = nnx.Linear(6, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = x.reshape(len(x), -1)
        a = cut(nnx.tanh(self.a(x)))
        b = cut(nnx.tanh(self.b(x)))
        h, twice = cut((nnx.tanh(self.c(jnp.concatenate([a, b], 1))), 2 * a[:, :3]))
        return self.d(h) + twice


class Named(nnx.Module):
    """Several inputs and several outputs."""

    def __init__(self, rngs):
        self.a = nnx.Linear(3, 5, rngs=rngs)
        self.b = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        h = cut(nnx.tanh(self.a(x["left"])) + x["right"])
        return self.b(h)


class InLinen(linen.Module):
    """The same in Linen, told by `train`."""

    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.Conv(4, (3, 3), strides=2)(x)
        x = cut(linen.relu(linen.BatchNorm(use_running_average=not train)(x)))
        x = linen.Dropout(0.3, deterministic=not train)(x)
        x = cut(linen.relu(linen.Dense(5)(x.reshape(len(x), -1))))
        return linen.Dense(CLASSES)(x)


def in_linen():
    return start(InLinen(), jax.ShapeDtypeStruct((1, *X.shape[1:]), X.dtype), 0)


def function():
    keys = jax.random.split(jax.random.key(1), 2)
    params = [jax.random.normal(k, s) for k, s in zip(keys, ((72, 5), (5, 3)), strict=True)]
    return Functional(lambda p, x: cut(jnp.tanh(x.reshape(len(x), -1) @ p[0])) @ p[1], params)


NAMED = {"left": X[:, 0, :3, 0], "right": X[:, 1, :5, 0]}
MODELS = {
    "residual": (lambda: Residual(nnx.Rngs(0)), X, 3),
    "attention": (lambda: Attention(nnx.Rngs(0)), TOKENS, 4),
    "branches": (lambda: Branches(nnx.Rngs(0)), X, 4),
    "named": (lambda: Named(nnx.Rngs(0)), NAMED, 2),
    "linen": (in_linen, X, 3),
    "function": (function, X, 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_units_in_a_row_are_the_model_and_their_pullbacks_its_gradient(name):
    make, x, number = MODELS[name]
    model = make()
    units, params, mstate, merge = split(model, jax.tree.map(lambda a: a[:1], x))
    assert len(units) == number
    if isinstance(model, nnx.Module):
        model.eval()
    assert jnp.allclose(predict(units, params, mstate, x), model(x), atol=1e-5)
    outputs, _, tape = forward(units, params, mstate, x)
    weights = jnp.cos(jnp.arange(outputs.size)).reshape(outputs.shape)
    signals = pulled_back(tape, weights)
    own = tuple(p(s)[0] for p, s in zip(tape.pullbacks, signals, strict=True))

    def loss(params):
        return jnp.vdot(predict(units, params, mstate, x, train=True), weights)

    assert max_difference(own, jax.grad(loss)(params)) < 1e-5
    merged = merge(params, mstate)
    assert jnp.allclose(merged(x), model(x), atol=1e-5)


def test_gradients_and_statistics_are_those_of_the_model_itself():
    for make, x in ((MODELS["residual"][0], X), (MODELS["attention"][0], TOKENS)):
        model = make()
        units, params, mstate, _ = split(model, x[:1])
        outputs, moved, tape = forward(units, params, mstate, x)
        weights = jnp.cos(outputs)
        model.train()
        graph, state, rest = nnx.split(model, nnx.Param, ...)

        def loss(state, graph=graph, rest=rest, x=x, weights=weights):
            merged = nnx.merge(graph, state, rest, copy=True)
            return jnp.vdot(merged(x), weights), nnx.state(merged, nnx.Not(nnx.Param))

        true, after = jax.grad(loss, has_aux=True)(state)
        signals = pulled_back(tape, weights)
        own = [p(s)[0] for p, s in zip(tape.pullbacks, signals, strict=True)]
        # What units share, such as a table at both ends, has the sum.
        found = {n: g for unit in sum_shared(units, own) for n, g in unit.items()}
        for path, gradient in nnx.to_flat_state(true):
            name = "/".join(map(str, path))
            assert jnp.allclose(found[name], gradient.get_value(), atol=1e-5), name
        states = {n: v for unit in moved for n, v in unit.items()}
        for path, value in nnx.to_flat_state(after):
            if not jnp.issubdtype(value.get_value().dtype, jax.dtypes.prng_key):
                name = "/".join(map(str, path))
                assert jnp.allclose(states[name], value.get_value(), atol=1e-6), name


def test_no_gradient_crosses_a_cut():
    units, params, mstate, _ = split(MODELS["branches"][0](), X[:1])
    _, _, tape = forward(units, params, mstate, X)
    assert [sorted(p) for p in params] == [
        ["a/bias", "a/kernel"], ["b/bias", "b/kernel"], ["c/bias", "c/kernel"],
        ["d/bias", "d/kernel"],
    ]  # fmt: skip
    # What goes around a cut is beside what is marked: a behind b, and b alone behind c.
    assert [h.shape[1:] for h in tape.outputs] == [(77,), (12,), (9,), (CLASSES,)]


@pytest.mark.parametrize("name", ["residual", "attention", "linen"])
def test_a_walk_through_the_weights_is_backpropagation_and_through_twins_is_not(name):
    make, x, _ = MODELS[name]
    units, params, mstate, _ = split(make(), x[:1])
    outputs, _, tape = forward(units, params, mstate, x)
    error = jnp.cos(outputs)
    true = pulled_back(tape, error)
    copies = jax.tree.map(jnp.copy, params)
    assert max_difference(walk(units, params, copies, tape, error), true) < 1e-5
    twins = jax.tree.map(lambda p: -p if p.ndim > 1 else p, params)
    assert max_difference(walk(units, params, twins, tape, error), true) > 1e-3


def test_twins_stand_in_for_maps_alone_and_biases_and_norms_are_the_weights():
    units, params, mstate, _ = split(MODELS["residual"][0](), X[:1])
    outputs, _, tape = forward(units, params, mstate, X)
    error = jnp.cos(outputs)
    other = jax.tree.map(lambda p: p if p.ndim > 1 else p + 3, params)
    assert max_difference(walk(units, params, other, tape, error), pulled_back(tape, error)) < 1e-5


def test_copies_of_shared_weights_stay_equal_under_rates_that_differ_by_unit():
    units, params, mstate, _ = split(MODELS["attention"][0](), TOKENS[:1])
    method = METHODS["bp"](Network(units, (), TOKENS), FeedbackOptions())
    chain = optax.chain(optax.adam(1e-2), scale_by_depth(0.1))
    state = init_state(method, chain, params, mstate, jax.random.key(0))
    step = make_step(units, method, chain, LossWeights())
    for _ in range(3):
        state, _ = step(state, Batch(TOKENS, jnp.array([0, 1, 2])))
    name = "table/embedding"
    first, last = (state.params[i][name] for i in (0, -1))
    assert jnp.array_equal(first, last)
    assert not jnp.allclose(first, params[0][name], atol=1e-4)


def test_cut_is_the_identity_in_every_transformation():
    def twice(x):
        return jnp.sum(cut(jnp.sin(x)) ** 2)

    def plain(x):
        return jnp.sum(jnp.sin(x) ** 2)

    x = X[0]
    assert jnp.array_equal(cut(x), x)
    assert jax.tree.structure(cut({"a": x, "b": (x, x)})) == jax.tree.structure(
        {"a": 0, "b": (0, 0)}
    )
    for f in (jax.jit, jax.grad, jax.vmap, jax.hessian, jax.checkpoint):
        assert max_difference(f(twice)(x[0, :2]), f(plain)(x[0, :2])) == 0


def test_other_batch_sizes_ranks_and_precisions_go_through_the_same_units():
    units, params, mstate, _ = split(MODELS["residual"][0](), X[:1])
    whole = predict(units, params, mstate, X)
    assert jnp.allclose(predict(units, params, mstate, X[:2]), whole[:2], atol=1e-6)
    matrix = params[2]["head/kernel"]
    on_factors = {"head/kernel": factors.from_dense(matrix, 2, jax.random.key(0))}
    assert on_factors["head/kernel"].rank == 2
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda p: p.astype(jnp.float64) if p.dtype == jnp.float32 else p, (params, mstate)
        )
        exact = predict(units, *wide, X.astype(jnp.float64))
    assert exact.dtype == jnp.float64
    assert np.allclose(np.asarray(exact), np.asarray(whole), atol=1e-5)


def refused(apply, params, x, match):
    with pytest.raises(CutError, match=match) as caught:
        split(Functional(apply, params), x)
    # With the line of the cut.
    assert re.search(r"test_cut\.py:\d+", str(caught.value)), caught.value


W = jnp.eye(2)


def test_a_cut_in_a_loop_is_refused_with_its_line():
    def scanned(w, x):
        return jax.lax.scan(lambda h, _: (cut(jnp.tanh(h @ w)), None), x, None, length=3)[0]

    refused(scanned, W, jnp.ones((4, 2)), "inside of scan")
    refused(
        lambda w, x: jax.checkpoint(lambda x: cut(x @ w))(x) @ w, W, jnp.ones((4, 2)),
        "inside of (remat|checkpoint)",
    )  # fmt: skip


def test_a_cut_in_jit_is_none_of_a_loop():
    def apply(w, x):
        return jax.jit(lambda x: jax.jit(lambda x: cut(jnp.tanh(x @ w)))(x) @ w)(x)

    units, params, mstate, _ = split(Functional(apply, W), jnp.ones((1, 2)))
    assert len(units) == 2
    x = jnp.arange(8.0).reshape(4, 2)
    assert jnp.allclose(predict(units, params, mstate, x), apply(W, x), atol=1e-6)


def test_a_cut_over_examples_by_vmap_is_one_over_the_batch():
    def apply(w, x):
        return jax.vmap(lambda row: cut(jnp.tanh(row @ w)) @ w)(x)

    units, params, mstate, _ = split(Functional(apply, W), jnp.ones((1, 2)))
    x = jnp.arange(8.0).reshape(4, 2)
    _, _, tape = forward(units, params, mstate, x)
    assert tape.outputs[0].shape == (4, 2)
    assert jnp.allclose(tape.outputs[1], apply(W, x), atol=1e-6)


def test_what_cannot_be_a_unit_is_refused_with_the_line_of_its_cut():
    x = jnp.ones((4, 2))
    refused(lambda w, x: x @ w + 0 * cut(w).sum(), W, x, "does not depend on the model's input")

    def unused(w, x):
        cut(jnp.tanh(x))
        return x @ w

    refused(unused, W, x, "nothing uses what is cut")
    refused(
        lambda w, x: cut((x @ w).sum(0)) + x, W, jnp.ones((4, 2)), "first axis is not the batch"
    )


def test_statistics_on_both_sides_of_a_cut_are_refused():
    class Shared(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(2, rngs=rngs)

        def __call__(self, x):
            return self.norm(cut(self.norm(x)))

    with pytest.raises(CutError, match=r"unit 2 writes is read by unit 1: .* both sides of a cut"):
        split(Shared(nnx.Rngs(0)), jnp.ones((1, 2)))


def test_a_model_without_a_cut_is_told_to_have_one():
    with pytest.raises(CutError, match=r"no cut.*ssa_jax\.cut"):
        split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), jnp.ones((1, 2)))


def test_packing_keeps_every_number_and_gives_floats_their_gradient():
    arrays = [
        jnp.linspace(-1, 1, 24).reshape(2, 3, 4),
        jnp.array([[-(2**31), 2**31 - 1], [0, -70000]], jnp.int32),
        jnp.array([True, False]),
    ]
    packing = Packing([jax.typeof(a) for a in arrays], 2, "here")
    back = packing.unpack(packing.pack(arrays))
    for a, b in zip(arrays, back, strict=True):
        assert a.dtype == b.dtype
        assert jnp.array_equal(a, b)
    along = [jnp.ones((2, 5, 5, 3)), jnp.zeros((2, 5, 5, 1))]
    assert Packing([jax.typeof(a) for a in along], 2, "here").pack(along).shape == (2, 5, 5, 4)
    with pytest.raises(CutError, match="key"):
        Packing([jax.typeof(jax.random.split(jax.random.key(0), 2))], 2, "here")


def test_the_model_itself_is_never_changed():
    model = Residual(nnx.Rngs(0))
    before = [np.asarray(v) for v in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))]
    units, params, mstate, _ = split(model, X[:1])
    step = jax.jit(functools.partial(predict, units), donate_argnums=0)
    with pytest.warns(UserWarning, match="donated"):
        step(jax.tree.map(jnp.copy, params), mstate, X)
    after = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_linen_model_takes_its_dropout_key_along():
    model = in_linen()
    assert isinstance(model, LinenModel)
    units, params, mstate, _ = split(model, X[:1])
    first, moved, _ = forward(units, params, mstate, X)
    second, _, _ = forward(units, params, moved, X)
    assert not jnp.allclose(first, second)
