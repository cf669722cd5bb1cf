"""Hidden units in bfloat16: what is rounded, what stays float32, and how far off it is; float64."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import NETWORKS, make_batch, make_method, max_difference, split

from ssa_jax import transforms
from ssa_jax.networks import models
from ssa_jax.networks.forward import forward, predict
from ssa_jax.networks.units import group_units, in_precision
from ssa_jax.training import metrics
from ssa_jax.training.losses import LossWeights
from ssa_jax.training.train import (
    init_state,
    make_eval,
    make_refresh,
    make_step,
    make_truncation_losses,
    true_gradients,
)

METHODS = [
    ("bp", {}),
    ("ssa", {}),
    ("ssa", {"path": "sequential"}),
    ("ssa", {"lookahead": 1}),
    ("fa", {}),
    ("local", {}),
]


def both(name="conv", rank=0.5):
    """The units in float32 and in bfloat16, their parameters and state, and a batch."""
    units, params, mstate = split(name, rank)
    return units, in_precision(units, jnp.bfloat16), params, mstate, make_batch(32)


def types(tree):
    return jax.tree.map(lambda x: x.dtype, tree)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), METHODS)
def test_the_state_keeps_its_types(name, options):
    _, units, params, mstate, batch = both()
    method = make_method(name, units, params, mstate, **options)
    optimizer = optax.adam(1e-2)
    step, refresh = make_step(units, method, optimizer, LossWeights()), make_refresh(method)
    state = init_state(method, optimizer, params, mstate, jax.random.key(0))
    before = types(state)
    kept = jax.tree.map(jnp.copy, params)
    for _ in range(2):
        state, measured = step(refresh(state), batch)
    assert types(state) == before
    assert measured["loss"].dtype == jnp.float32
    assert jnp.bfloat16 not in jax.tree.leaves(before)
    assert max_difference(kept, state.params) > 0


@pytest.mark.slow
def test_a_state_in_double_precision_stays_in_it_to_its_rounding():
    """Sequential feedback with tracked twins is backpropagation; refreshes and cuts included."""
    ends = []
    with jax.enable_x64(True):
        for name, options in (("bp", {}), ("ssa", {"path": "sequential"}), ("ssa", {})):
            units, *trees = split("conv", 0.5)
            params, mstate = jax.tree.map(lambda x: x.astype(jnp.float64), tuple(trees))
            method = make_method(name, units, params, mstate, **options)
            optimizer = optax.chain(optax.sgd(1e-2), transforms.truncate_rank(lambda count: 0.8))
            step = make_step(units, method, optimizer, LossWeights())
            refresh = make_refresh(method) if method.refresh_every else lambda state: state
            state = init_state(method, optimizer, params, mstate, jax.random.key(0))
            before = types(state)
            for _ in range(3):
                state, _ = step(refresh(state), make_batch(32))
            assert types(state) == before
            assert jnp.float32 not in jax.tree.leaves(types((state.params, state.feedback)))
            cut = make_truncation_losses(units)(state, make_batch(32))
            assert cut["loss_after_truncation"].dtype == jnp.float64
            ends.append(state.params)
    backward, sequential, direct = ends
    assert max_difference(backward, sequential) < 1e-14
    assert max_difference(backward, direct) > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("rank", [pytest.param(None, marks=pytest.mark.long), 0.5])
@pytest.mark.parametrize("name", NETWORKS)
def test_what_leaves_a_unit_is_float32(name, rank):
    _, units, params, mstate, batch = both(name, rank)
    logits, new, tape = forward(units, params, mstate, batch.images)
    assert {x.dtype for x in (logits, *tape.outputs)} == {jnp.dtype("float32")}
    assert types(new) == types(mstate)
    for pullback, h, p in zip(tape.pullbacks, tape.outputs, params, strict=True):
        to_params, to_input = pullback(jnp.ones_like(h))
        assert types(to_params) == types(p)
        assert to_input.dtype == jnp.float32


def test_products_of_hidden_units_are_bfloat16_and_of_the_last_float32():
    _, units, params, mstate, batch = both()
    program = str(jax.make_jaxpr(lambda p, m, x: predict(units, p, m, x))(
        params, mstate, batch.images))  # fmt: skip
    products = re.findall(r":(\w+)\[[^\]]*\](?:<[^>]*>)? = (?:conv_general_dilated|dot_general)",
                          program)  # fmt: skip
    assert products[-1] == "f32"
    assert set(products[:-1]) == {"bf16"}
    assert len(products) == 7


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_near_those_of_float32(name, train):
    """Within 3 % of the largest: three or more roundings of relative size 2⁻⁹ a unit."""
    exact, rounded, params, mstate, batch = both(name)
    a, b = (predict(u, params, mstate, batch.images, train=train) for u in (exact, rounded))
    error = float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(a)))
    assert 1e-4 < error < 0.03


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.slow
def test_gradients_point_where_those_of_float32_do(name):
    """A few degrees off in bfloat16: a rectifier whose input is about zero is rounded to the other
    side. That it is rounding alone shows in float16, an eighth of it, where a degree is left.
    """
    exact, params, mstate = split(name, 0.5)
    batch = make_batch(32)
    expected = true_gradients(exact, params, mstate, batch)
    for dtype, bound in ((jnp.bfloat16, 15), (jnp.float16, 1)):
        rounded = true_gradients(in_precision(exact, dtype), params, mstate, batch)
        angles = [float(metrics.angle(x, y)) for x, y in zip(expected, rounded, strict=True)]
        assert 0 < max(angles) < bound, (dtype, angles)


def test_running_statistics_are_taken_in_float32():
    """The mean of a large batch near one is not a bfloat16 number, and must not become one."""
    exact, rounded, params, mstate, batch = both()
    a, b = (forward(u, params, mstate, batch.images)[1] for u in (exact, rounded))
    assert max_difference(a, b) < 1e-2
    means = [x for x in jax.tree.leaves(b[0]) if x.dtype == jnp.float32]
    assert any(bool(jnp.any(x != x.astype(jnp.bfloat16).astype(jnp.float32))) for x in means)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_walk_with_the_weights_is_the_unit(name):
    _, units, params, mstate, batch = both(name)
    _, _, tape = forward(units, params, mstate, batch.images)
    for i, unit in enumerate(units):
        value, pullback = jax.vjp(
            lambda x, u=unit, i=i: u.walk(params[i], params[i], mstate[i], x), tape.inputs[i]
        )
        assert jnp.allclose(value, tape.outputs[i], rtol=0.02, atol=0.02)
        cotangent = jnp.cos(value)
        ours, true = pullback(cotangent)[0], tape.pullbacks[i](cotangent)[1]
        assert ours.dtype == jnp.float32
        assert float(metrics.angle(ours, true)) < 2


def test_evaluation_is_in_the_precision_of_training():
    exact, rounded, params, mstate, batch = both()
    a, b = (make_eval(u)(params, mstate, batch)["loss"] for u in (exact, rounded))
    logits = predict(rounded, params, mstate, batch.images)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).sum()
    assert abs(float(a - b)) > 1e-4
    assert jnp.allclose(b, expected, rtol=1e-2)


def test_the_model_is_merged_in_float32():
    """What is exported is the model of the float32 parameters."""
    x = make_batch().images
    exact, params, mstate, merge = models.split(NETWORKS["conv"](0.5), x)
    merged = merge(params, mstate)
    assert jnp.allclose(merged(x), predict(exact, params, mstate, x), atol=1e-5)
    assert not jnp.allclose(
        merged(x), predict(in_precision(exact, jnp.bfloat16), params, mstate, x), atol=1e-5
    )


def test_a_joined_unit_rounds_inside_too():
    units, params, mstate = split("conv", 0.5)
    joined, p, m = group_units(units, params, mstate, 3)
    x = make_batch().images
    logits = predict(in_precision(joined, jnp.bfloat16), p, m, x)
    assert jnp.allclose(logits, predict(joined, p, m, x), atol=0.1)
    assert max_difference(logits, predict(joined, p, m, x)) > 1e-4


def test_float32_is_the_units_as_they_are():
    units, *_ = split("conv", 0.5)
    assert in_precision(units, jnp.dtype("float32")) == units
