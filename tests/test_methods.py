"""Every learning method: the protocol, and the theorems of each."""

import itertools

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import NETWORKS, make_batch, make_method, max_difference, split

from ssa_jax import losses, metrics
from ssa_jax.forward import forward
from ssa_jax.losses import LossWeights
from ssa_jax.methods import METHODS
from ssa_jax.methods.ssa import PATHS, UPDATES
from ssa_jax.train import init_state, local_gradients, make_refresh, make_step, true_gradients

SETTINGS = [
    *((name, {}) for name in METHODS if name != "ssa"),
    *(("ssa", {"path": p, "update": u, "every": 2}) for p, u in itertools.product(PATHS, UPDATES)),
]
IDS = ["-".join([name, *map(str, options.values())][:3]) for name, options in SETTINGS]


def run_once(name, network="conv", rank=0.5, options=None, key=0):
    """Signals and local gradients of one batch, beside the true gradients."""
    units, params, mstate = split(network, rank)
    method = make_method(name, units, params, mstate, **(options or {}))
    state = method.init(jax.random.key(key), params, mstate)
    batch = make_batch()
    logits, _, tape = forward(units, params, mstate, batch.images)
    _, error = losses.output_error(logits, batch.labels)
    signals = method.signals(state, params, tape, error, batch)
    gradients = local_gradients(params, method.twins(state), tape, signals, LossWeights())
    return tape, error, signals, gradients, true_gradients(units, params, mstate, batch)


@pytest.mark.parametrize("rank", [None, 0.5])
@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=IDS)
def test_protocol(name, options, rank):
    """One finite signal of the output's shape a unit; steps compile once and move every unit."""
    units, params, mstate = split("conv", rank)
    method = make_method(name, units, params, mstate, **options)
    batch = make_batch()
    logits, _, tape = forward(units, params, mstate, batch.images)
    _, error = losses.output_error(logits, batch.labels)
    feedback = method.init(jax.random.key(0), params, mstate)
    signals = method.signals(feedback, params, tape, error, batch)
    assert [d.shape for d in signals] == [h.shape for h in tape.outputs]
    assert all(bool(jnp.isfinite(d).all()) for d in signals)
    assert jnp.array_equal(signals[-1], error)

    compiled = []
    optimizer = optax.sgd(0.1)
    step = make_step(units, method, optimizer, LossWeights(), lambda: compiled.append(1))
    refresh = make_refresh(method)
    state = init_state(method, optimizer, params, mstate, jax.random.key(0))
    structure = jax.tree.structure(state)
    before = jax.tree.map(jnp.copy, params)
    for _ in range(3):
        state, measured = step(refresh(state), batch)
    assert len(compiled) == 1
    assert jax.tree.structure(state) == structure
    assert bool(jnp.isfinite(measured["loss"]))
    for old, new in zip(before, state.params, strict=True):
        assert max_difference(old, new) > 0


@pytest.mark.parametrize("rank", [None, 0.5])
@pytest.mark.parametrize("network", NETWORKS)
def test_bp_is_the_gradient(network, rank):
    *_, gradients, true = run_once("bp", network, rank)
    assert max_difference(gradients, true) < 1e-6


@pytest.mark.parametrize("name", METHODS)
def test_the_last_unit_learns_as_in_bp(name):
    *_, gradients, true = run_once(name)
    assert max_difference(gradients[-1], true[-1]) < 1e-6


def test_dfa_hidden_units_do_not():
    *_, gradients, true = run_once("dfa")
    assert max_difference(gradients[0], true[0]) > 1e-3


@pytest.mark.parametrize("rank", [None, 0.5])
def test_composed_tracked_is_bp_on_a_linear_network(rank):
    *_, gradients, true = run_once("ssa", "linear", rank, {"path": "composed"})
    assert max_difference(gradients, true) < 1e-6


@pytest.mark.parametrize("rank", [None, 0.5])
@pytest.mark.parametrize("network", NETWORKS)
def test_sequential_tracked_is_bp(network, rank):
    *_, gradients, true = run_once("ssa", network, rank, {"path": "sequential"})
    assert max_difference(gradients, true) < 1e-6


def test_fixed_twins_are_not_bp():
    *_, gradients, true = run_once("ssa", "linear", 0.5, {"update": "fixed"})
    assert max_difference(gradients[:-1], true[:-1]) > 1e-3


@pytest.mark.parametrize("path", ["composed", "random"])
def test_direct_signals_ignore_later_activations(path):
    units, params, mstate = split("conv", 0.5)
    method = make_method("ssa", units, params, mstate, path=path)
    feedback = method.init(jax.random.key(0), params, mstate)
    batch = make_batch()
    logits, _, tape = forward(units, params, mstate, batch.images)
    _, error = losses.output_error(logits, batch.labels)
    other = forward(units, params, mstate, 2 * batch.images + 1)[2]
    mixed = tape._replace(
        inputs=tape.inputs[:1] + other.inputs[1:],
        outputs=tape.outputs[:1] + other.outputs[1:],
        pullbacks=tape.pullbacks[:1] + other.pullbacks[1:],
    )
    ours = method.signals(feedback, params, tape, error, batch)[0]
    theirs = method.signals(feedback, params, mixed, error, batch)[0]
    assert jnp.array_equal(ours, theirs)


def test_tracked_twins_follow_at_a_refresh_only():
    units, params, mstate = split("conv", 0.5)
    method = make_method("ssa", units, params, mstate, every=5)
    assert method.refresh_every == 5
    feedback = method.init(jax.random.key(0), params, mstate)
    moved = jax.tree.map(lambda p: p + 1, params)
    assert max_difference(method.update(feedback, moved).twins, params) == 0
    assert max_difference(method.refresh(feedback, moved, mstate).twins, moved) == 0


def test_angles_are_zero_for_bp_and_for_the_last_unit_of_dfa():
    units, params, mstate = split("conv", 0.5)
    batch = make_batch(16)
    for name, hidden_at_zero in (("bp", True), ("dfa", False)):
        method = make_method(name, units, params, mstate)
        state = init_state(method, optax.sgd(0.1), params, mstate, jax.random.key(0))
        probe = metrics.make_probe(units, method, LossWeights())(state, batch)
        assert float(probe.angles[-1]) < 0.1
        assert (float(probe.angles[:-1].max()) < 0.1) == hidden_at_zero
        assert float(probe.drift) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "straight"}, "feedback must be one of composed"),
        ({"update": "never"}, "feedback_update must be one of fixed"),
        ({"every": 0}, "feedback_every must be at least 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    units, params, mstate = split("conv", 0.5)
    with pytest.raises(ValueError, match=message):
        make_method("ssa", units, params, mstate, **options)
