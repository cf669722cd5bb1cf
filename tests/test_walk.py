"""Sequential feedback through a few singular directions."""

import functools
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
from ssa_jax.methods.walk import BASES, holding, moments, principal
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
        few = [int(np.ceil(share * f.rank)) for f in layers]
        total = len(batch.images) * sum(n * len(f.v) for n, f in zip(few, layers, strict=True))
        if basis == "error" and share < 0.9:
            # P with the coefficients, and with V.
            both = (len(batch.images) + len(f.v) for f in layers)
            total += sum(n * f.rank * m for n, f, m in zip(few, layers, both, strict=True))
        return total

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
def test_a_convolution_passes_the_part_in_a_span_and_tells_of_the_whole(groups):
    rng = np.random.default_rng(2)
    shapes = ((3 * 4, 5), (5,), (3 * 6 // groups, 5))
    f = Factors(*(jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes))
    x = jnp.asarray(rng.normal(size=(2, 7, 7, 6)), jnp.float32)

    def layer(weights, x):
        return products.convolution(weights, x, (3, 3), (2, 1), "SAME", (1, 1), groups)

    y = layer(f, x)
    # As small as a signal may be whose squares are no numbers any more.
    g = 1e-25 * jnp.asarray(rng.normal(size=y.shape), jnp.float32)
    exact, through = jax.vjp(layer, f, x)[1](g)
    c = 1e25 * between(f, g, groups).reshape(-1, 5) * f.s[None, :]
    p = jnp.linalg.qr(jnp.asarray(rng.normal(size=(5, 2)), jnp.float32))[0]
    for span in (jnp.eye(5), p):
        own, back = jax.vjp(layer, WithFeedback(f, span), x)[1](g)
        inside = Factors(f.u * f.s[None, :] @ span @ span.T, jnp.ones(5), f.v)
        assert max_difference(back, jax.vjp(functools.partial(layer, inside), x)[1](g)[0]) < 1e-29
        assert max_difference(own.weights, exact) < 1e-29
        told, wanted = own.passed / own.passed[0, 0], c.T @ c @ span
        np.testing.assert_allclose(told, wanted / wanted[0, 0], rtol=1e-3, atol=1e-4)
    assert max_difference(through, jax.vjp(layer, WithFeedback(f, jnp.eye(5)), x)[1](g)[1]) < 1e-29


def perceptron():
    units, params, mstate = apart(mlp(IMAGE, CLASSES, rank=1.0, rngs=nnx.Rngs(0), hidden=(12, 6)))
    return units, spread_spectra(params), mstate


BY_ERROR = {"path": "sequential", "basis": "error"}


def test_no_other_channel_of_its_rank_brings_a_nearer_signal_than_that_of_the_error():
    units, params, mstate = perceptron()
    batch = make_batch(4, 9)  # whose error is measured, see `make_method`
    true, tape, _ = exact(units, params, mstate, batch)
    (name, f), *_ = ((n, f) for n, f in params[1].items() if factors.is_factors(f))
    miss = functools.partial(missed, units, params, tape, true, name)
    method = make_method("ssa", units, params, mstate, rank=1 / 3, **BY_ERROR)
    span = method.init(jax.random.key(0), params, mstate).passed[1][name]
    assert max_difference(span.T @ span, jnp.eye(2)) < 1e-5
    least = miss(span)
    # All that the second and further directions of the error would bring.
    wanted = np.linalg.svd(true[0].reshape(4, -1), compute_uv=False)[2:]
    assert least == pytest.approx(np.sum(wanted**2), rel=2e-2)
    for seed in range(5):
        other = jnp.linalg.qr(span + 0.1 * jax.random.normal(jax.random.key(seed), span.shape))[0]
        assert miss(other) > least
    assert miss(factors.leading(f, 2)) > 1.01 * least


def test_where_no_error_was_seen_the_directions_are_those_of_the_spectrum():
    s = jnp.float32([0.1, -3.0, 1.0, 2.0])
    nothing = principal(jnp.zeros((4, 4)), s, 2)
    np.testing.assert_allclose(nothing @ nothing.T, jnp.diag(jnp.float32([0, 1, 0, 1])), atol=1e-6)
    # One direction is seen, however faintly, the next is the largest of the others.
    faint = 1e-20 * jnp.outer(jnp.float32([1, 0, 1, 0]), jnp.float32([1, 0, 1, 0]))
    one = principal(faint, s, 2)
    wanted = jnp.float32([[0.5, 0, 0.5, 0], [0, 1, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(one @ one.T, wanted, atol=1e-2)


def exact(units, params, mstate, batch):
    logits, _, tape = forward(units, params, mstate, batch.images)
    _, error = output_error(logits, batch.labels)
    return chain(tape, error), tape, error


def missed(units, params, tape, true, name, passed):
    """Of the true signal below unit 1, by what passes one of its layers."""
    twins = [params[0], params[1] | {name: passed}, *params[2:]]
    through = through_twins(units, twins)(visited(tape, params)[1], true[1])
    return float(jnp.sum(jnp.square(through - true[0])))


@pytest.mark.parametrize("network", EVERY)
def test_the_directions_of_the_error_are_a_walk_through_weights_in_their_span(network):
    units, params, mstate = split(network, 0.5)
    ours, tape, error = signals(units, params, mstate, rank=0.25, **BY_ERROR)
    method = make_method("ssa", units, params, mstate, rank=0.25, **BY_ERROR)
    passed = method.init(jax.random.key(0), params, mstate).passed
    within = tuple(
        unit | {n: f._replace(u=f.u @ (f.s[:, None] * p[n] @ (p[n].T / f.s[None, :])))
                for n, f in unit.items() if n in p}
        for unit, p in zip(params, passed, strict=True)
    )  # fmt: skip
    cut = walk(units, params, within, tape, error)
    for a, b in zip(ours, cut, strict=True):
        assert max_difference(a, b) < 1e-5 * float(jnp.abs(b).max())


def test_the_directions_follow_the_error_of_the_last_batch_without_a_compilation():
    units, params, mstate = perceptron()
    method = make_method("ssa", units, params, mstate, rank=0.5, every=1, **BY_ERROR)
    optimizer = optax.sgd(0.01)
    state = init_state(method, optimizer, params, mstate, jax.random.key(0))
    compiled = []
    step = make_step(units, method, optimizer, LossWeights(), lambda: compiled.append(1))
    seen = []
    for seed in range(6):
        batch = make_batch(4, seed)
        state, _ = step(make_refresh(method)(state), batch)
        np.testing.assert_array_equal(state.feedback.examples[0], batch.images)
        seen.append(state.feedback.passed)
    assert all(max_difference(a, b) > 1e-3 for a, b in itertools.pairwise(seen))
    assert compiled == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "composed", "rank": 0.5}, "feedback_rank is of feedback=sequential"),
        ({"path": "sequential", "update": "fixed", "rank": 0.5}, "feedback_update=tracked"),
        ({"path": "sequential", "rank": 0.0}, r"feedback_rank must lie in \(0, 1\], got 0"),
        ({"path": "sequential", "rank": 1.5}, r"feedback_rank must lie in \(0, 1\]"),
        ({"path": "sequential", "rank": 0.5, "basis": "svd"}, "feedback_basis must be one of"),
        ({"path": "composed", "energy": 0.5}, "feedback_energy is of feedback=sequential"),
        ({"path": "sequential", "energy": 0.5}, "feedback_energy is the error's"),
        (BY_ERROR | {"energy": 0.0}, r"feedback_energy must lie in \(0, 1\], got 0"),
        (BY_ERROR | {"energy": 1.5}, r"feedback_energy must lie in \(0, 1\]"),
    ],
)
def test_a_share_that_cannot_be_walked_is_refused(options, message):
    units, params, mstate = split("conv", 0.5)
    with pytest.raises(ValueError, match=message):
        make_method("ssa", units, params, mstate, **options)


def test_the_fewest_directions_that_hold_an_energy_are_taken():
    """Of other examples than those in which they were found; all of them where there is none."""
    rng = np.random.default_rng(3)
    span = np.linalg.qr(rng.normal(size=(9, 9)))[0]
    seen, others = (
        span @ np.diag(d) @ span.T for d in (2.0 ** -np.arange(9), 3.0 ** -np.arange(9))
    )
    s = jnp.ones(9)
    held = np.cumsum(3.0 ** -np.arange(9)) / np.sum(3.0 ** -np.arange(9))
    for energy in (0.3, 0.6, 0.7, 0.9, 0.99, 1.0):
        n = int(holding(energy, jnp.float32(seen), jnp.float32(others), s))
        assert n == np.argmax(held >= energy - 1e-6) + 1
    assert int(holding(0.5, jnp.float32(seen), jnp.zeros((9, 9)), s)) == 9


@pytest.mark.parametrize("energy", [0.3, 0.7, 0.9])
def test_the_fewest_directions_are_taken_with_which_other_examples_keep_their_energy(energy):
    units, params, mstate = perceptron()
    method = make_method("ssa", units, params, mstate, energy=energy, **BY_ERROR)
    start = method.init(jax.random.key(0), params, mstate)
    batch = make_batch(4, 9)  # whose error is measured, see `make_method`
    seen, others = (
        batch._replace(images=batch.images[i::2], labels=batch.labels[i::2]) for i in (0, 1)
    )

    def error(outputs):
        return output_error(outputs, seen.labels)[1]

    (name, f), *_ = ((n, f) for n, f in params[1].items() if factors.is_factors(f))
    found = moments(units, params, mstate, seen.images, error)[1][name]
    n = int(method.resize.sizes(start, params, mstate)[1][name])
    true, tape, _ = exact(units, params, mstate, others)
    lost = functools.partial(missed, units, params, tape, true, name)
    whole = float(jnp.sum(jnp.square(true[0])))
    assert lost(principal(found, f.s, n)) <= (1 - energy) * whole * (1 + 1e-5)
    assert n == 1 or lost(principal(found, f.s, n - 1)) > (1 - energy) * whole


def test_a_walk_by_energy_starts_as_backpropagation_and_narrows_when_an_epoch_has_ended(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 256)
    images = rng.normal(size=(256, 8, 8, 1)).astype(np.float32) + labels[:, None, None, None]

    def trained(name, **change):
        return ssa_jax.fit(
            "mlp", (images, labels), epochs=3, batch_size=32, rank_init=1.0, factorize="on",
            workdir=str(tmp_path / name), **change,
        ).history  # fmt: skip

    walk = {"method": "ssa", "feedback": "sequential", "feedback_basis": "error"}
    exact = trained("exact", method="svd_bp")
    ours = trained("energy", feedback_energy=0.5, **walk)
    assert ours[0]["train_loss"] == exact[0]["train_loss"]
    assert ours[0]["directions"] == ours[0]["ranks"]
    assert sum(ours[1]["directions"].values()) < 0.7 * sum(ours[0]["directions"].values())
    assert ours[2]["train_loss"] != exact[2]["train_loss"]
    # After another method it narrows where it takes over, not when an epoch has ended.
    warm = {"warmup_method": "svd_bp", "warmup_until": 3}
    relayed = trained("warm", feedback_energy=0.5, **walk, **warm)
    assert sum(relayed[0]["directions"].values()) < sum(ours[0]["directions"].values())
    capped = trained("capped", feedback_energy=0.99, feedback_rank=0.25, **walk)
    for row in capped:
        for layer, n in row["directions"].items():
            assert n <= np.ceil(0.25 * row["ranks"][layer])


def test_an_energy_needs_two_examples():
    units, params, mstate = split("conv", 0.5)
    images, labels = make_batch(1)[:2]
    network = Network(units, output_shapes(units, params, mstate, IMAGE), images, targets=labels)
    method = METHODS["ssa"](network, FeedbackOptions(**BY_ERROR, energy=0.5))
    with pytest.raises(ValueError, match="needs a batch of at least two"):
        method.init(jax.random.key(0), params, mstate)


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
    first, last = (sum(row["ranks"].values()) for row in (run.history[0], run.history[-1]))
    assert last < first
    # What passes has become smaller with the ranks, and is found again.
    again = ssa_jax.load(tmp_path / "run")
    np.testing.assert_array_equal(again.predict(images), run.predict(images))
