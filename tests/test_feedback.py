"""Feedback paths, twins, and how they move."""

import jax
import jax.numpy as jnp
import pytest
from helpers import CLASSES, IMAGE, make_batch, max_difference, split

from ssa_jax import factors
from ssa_jax.methods import feedback
from ssa_jax.networks.forward import forward, output_shapes, predict
from ssa_jax.training import losses

FULL = feedback.Plan(per_channel=False, rows=CLASSES, size=0, full_size=0)


def setup(name, rank=0.5):
    units, params, mstate = split(name, rank)
    return units, params, mstate, output_shapes(units, params, mstate, IMAGE)


def test_composed_path_is_the_jacobian_of_a_linear_network():
    units, params, mstate, shapes = setup("linear")
    paths = feedback.composed_paths(units, params, mstate, shapes, FULL)
    x = make_batch(1).images
    for i, path in enumerate(paths):
        x, _ = units[i].apply(params[i], mstate[i], x, train=True)
        rest = slice(i + 1, None)
        jacobian = jax.jacobian(
            lambda h, r=rest: predict(units[r], params[r], mstate[r], h, train=True)
        )(x)
        assert path.shape == (CLASSES, *shapes[i])
        assert jnp.allclose(path, jacobian[0, :, 0], atol=1e-5)


def test_composed_path_of_a_residual_sum_is_the_sum_of_the_paths():
    units, params, mstate, shapes = setup("residual")
    paths = feedback.composed_paths(units, params, mstate, shapes, FULL)
    # Without its body's last kernel the identity block passes the path on unchanged.
    cut = factors.map_factors(lambda f: f._replace(s=0 * f.s), params[1])
    paths_cut = feedback.composed_paths(units, (params[0], cut, *params[2:]), mstate, shapes, FULL)
    assert jnp.array_equal(paths_cut[0], paths[1])
    assert not jnp.allclose(paths[0], paths[1], atol=1e-3)


def test_path_enters_a_norm_by_its_scale_over_its_deviation():
    units, params, mstate, shapes = setup("conv")
    paths = feedback.composed_paths(units, params, mstate, shapes, FULL)
    scaled = jax.tree.map(lambda x: x, params)
    scaled[1]["norm"]["scale"] = 3 * scaled[1]["norm"]["scale"]
    tripled = feedback.composed_paths(units, scaled, mstate, shapes, FULL)
    assert jnp.allclose(tripled[0], 3 * paths[0], atol=1e-5)
    wide = jax.tree.map(lambda x: x, mstate)
    wide[1]["norm"]["var"] = 4 * wide[1]["norm"]["var"]
    halved = feedback.composed_paths(units, params, wide, shapes, FULL)
    assert jnp.allclose(halved[0], paths[0] / 2, atol=1e-5)


def test_send_is_linear_in_the_error():
    paths = (jnp.arange(24.0).reshape(2, 3, 4), jnp.ones((2, 5)))
    error = jnp.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    first, second = map(feedback.send, (error, error), paths, [(3, 4), (5,)])
    assert jnp.array_equal(first[0], paths[0][0])
    assert jnp.array_equal(first[1], 2 * paths[0][1])
    assert jnp.array_equal(second, jnp.array([[1.0], [2.0], [2.0]]) * jnp.ones((1, 5)))


@pytest.mark.parametrize("name", ["conv", "residual"])
def test_walk_with_the_weights_as_twins_is_backpropagation(name):
    units, params, mstate, _ = setup(name)
    batch = make_batch()
    logits, _, tape = forward(units, params, mstate, batch.images)
    _, error = losses.output_error(logits, batch.labels)
    delta, expected = error, [error]
    for pullback in tape.pullbacks[:0:-1]:
        delta = pullback(delta)[1]
        expected.insert(0, delta)
    signals = feedback.walk(units, params, params, tape, error)
    assert max_difference(signals, expected) < 1e-6


def test_random_paths_have_the_asked_rank_and_scale():
    shapes = [(40, 30), (50,), (6,)]
    paths = feedback.random_paths(jax.random.key(0), shapes, [2, None, None], FULL)
    singular = jnp.linalg.svd(paths[0].reshape(6, -1), compute_uv=False)
    assert float(singular[1]) > 1
    assert float(singular[2]) < 1e-4 * float(singular[0])
    assert paths[1].shape == (6, 50)
    full = feedback.random_paths(jax.random.key(1), [(100, 100), (6,)], [None, None], FULL)[0]
    assert float(jnp.var(full)) == pytest.approx(1 / 6, rel=0.05)


def test_the_bound_on_memory_chooses_the_form():
    shapes = [(4, 4, 8), (32,), (10,)]
    full = 4 * 10 * (4 * 4 * 8 + 32)
    at, below = (feedback.plan(shapes, "auto", limit) for limit in (full, full - 1))
    assert (at.per_channel, at.size, at.rows) == (False, full, 10)
    assert (below.per_channel, below.size, below.full_size) == (True, 4 * 10 * (8 + 32), full)
    assert "per-channel" in str(below)
    assert feedback.plan(shapes, "channel", 2**30).per_channel
    assert not feedback.plan(shapes, "full", 0).per_channel
    # Two maps of 4 x 4 x 8 floats fit at a time.
    assert feedback.plan(shapes, "channel", 1100).rows == 2
    with pytest.raises(ValueError, match="feedback_form must be one of auto"):
        feedback.plan(shapes, "sparse", 0)


@pytest.mark.parametrize("rows", [1, 2, CLASSES])
def test_per_channel_paths_are_the_mean_over_positions_in_chunks_or_not(rows):
    units, params, mstate, shapes = setup("conv")
    full = feedback.composed_paths(units, params, mstate, shapes, FULL)
    plan = FULL._replace(per_channel=True, rows=rows)
    for channel, path in zip(
        feedback.composed_paths(units, params, mstate, shapes, plan), full, strict=True
    ):
        axes = tuple(range(1, path.ndim - 1))
        assert jnp.allclose(channel, path.mean(axes, keepdims=True), atol=1e-6)


def test_per_channel_signals_are_uniform_over_positions():
    shapes = [(4, 3, 6), (7,), (CLASSES,)]
    plan = feedback.plan(shapes, "channel", 2**20)
    paths = feedback.random_paths(jax.random.key(0), shapes, [None] * 3, plan)
    assert [p.shape for p in paths] == [(CLASSES, 1, 1, 6), (CLASSES, 7)]
    error = jax.random.normal(jax.random.key(1), (2, CLASSES))
    first, second = map(feedback.send, (error, error), paths, shapes[:-1])
    assert first.shape == (2, 4, 3, 6)
    assert jnp.array_equal(first, jnp.broadcast_to(first[:, :1, :1], first.shape))
    assert jnp.allclose(first[:, 0, 0], error @ paths[0][:, 0, 0])
    assert second.shape == (2, 7)


def test_looking_ahead_to_the_output_is_backpropagation():
    units, params, mstate, _ = setup("conv")
    batch = make_batch()
    logits, _, tape = forward(units, params, mstate, batch.images)
    _, error = losses.output_error(logits, batch.labels)
    nothing = tuple(jnp.zeros_like(h) for h in tape.outputs[:-1])
    true = [error]
    for pullback in tape.pullbacks[:0:-1]:
        true.insert(0, pullback(true[0])[1])
    near = feedback.look_ahead(tape, (*nothing, error), 2)
    assert max_difference(near[-3:], true[-3:]) < 1e-7
    assert float(jnp.abs(near[0]).max()) == 0
    for k in (3, 50):
        assert max_difference(feedback.look_ahead(tape, (*nothing, error), k), true) < 1e-7
    sent = (*nothing, error)
    assert feedback.look_ahead(tape, sent, 0) is sent
