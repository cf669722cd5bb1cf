"""Sequential feedback through a few singular directions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import (
    CLASSES,
    EVERY,
    IMAGE,
    apart,
    make_batch,
    make_method,
    max_difference,
    output_error,
    split,
    walk,
)

import ssa_jax
from ssa_jax import factors
from ssa_jax.factors import Factors, WithFeedback, linalg
from ssa_jax.layers import products
from ssa_jax.methods import METHODS, FeedbackOptions, Network, chain
from ssa_jax.methods.feedback import through_twins
from ssa_jax.methods.walk import BASES
from ssa_jax.models.feedforward import mlp
from ssa_jax.networks.forward import forward, output_shapes, visited
from ssa_jax.networks.units import group_units, in_precision
from ssa_jax.training import costs
from ssa_jax.training.losses import LossWeights
from ssa_jax.training.train import init_state, make_refresh, make_step


def signals(units, params, mstate, name="ssa", **options):
    method = make_method(name, units, params, mstate, **options)
    batch = make_batch()
    logits, _, tape = forward(units, params, mstate, batch.images)
    _, error = output_error(logits, batch.labels)
    state = method.init(jax.random.key(0), params, mstate)
    return method.signals(state, params, tape, error, batch), tape, error


def spread_spectra(params):
    """Spectra whose order of size is not that of the places."""

    def one(f):
        s = 0.2 + jnp.abs(jnp.sin(1 + 3.0 * jnp.arange(f.rank)))
        s = jnp.where(jnp.arange(f.rank) % 2, -1, 1) * s
        return f._replace(s=s.astype(jnp.float32))

    return factors.map_factors(one, params)


def masked(params, share):
    """The same shapes, with all but the largest singular values at zero: another way to cut."""

    def one(f):
        least = np.sort(np.abs(f.s))[::-1][int(np.ceil(share * f.rank)) - 1]
        return f._replace(s=jnp.where(jnp.abs(f.s) >= least, f.s, 0))

    return factors.map_factors(one, params)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("network", EVERY)
def test_all_directions_are_backpropagation_to_the_last_bit(network, basis):
    units, params, mstate = split(network, 0.5)
    ours, *_ = signals(units, params, mstate, path="sequential", rank=0.999, basis=basis)
    exact, *_ = signals(units, params, mstate, name="svd_bp")
    for a, b in zip(ours, exact, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("network", EVERY)
def test_a_share_is_the_walk_through_weights_without_their_small_singular_values(network, share):
    units, params, mstate = split(network, 0.5)
    params = spread_spectra(params)
    ours, tape, error = signals(units, params, mstate, path="sequential", rank=share)
    cut = walk(units, params, masked(params, share), tape, error)
    assert max_difference(ours, cut) < 1e-6
    exact, *_ = signals(units, params, mstate, name="svd_bp")
    assert max_difference(ours[0], exact[0]) > 1e-4


@pytest.mark.parametrize("basis", BASES)
def test_a_signal_takes_one_thin_product_a_layer(basis):
    """That with V_q: what goes through U is part of what the gradient of V takes as well."""
    model = mlp(IMAGE, CLASSES, rank=1.0, rngs=nnx.Rngs(0), hidden=(12, 9))
    units, params, mstate = apart(model)
    batch, optimizer = make_batch(), optax.sgd(0.1)

    def work(share):
        options = {"path": "sequential", "rank": share, "basis": basis}
        method = make_method("ssa", units, params, mstate, **options)
        state = init_state(method, optimizer, params, mstate, jax.random.key(0))
        return costs.macs(make_step(units, method, optimizer, LossWeights()), state, batch)

    def thin(share):
        layers = [f for unit in params[1:] for f in unit.values() if factors.is_factors(f)]
        each = (int(np.ceil(share * f.rank)) * f.v.shape[0] for f in layers)
        return len(batch.images) * sum(each)

    assert work(0.5) - work(0.25) == thin(0.5) - thin(0.25) > 0
    assert work(0.999) - work(0.5) == thin(0.999) - thin(0.5)


@pytest.mark.parametrize("size", [2, 3])
def test_groups_of_units_walk_alike(size):
    units, params, mstate = split("conv", 0.5)
    alone, *_ = signals(units, params, mstate, path="sequential", rank=0.5)
    grouped, *_ = signals(*group_units(units, params, mstate, size), path="sequential", rank=0.5)
    assert len(grouped) < len(alone)
    for ours in grouped:
        assert any(a.shape == ours.shape and max_difference(a, ours) < 1e-6 for a in alone)


def test_in_bfloat16_it_is_near():
    units, params, mstate = split("conv", 0.5)
    full, *_ = signals(units, params, mstate, path="sequential", rank=0.5)
    half, *_ = signals(
        in_precision(units, jnp.bfloat16), params, mstate, path="sequential", rank=0.5
    )
    assert all(float(linalg.angle(a, b)) < 5 for a, b in zip(full, half, strict=True))


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_gives_its_own_gradient_and_that_of_few_triplets_to_its_input(groups):
    rng = np.random.default_rng(1)
    shapes = ((3 * 4, 5), (5,), (3 * 6 // groups, 5))
    f = Factors(*(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes))
    x = jnp.asarray(rng.normal(size=(2, 7, 7, 6)), jnp.float32)
    places = jnp.asarray([3, 1])

    def layer(weights, x):
        return products.convolution(weights, x, (3, 3), (2, 1), "SAME", (1, 1), groups)

    y, pull = jax.vjp(layer, WithFeedback(f, places), x)
    g = jnp.asarray(rng.normal(size=y.shape), jnp.float32)
    own, back = pull(g)
    exact = jax.vjp(layer, f, x)[1](g)[0]
    thin = jax.vjp(lambda x: layer(factors.taken(f, places), x), x)[1](g)[0]
    np.testing.assert_array_equal(y, layer(f, x))
    np.testing.assert_allclose(back, thin, atol=1e-4)
    for a, b in zip(own.weights, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_a_layer_gives_its_own_gradient_and_that_of_few_triplets_to_its_input():
    rng = np.random.default_rng(0)
    shapes = ((5, 4), (4,), (7, 4))
    weights = Factors(*(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes))
    places = jnp.asarray([2, 0])
    x, g = (jnp.asarray(rng.normal(size=(3, n)), jnp.float32) for n in (7, 5))
    y, pull = jax.vjp(products.dense, WithFeedback(weights, places), x)
    own, through = pull(g)
    np.testing.assert_array_equal(y, products.dense(weights, x))
    thin = factors.to_dense(factors.taken(weights, places))
    np.testing.assert_allclose(through, g @ thin, rtol=1e-4)
    exact = jax.vjp(lambda f: products.dense(f, x), weights)[1](g)[0]
    for a, b in zip(own.weights, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def between(f, g, groups):
    """The cotangent of what V makes of the input, from that of a convolution by U."""

    def across(m):
        kernel = f.u.reshape(1, 3, 4, f.rank).swapaxes(2, 3)
        return jax.lax.conv_general_dilated(
            m, kernel, (1, 1), "SAME", feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    return jax.vjp(across, jnp.zeros((*g.shape[:3], f.rank * groups)))[1](g)[0]


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_weighs_its_triplets_and_passes_the_exact_signal(groups):
    rng = np.random.default_rng(2)
    shapes = ((3 * 4, 5), (5,), (3 * 6 // groups, 5))
    f = Factors(*(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes))
    x = jnp.asarray(rng.normal(size=(2, 7, 7, 6)), jnp.float32)

    def layer(weights, x):
        return products.convolution(weights, x, (3, 3), (2, 1), "SAME", (1, 1), groups)

    y, pull = jax.vjp(layer, WithFeedback(f, jnp.zeros(5)), x)
    # As small as a signal may be whose squares are no numbers any more.
    g = 1e-25 * jnp.asarray(rng.normal(size=y.shape), jnp.float32)
    own, back = pull(g)
    exact, through = jax.vjp(layer, f, x)[1](g)
    assert max_difference((own.weights, back), (exact, through)) < 1e-30
    inner = 1e25 * between(f, g, groups).reshape(-1, 5)
    wanted = jnp.sum(jnp.square(inner * f.s[None, :]), 0)
    np.testing.assert_allclose(own.places / own.places[0], wanted / wanted[0], rtol=1e-4)


def perceptron():
    units, params, mstate = apart(mlp(IMAGE, CLASSES, rank=1.0, rngs=nnx.Rngs(0), hidden=(12, 6)))
    return units, spread_spectra(params), mstate


def test_of_all_choices_that_by_the_error_is_nearest_to_the_true_signal():
    units, params, mstate = perceptron()
    batch = make_batch(4, 9)  # whose error is measured, see `make_method`
    logits, _, tape = forward(units, params, mstate, batch.images)
    _, error = output_error(logits, batch.labels)
    (name, f), *_ = ((n, f) for n, f in params[1].items() if factors.is_factors(f))
    exact = chain(tape, error)

    def miss(places):
        twins = list(params)
        twins[1] = params[1] | {name: jnp.asarray(places)}
        unit = visited(tape, params)[1]
        return float(jnp.sum((through_twins(units, twins)(unit, exact[1]) - exact[0]) ** 2))

    method = make_method("ssa", units, params, mstate, path="sequential", rank=1 / 3, basis="error")
    chosen = method.init(jax.random.key(0), params, mstate).places[1][name]
    misses = {c: miss(c) for c in itertools.combinations(range(f.rank), 2)}
    assert misses[tuple(sorted(np.asarray(chosen).tolist()))] == min(misses.values())
    assert miss(factors_of_largest(f, 2)) > 1.01 * min(misses.values())


def factors_of_largest(f, n):
    return np.argsort(-np.abs(f.s))[:n]


@pytest.mark.parametrize("network", EVERY)
def test_what_is_chosen_by_the_error_is_walked_as_the_weights_without_the_rest(network):
    units, params, mstate = split(network, 0.5)
    options = {"path": "sequential", "rank": 0.25, "basis": "error"}
    ours, tape, error = signals(units, params, mstate, **options)
    method = make_method("ssa", units, params, mstate, **options)
    places = method.init(jax.random.key(0), params, mstate).places
    kept = tuple(
        unit
        | {n: unit[n]._replace(s=jnp.zeros_like(unit[n].s).at[at].set(unit[n].s[at]))
           for n, at in chosen.items()}
        for unit, chosen in zip(params, places, strict=True)
    )  # fmt: skip
    assert max_difference(ours, walk(units, params, kept, tape, error)) < 1e-6


def test_the_choice_follows_the_error_of_the_last_batch_without_a_compilation():
    units, params, mstate = perceptron()
    options = {"path": "sequential", "rank": 0.5, "basis": "error", "every": 1}
    method, optimizer = make_method("ssa", units, params, mstate, **options), optax.sgd(0.01)
    state = init_state(method, optimizer, params, mstate, jax.random.key(0))
    compiled = []
    step = make_step(units, method, optimizer, LossWeights(), lambda: compiled.append(1))
    seen = []
    for seed in range(6):
        batch = make_batch(4, seed)
        state, _ = step(make_refresh(method)(state), batch)
        np.testing.assert_array_equal(state.feedback.examples[0], batch.images)
        seen.append(str(jax.tree.map(np.asarray, state.feedback.places)))
    assert len(set(seen)) > 1
    assert compiled == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "composed", "rank": 0.5}, "feedback_rank is of feedback=sequential"),
        ({"path": "sequential", "update": "fixed", "rank": 0.5}, "feedback_update=tracked"),
        ({"path": "sequential", "rank": 0.0}, r"feedback_rank must lie in \(0, 1\], got 0"),
        ({"path": "sequential", "rank": 1.5}, r"feedback_rank must lie in \(0, 1\]"),
        ({"path": "sequential", "rank": 0.5, "basis": "svd"}, "feedback_basis must be one of"),
    ],
)
def test_a_share_that_cannot_be_walked_is_refused(options, message):
    units, params, mstate = split("conv", 0.5)
    with pytest.raises(ValueError, match=message):
        make_method("ssa", units, params, mstate, **options)


def test_a_model_without_factors_is_refused():
    units, params, mstate = split("conv", None)
    method = make_method("ssa", units, params, mstate, path="sequential", rank=0.5)
    with pytest.raises(ValueError, match="this model has none"):
        method.init(jax.random.key(0), params, mstate)


def test_the_error_of_a_network_without_targets_is_not_known():
    units, params, mstate = split("conv", 0.5)
    network = Network(units, output_shapes(units, params, mstate, IMAGE), make_batch(4).images)
    options = FeedbackOptions(path="sequential", rank=0.5, basis="error")
    with pytest.raises(ValueError, match="feedback_basis=error needs targets"):
        METHODS["ssa"](network, options)


@pytest.mark.parametrize("basis", BASES)
def test_a_run_with_falling_ranks_walks_through_a_share_of_what_is_left(tmp_path, basis):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 256)
    images = rng.normal(size=(256, 8, 8, 1)).astype(np.float32) + labels[:, None, None, None]
    run = ssa_jax.fit(
        "mlp", (images, labels), feedback="sequential", feedback_rank=0.25, epochs=4,
        feedback_basis=basis, batch_size=32, rank_schedule="hybrid", rank_init=1.0,
        workdir=str(tmp_path / "run"),
    )  # fmt: skip
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"]
