"""Feedback paths, twins, and how they move."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import (
    CLASSES,
    EVERY,
    IMAGE,
    NETWORKS,
    apart,
    first,
    make_batch,
    max_difference,
    output_error,
    small_model,
    split,
    walk,
)

from ssa_jax import factors
from ssa_jax.methods import METHODS, FeedbackOptions, Network, chain, feedback
from ssa_jax.methods.composed import composed_paths
from ssa_jax.networks.forward import forward, output_shapes, predict

# On which paths are composed.
INPUTS = 4
SIGNS = jnp.array([1.0, -1.0] * (INPUTS // 2))
FULL = feedback.Plan(per_channel=False, rows=CLASSES, size=0, full_size=0)


def setup(name, rank=0.5):
    units, params, mstate = split(name, rank)
    return units, params, mstate, output_shapes(units, params, mstate, IMAGE)


def composed(units, params, mstate, twins=None, x=None, plan=FULL):
    inputs = make_batch(INPUTS).images if x is None else x
    return composed_paths(units, params, twins, mstate, inputs, plan)


def jacobians(units, params, mstate, x):
    """Of every hidden unit (inputs, outputs, inputs, *shape): ∂outputs/∂h_i in training mode."""
    for i in range(len(units) - 1):
        x, _ = units[i].apply(params[i], mstate[i], x, train=True)
        rest = slice(i + 1, None)
        yield jax.jacobian(
            lambda h, r=rest: predict(units[r], params[r], mstate[r], h, train=True)
        )(x)


@pytest.mark.parametrize("name", first(["conv", "residual", "split_residual"], 1))
def test_composed_path_is_the_mean_jacobian_of_inputs_of_both_signs(name):
    units, params, mstate, shapes = setup(name)
    x = make_batch(INPUTS).images
    paths = composed(units, params, mstate)
    for i, jacobian in enumerate(jacobians(units, params, mstate, x)):
        assert paths[i].shape == (CLASSES, *shapes[i])
        # A norm makes the outputs of one input depend on the other inputs too.
        own = jnp.einsum("n,ncm...,m->c...", SIGNS, jacobian, SIGNS) / INPUTS
        assert jnp.allclose(paths[i], own, atol=1e-5)


def test_composed_path_of_a_linear_network_is_the_jacobian_at_any_input():
    units, params, mstate, shapes = setup("linear")
    paths = composed(units, params, mstate)
    other = make_batch(2, seed=5).images
    for i, jacobian in enumerate(jacobians(units, params, mstate, other)):
        assert paths[i].shape == (CLASSES, *shapes[i])
        for n in range(2):
            assert jnp.allclose(paths[i], jacobian[n, :, n], atol=1e-5)


@pytest.mark.parametrize("name", first(["conv", "residual", "split_residual"], 1))
def test_composed_path_is_the_mean_of_what_the_walk_makes_of_each_logit(name):
    units, params, mstate, _ = setup(name)
    twins = split(name, 0.5, seed=7)[1]
    logits, _, tape = forward(units, params, mstate, make_batch(INPUTS).images)
    paths = composed(units, params, mstate, twins)
    for c in range(CLASSES):
        unit_vectors = SIGNS[:, None] * jnp.broadcast_to(jnp.eye(CLASSES)[c], logits.shape)
        signals = walk(units, params, twins, tape, unit_vectors)
        means = [jnp.tensordot(SIGNS, signal, 1) / INPUTS for signal in signals[:-1]]
        assert max_difference([path[c] for path in paths], means) < 1e-5
    assert max_difference(paths, composed(units, params, mstate)) > 1e-2


def test_other_inputs_of_a_norm_are_left_out_of_a_path_but_for_what_their_signs_leave():
    """What a batch norm makes of one input's output by another input is no path."""
    units, params, mstate, _ = setup("conv")
    x = make_batch(INPUTS).images
    paths = composed(units, params, mstate)
    for path, jacobian in zip(paths, jacobians(units, params, mstate, x), strict=True):
        own = jnp.einsum("ncn...->c...", jacobian) / INPUTS
        equal = jacobian.sum(0).mean(1)
        assert jnp.linalg.norm(path - own) < jnp.linalg.norm(equal - own) + 1e-6


def test_weights_as_twins_make_the_exact_paths():
    units, params, mstate, _ = setup("conv")
    exact, walked = composed(units, params, mstate), composed(units, params, mstate, params)
    assert max_difference(exact, walked) < 1e-6


def without_last_kernel(params):
    """The parameters, those of the first block's last convolution without singular values."""
    name = "units/1/body/1/map/kernel"
    f = params[1][name]
    return (params[0], params[1] | {name: f._replace(s=0 * f.s)}, *params[2:])


@pytest.mark.parametrize("activation", [None, nnx.relu])
def test_path_passes_an_identity_block_without_its_last_kernel_through_the_gate_alone(activation):
    model = NETWORKS["residual"](0.5)
    model.units[1].activation = activation
    units, params, mstate = apart(model)
    params = without_last_kernel(params)
    x = make_batch(INPUTS).images
    _, _, tape = forward(units, params, mstate, x)
    paths = composed(units, params, mstate)
    # The block's input is that of its activation, and its output.
    assert jnp.array_equal(tape.outputs[0], tape.outputs[1])
    if activation is None:
        assert jnp.array_equal(paths[0], paths[1])
        return
    above = jax.vjp(lambda h: predict(units[2:], params[2:], mstate[2:], h, train=True),
                    tape.outputs[1])[1]  # fmt: skip
    for c in range(CLASSES):
        unit_vectors = jnp.broadcast_to(jnp.eye(CLASSES)[c], (INPUTS, CLASSES))
        signal = above(SIGNS[:, None] * unit_vectors)[0]
        gated = jnp.where(tape.outputs[0] > 0, signal, 0)
        assert jnp.allclose(paths[0][c], jnp.tensordot(SIGNS, gated, 1) / INPUTS, atol=1e-6)
    assert not jnp.allclose(paths[0], paths[1], atol=1e-3)


def test_path_enters_a_norm_by_its_scale_over_the_deviation_of_the_batch():
    units, params, mstate, _ = setup("conv")
    paths = composed(units, params, mstate)
    name = "units/1/norm/scale"
    scaled = (params[0], params[1] | {name: 3 * params[1][name]}, *params[2:])
    tripled = composed(units, scaled, mstate)
    assert jnp.allclose(tripled[0], 3 * paths[0], atol=1e-5)
    assert max_difference(tripled[1:], paths[1:]) < 1e-6
    # A kernel of twice the size doubles the deviation too.
    name = "units/1/map/kernel"
    f = params[1][name]
    doubled = (params[0], params[1] | {name: f._replace(s=2 * f.s)}, *params[2:])
    same = composed(units, doubled, mstate)
    assert jnp.allclose(same[0], paths[0], atol=1e-4)
    # Running statistics are not those of the batch.
    assert (
        max_difference(composed(units, params, jax.tree.map(lambda m: 4 * m, mstate)), paths) == 0
    )


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
    _, error = output_error(logits, batch.labels)
    delta, expected = error, [error]
    for pullback in tape.pullbacks[:0:-1]:
        delta = pullback(delta)[1]
        expected.insert(0, delta)
    signals = walk(units, params, params, tape, error)
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


@pytest.mark.parametrize(("limit", "loops"), [(2**20, 0), (1000, 1)])
def test_per_channel_paths_that_fit_are_made_without_a_loop(limit, loops):
    units, params, mstate, shapes = setup("conv")
    plan = feedback.plan(shapes, "channel", limit)
    program = jax.make_jaxpr(lambda p: composed(units, p, mstate, plan=plan))(params)
    assert str(program).count("scan[") == loops


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


@pytest.mark.parametrize("rows", [1, 2 * INPUTS, CLASSES * INPUTS])
def test_per_channel_paths_are_the_mean_over_positions_in_chunks_or_not(rows):
    units, params, mstate, _ = setup("conv")
    full = composed(units, params, mstate)
    plan = FULL._replace(per_channel=True, rows=rows)
    for channel, path in zip(composed(units, params, mstate, plan=plan), full, strict=True):
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


def dense(path):
    return jnp.tensordot(path.basis, path.core, 1)


def with_classifier_of_rank(params, rank):
    name = next(k for k, w in params[-1].items() if w.ndim == 2)
    kernel = factors.to_dense(factors.from_dense(params[-1][name], rank))
    return (*params[:-1], params[-1] | {name: kernel})


@pytest.mark.parametrize("name", ["conv", "residual"])
def test_low_rank_paths_are_the_full_ones_in_the_directions_that_the_last_path_has(name):
    units, params, mstate, _ = setup(name)
    twins = split(name, 0.5, seed=7)[1]
    full = composed(units, params, mstate, twins)
    for rank in (1, 2, CLASSES):
        low = composed(units, params, mstate, twins, plan=FULL._replace(rank=rank))
        basis = low[-1].basis
        assert basis.shape == (CLASSES, rank)
        assert jnp.allclose(basis.T @ basis, jnp.eye(rank), atol=1e-5)
        leading = jnp.linalg.svd(full[-1].reshape(CLASSES, -1))[0][:, :rank]
        assert jnp.allclose(basis @ basis.T, leading @ leading.T, atol=1e-4)
        for path, whole in zip(low, full, strict=True):
            assert jnp.allclose(
                dense(path), jnp.tensordot(leading @ leading.T, whole, 1), atol=1e-4
            )


def test_low_rank_paths_are_the_full_ones_where_the_classifier_is_of_that_rank():
    units, params, mstate, shapes = setup("conv", 1.0)
    params = with_classifier_of_rank(params, 2)
    full = composed(units, params, mstate)
    low = composed(units, params, mstate, plan=FULL._replace(rank=2))
    assert max_difference([dense(p) for p in low], full) < 1e-5
    error = jax.random.normal(jax.random.key(0), (3, CLASSES))
    for path, whole, shape in zip(low, full, shapes[:-1], strict=True):
        sent = feedback.send(error, path, shape)
        assert jnp.allclose(sent, feedback.send(error, whole, shape), atol=1e-5)
    fewer = composed(units, params, mstate, plan=FULL._replace(rank=1))
    assert max_difference([dense(p) for p in fewer], full) > 1e-2


def test_the_bound_on_memory_chooses_how_many_directions_low_rank_paths_know():
    shapes = [(4, 4, 8), (32,), (100,)]
    # An entry of each hidden unit, and one of each output in the basis of each.
    direction = 4 * (4 * 4 * 8 + 32 + 2 * 100)
    full = 4 * 100 * (4 * 4 * 8 + 32)
    plan = feedback.plan(shapes, "low_rank", 7 * direction + 5)
    assert (plan.rank, plan.size, plan.full_size) == (7, 7 * direction, full)
    assert "low-rank (7 directions)" in str(plan)
    # No more than the entries of the last hidden unit, and full where that is as small.
    assert feedback.plan(shapes, "low_rank", 2**30).rank == 32
    assert feedback.plan([(4, 4, 8), (10,)], "low_rank", 2**30) == feedback.plan(
        [(4, 4, 8), (10,)], "full", 0
    )
    with pytest.raises(ValueError, match="raise it, or give feedback_form=channel"):
        feedback.plan(shapes, "low_rank", direction - 1)


def test_random_paths_of_low_rank_have_the_scale_of_full_ones():
    shapes = [(100, 100), (200,), (200,)]
    plan = FULL._replace(rank=20)
    first, second = feedback.random_paths(jax.random.key(1), shapes, [None] * 3, plan)
    assert first.core.shape == (20, 100, 100)
    assert jnp.allclose(first.basis.T @ first.basis, jnp.eye(20), atol=1e-5)
    assert float(jnp.var(dense(first))) == pytest.approx(1 / 200, rel=0.05)
    assert max_difference(first.basis, second.basis) > 1e-2
    error = jax.random.normal(jax.random.key(2), (3, 200))
    sent = feedback.send(error, second, (200,))
    assert jnp.allclose(sent, error @ dense(second), atol=1e-5)


@pytest.mark.parametrize("path", ["composed", "regression"])
@pytest.mark.parametrize(
    "name", [*EVERY, *(pytest.param(n, marks=pytest.mark.slow) for n in ("plain32", "resnet32"))]
)
def test_a_direct_signal_is_not_longer_than_the_true_one_whatever_normalises(name, path):
    """A mean is shorter than what it is the mean of; nor does it vanish in 32 layers."""
    if name in EVERY:
        units, params, mstate = split(name, 0.5)
        shape = IMAGE
    else:
        model, shape = small_model(name, CLASSES, 0.25, (16, 16, 3))
        units, params, mstate = apart(model, shape)
    batch, seen = make_batch(32, 1, shape), make_batch(16, 9, shape)
    network = Network(
        units, output_shapes(units, params, mstate, shape), seen.images, targets=seen.labels
    )
    method = METHODS["ssa"](network, FeedbackOptions(path=path))
    logits, _, tape = forward(units, params, mstate, batch.images)
    _, error = output_error(logits, batch.labels)
    state = method.init(jax.random.key(0), params, mstate)
    for sent, true in zip(
        method.signals(state, params, tape, error, batch), chain(tape, error), strict=True
    ):
        assert 0.1 < float(jnp.linalg.norm(sent) / jnp.linalg.norm(true)) < 1.01


def test_looking_ahead_to_the_output_is_backpropagation():
    units, params, mstate, _ = setup("conv")
    batch = make_batch()
    logits, _, tape = forward(units, params, mstate, batch.images)
    _, error = output_error(logits, batch.labels)
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
