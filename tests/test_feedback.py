"""Feedback paths, twins, and how they move."""

import jax
import jax.numpy as jnp
import pytest
from helpers import CLASSES, IMAGE, make_batch, max_difference, split

from ssa_jax import factors, feedback, losses
from ssa_jax.forward import forward, output_shapes, predict


def setup(name, rank=0.5):
    units, params, mstate = split(name, rank)
    return units, params, mstate, output_shapes(units, params, mstate, IMAGE)


def test_composed_path_is_the_jacobian_of_a_linear_network():
    units, params, mstate, shapes = setup("linear")
    paths = feedback.composed_paths(units, params, mstate, shapes)
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
    paths = feedback.composed_paths(units, params, mstate, shapes)
    # Without its body's last kernel the identity block passes the path on unchanged.
    cut = factors.map_factors(lambda f: f._replace(s=0 * f.s), params[1])
    paths_cut = feedback.composed_paths(units, (params[0], cut, *params[2:]), mstate, shapes)
    assert jnp.array_equal(paths_cut[0], paths[1])
    assert not jnp.allclose(paths[0], paths[1], atol=1e-3)


def test_path_enters_a_norm_by_its_scale_over_its_deviation():
    units, params, mstate, shapes = setup("conv")
    paths = feedback.composed_paths(units, params, mstate, shapes)
    scaled = jax.tree.map(lambda x: x, params)
    scaled[1]["norm"]["scale"] = 3 * scaled[1]["norm"]["scale"]
    tripled = feedback.composed_paths(units, scaled, mstate, shapes)
    assert jnp.allclose(tripled[0], 3 * paths[0], atol=1e-5)
    wide = jax.tree.map(lambda x: x, mstate)
    wide[1]["norm"]["var"] = 4 * wide[1]["norm"]["var"]
    halved = feedback.composed_paths(units, params, wide, shapes)
    assert jnp.allclose(halved[0], paths[0] / 2, atol=1e-5)


def test_send_is_linear_in_the_error_and_passes_it_to_the_last_unit():
    paths = (jnp.arange(24.0).reshape(2, 3, 4), jnp.ones((2, 5)))
    error = jnp.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    first, second, last = feedback.send(error, paths)
    assert jnp.array_equal(first[0], paths[0][0])
    assert jnp.array_equal(first[1], 2 * paths[0][1])
    assert jnp.array_equal(second, jnp.array([[1.0], [2.0], [2.0]]) * jnp.ones((1, 5)))
    assert last is error


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


def test_twins_are_independent_and_of_the_weights_shape_rank_and_norm():
    _, params, _, _ = setup("conv")
    twins = feedback.init_twins(jax.random.key(3), params)
    assert jax.tree.structure(twins) == jax.tree.structure(params)
    for w, b in zip(factors.leaves(params), factors.leaves(twins), strict=True):
        assert [x.shape for x in w] == [x.shape for x in b]
        assert float(jnp.linalg.norm(b.s)) == pytest.approx(float(jnp.linalg.norm(w.s)), rel=1e-5)
        assert float(factors.orthogonality_error(b)) < 1e-5
        cosine = jnp.vdot(factors.to_dense(w), factors.to_dense(b)) / jnp.sum(jnp.square(w.s))
        assert abs(float(cosine)) < 0.6
    again = feedback.init_twins(jax.random.key(3), params)
    assert max_difference(twins, again) == 0


def test_random_paths_have_the_asked_rank_and_scale():
    shapes = [(40, 30), (50,), (6,)]
    paths = feedback.random_paths(jax.random.key(0), shapes, [2, None, None])
    singular = jnp.linalg.svd(paths[0].reshape(6, -1), compute_uv=False)
    assert float(singular[1]) > 1
    assert float(singular[2]) < 1e-4 * float(singular[0])
    assert paths[1].shape == (6, 50)
    full = feedback.random_paths(jax.random.key(1), [(100, 100), (6,)], [None, None])[0]
    assert float(jnp.var(full)) == pytest.approx(1 / 6, rel=0.05)


def test_mutual_twins_close_the_distance_at_their_rate():
    _, params, _, _ = setup("conv")
    twins = feedback.init_twins(jax.random.key(3), params)
    before = losses.alignment_term(params, twins)
    after = losses.alignment_term(params, feedback.meet(twins, params, 0.1))
    assert float(after) == pytest.approx(0.8**2 * float(before), rel=1e-4)
