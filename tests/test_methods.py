"""Every learning method: the protocol, and the theorems of each."""

import itertools

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import (
    CLASSES,
    EVERY,
    IMAGE,
    apart,
    first,
    make_batch,
    make_method,
    max_difference,
    output_error,
    small_model,
    split,
)

from ssa_jax import factors
from ssa_jax.methods import METHODS, blend, chain, relay
from ssa_jax.methods.composed import composed_paths, over_positions
from ssa_jax.methods.feedback import plan
from ssa_jax.methods.grape import pushed
from ssa_jax.methods.local import READOUT_UPDATES, READOUTS, readout_loss
from ssa_jax.methods.ssa import PATHS, UPDATES
from ssa_jax.models import MODELS
from ssa_jax.networks.forward import forward, output_shapes
from ssa_jax.training import metrics
from ssa_jax.training.losses import LossWeights
from ssa_jax.training.passes import local_gradients
from ssa_jax.training.train import init_state, make_refresh, make_step, true_gradients

SETTINGS = [
    *((name, {}) for name in METHODS if name not in ("ssa", "local")),
    *(("ssa", {"path": p, "update": u, "every": 2}) for p, u in itertools.product(PATHS, UPDATES)),
    *(("local", {"readout": r, "readout_update": u})
      for r, u in itertools.product(READOUTS, READOUT_UPDATES)),
    ("dfa", {"form": "channel"}),
    ("ssa", {"form": "channel"}),
    ("ssa", {"path": "random", "form": "channel"}),
    ("ssa", {"lookahead": 1}),
]  # fmt: skip
IDS = ["-".join([name, *map(str, options.values())]) for name, options in SETTINGS]
# Of the protocol's cases, one for each kind of signal: backward, direct, twins, readouts.
QUICK = (
    ("bp", None),
    ("dfa", 0.5),
    ("ssa-composed-tracked-2", 0.5),
    ("local-predsim-learned", 0.5),
)
# Dense and factorised alike, but for the method that is about factors.
PROTOCOL = [
    pytest.param(
        name,
        options,
        rank,
        id=f"{text}-{rank}",
        marks=[] if (text, rank) in QUICK else pytest.mark.slow,
    )
    for (name, options), text in zip(SETTINGS, IDS, strict=True)
    for rank in (None, 0.5)
    if (name, rank) != ("svd_bp", None)
]
DIRECT = [(n, o) for n, o in SETTINGS if (n in ("dfa", "drtp", "local") or n == "ssa")
          and o.get("path") != "sequential" and "lookahead" not in o]  # fmt: skip


def run_once(name, network="conv", rank=0.5, options=None, key=0):
    """Signals and local gradients of one batch, beside the true gradients."""
    units, params, mstate = split(network, rank)
    method = make_method(name, units, params, mstate, **(options or {}))
    state = method.init(jax.random.key(key), params, mstate)
    batch = make_batch()
    logits, _, tape = forward(units, params, mstate, batch.images)
    _, error = output_error(logits, batch.labels)
    signals = method.signals(state, params, tape, error, batch)
    gradients = local_gradients(params, method.twins(state), tape, signals, LossWeights())
    return tape, error, signals, gradients, true_gradients(units, params, mstate, batch)


# The other architectures take the methods that differ in what they ask of a layer.
ASKING = (("svd_bp", {}), ("dfa", {}), ("ssa", {"lookahead": 1}), ("fa", {}), ("local", {}))
PROTOCOL = [
    *(pytest.param(*case.values, "conv", id=case.id, marks=case.marks) for case in PROTOCOL),
    *(
        pytest.param(name, options, 0.5, network, id=f"{name}-{network}", marks=marks)
        for network in ("inverted", "vit")
        for name, options in ASKING
        for marks in [[] if name in ("dfa", "ssa") and network == "vit" else pytest.mark.slow]
    ),
]


@pytest.mark.parametrize(("name", "options", "rank", "network"), PROTOCOL)
def test_protocol(name, options, rank, network):
    """One finite signal of the output's shape a unit; steps compile once and move every unit."""
    units, params, mstate = split(network, rank)
    method = make_method(name, units, params, mstate, **options)
    batch = make_batch()
    logits, _, tape = forward(units, params, mstate, batch.images)
    _, error = output_error(logits, batch.labels)
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


@pytest.mark.parametrize("rank", first([None, 0.5], 1))
@pytest.mark.parametrize("network", EVERY)
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
@pytest.mark.parametrize("network", EVERY)
def test_sequential_tracked_is_bp(network, rank):
    *_, gradients, true = run_once("ssa", network, rank, {"path": "sequential"})
    assert max_difference(gradients, true) < 1e-6


def test_fixed_twins_are_not_bp():
    *_, gradients, true = run_once("ssa", "linear", 0.5, {"update": "fixed"})
    assert max_difference(gradients[:-1], true[:-1]) > 1e-3


@pytest.mark.parametrize(("name", "options"), first(DIRECT, 6), ids=lambda x: str(x))
def test_direct_signals_ignore_later_activations(name, options):
    units, params, mstate = split("conv", 0.5)
    method = make_method(name, units, params, mstate, **options)
    feedback = method.init(jax.random.key(0), params, mstate)
    batch = make_batch()
    logits, _, tape = forward(units, params, mstate, batch.images)
    _, error = output_error(logits, batch.labels)
    other = forward(units, params, mstate, 2 * batch.images + 1)[2]
    ours = method.signals(feedback, params, tape, error, batch)
    for i in range(len(units)):
        n = i + 1
        mixed = tape._replace(
            inputs=tape.inputs[:n] + other.inputs[n:],
            outputs=tape.outputs[:n] + other.outputs[n:],
            pullbacks=tape.pullbacks[:n] + other.pullbacks[n:],
        )
        theirs = method.signals(feedback, params, mixed, error, batch)
        assert jnp.array_equal(ours[i], theirs[i])


QUICK_MODELS = ("mlp", "smallconv", "mobilenet_v3_small")


def network_of(model, rank, batch):
    """A model of the registry with a batch of images, and one step's worth of state."""
    network, shape = small_model(model, 10, rank)
    units, params, mstate = apart(network, shape)
    return units, params, mstate, make_batch(batch, shape=shape, classes=10), shape


@pytest.mark.parametrize("rank", first([0.5, None], 1))
@pytest.mark.parametrize(
    "model",
    [m if m in QUICK_MODELS else pytest.param(m, marks=pytest.mark.long) for m in MODELS],
)
def test_sequential_tracked_is_bp_on_every_model(model, rank):
    units, params, mstate, batch, shape = network_of(model, rank, 4)
    method = make_method("ssa", units, params, mstate, shape, path="sequential", every=1)
    state = init_state(method, optax.sgd(0.1), params, mstate, jax.random.key(0))

    @jax.jit
    def both(feedback, params, mstate):
        logits, _, tape = forward(units, params, mstate, batch.images)
        _, error = output_error(logits, batch.labels)
        signals = method.signals(feedback, params, tape, error, batch)
        ours = local_gradients(params, method.twins(feedback), tape, signals, LossWeights())
        return ours, true_gradients(units, params, mstate, batch)

    ours, true = both(state.feedback, params, mstate)
    for a, b in zip(ours, true, strict=True):
        size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(b))
        assert max_difference(a, b) < 1e-4 * size


@pytest.mark.parametrize("name", ["fa", "kp"])
def test_walking_twins_of_a_lost_rank_are_lost(name):
    units, params, mstate = split("conv", 0.5)
    method = make_method(name, units, params, mstate)
    twins = method.init(jax.random.key(0), params, mstate)
    cut = factors.map_factors(lambda f: f._replace(s=f.s.at[1:].set(0)), params)
    moved = method.update(twins, params, cut, None, None)
    assert all(int(jnp.count_nonzero(f.s)) == 1 for f in factors.leaves(moved))


def train(name, steps=40, **options):
    """Feedback and weights after some steps on one network."""
    units, params, mstate = split("conv", 0.5)
    method = make_method(name, units, params, mstate, **options)
    optimizer = optax.adam(1e-3)
    step = make_step(units, method, optimizer, LossWeights())
    state = init_state(method, optimizer, params, mstate, jax.random.key(0))
    first = jax.tree.map(jnp.copy, (state.feedback, state.params))
    for i in range(steps):
        state, _ = step(state, make_batch(16, seed=i))
    return first, (state.feedback, state.params)


def test_kp_feedback_meets_the_weights_at_its_rate():
    (twins, weights), (twins_after, weights_after) = train("kp", 40, rate=0.05)

    def gap(b, w):
        return jax.tree.map(jnp.subtract, b, w)

    expected = jax.tree.map(lambda d: 0.95**40 * d, gap(twins, weights))
    assert max_difference(gap(twins_after, weights_after), expected) < 1e-5


@pytest.mark.slow
def test_fa_feedback_never_moves_and_brsf_draws_anew():
    (twins, _), (twins_after, _) = train("fa", 3)
    assert max_difference(twins, twins_after) == 0
    (magnitudes, _), (magnitudes_after, _) = train("frsf", 3)
    assert max_difference(magnitudes, magnitudes_after) == 0
    (key, _), (key_after, _) = train("brsf", 3)
    assert not jnp.array_equal(jax.random.key_data(key), jax.random.key_data(key_after))


def test_usf_walks_through_the_weights_signs():
    _, params, _ = split("linear")
    _, _, signals, _, _ = run_once("usf", "linear", None)
    kernel = params[-1]["units/3/map/kernel"]
    signs = jnp.sign(kernel) * jnp.linalg.norm(kernel) / jnp.sqrt(kernel.size)
    assert jnp.allclose(signals[-2], signals[-1] @ signs.T, atol=1e-6)


def test_readouts_learn_or_stay():
    (first, _), (after, _) = train("local", 5)
    assert max_difference(first.readouts, after.readouts) > 1e-3
    (first, _), (after, _) = train("local", 5, readout_update="fixed")
    assert max_difference(first.readouts, after.readouts) == 0


def test_local_signals_are_gradients_of_the_written_readout_loss():
    units, params, mstate = split("conv", 0.5)
    method = make_method("local", units, params, mstate, readout="pred")
    state = method.init(jax.random.key(0), params, mstate)
    batch = make_batch()
    logits, _, tape = forward(units, params, mstate, batch.images)
    _, error = output_error(logits, batch.labels)
    signals = method.signals(state, params, tape, error, batch)
    for readout, h, signal in zip(state.readouts, tape.outputs[:-1], signals[:-1], strict=True):
        flat = h.reshape(len(h), -1)
        answers = flat @ readout["pred"]["kernel"] + readout["pred"]["bias"][None, :]
        wrong = (jax.nn.softmax(answers) - jax.nn.one_hot(batch.labels, CLASSES)) / len(h)
        expected = (wrong @ readout["pred"]["kernel"].T).reshape(h.shape)
        assert jnp.allclose(signal, expected, atol=1e-6)


def test_similarity_matching_vanishes_when_classes_are_separated():
    labels = jnp.array([0, 1, 2, 0, 1, 2])
    targets = jax.nn.one_hot(labels, 3)
    readout = {"sim": {"kernel": jnp.eye(3)}}
    assert float(readout_loss(readout, 4 * targets + 1, targets)) < 1e-8
    mixed = jax.nn.one_hot((labels + jnp.arange(6) // 3) % 3, 3)
    assert float(readout_loss(readout, mixed, targets)) > 0.1


def test_drtp_sends_the_targets():
    units, params, mstate = split("conv")
    method = make_method("drtp", units, params, mstate)
    paths = method.init(jax.random.key(0), params, mstate)
    batch = make_batch()
    logits, _, tape = forward(units, params, mstate, batch.images)
    _, error = output_error(logits, batch.labels)
    signals = method.signals(paths, params, tape, error, batch)
    for path, signal in zip(paths, signals[:-1], strict=True):
        assert jnp.allclose(signal, -path[batch.labels] / len(batch.labels), atol=1e-6)
    # Hidden units do not wait for the output.
    again = method.signals(paths, params, tape, 2 * error, batch)
    assert max_difference(again[:-1], signals[:-1]) == 0


@pytest.mark.parametrize("network", EVERY)
def test_a_forward_motion_is_the_adjoint_of_backpropagation(network):
    """<y, c> = sum of <u_i, J_i^T c>: what goes up by motions and what comes down by c agree."""
    units, params, mstate = split(network)
    _, _, tape = forward(units, params, mstate, make_batch().images)
    *motions, c = (
        jax.random.normal(jax.random.key(i), h.shape) for i, h in enumerate(tape.outputs)
    )
    y, expected, signal = pushed(tape, motions), 0.0, c
    for pullback, u in zip(reversed(tape.pullbacks[1:]), reversed(motions), strict=True):
        _, signal = pullback(signal)
        expected += float(jnp.vdot(u, signal))
    assert float(jnp.vdot(y, c)) == pytest.approx(expected, rel=1e-4)


def cosine(x, y):
    return float(jnp.vdot(x, y) / (jnp.linalg.norm(x) * jnp.linalg.norm(y)))


@pytest.mark.parametrize("form", ["full", "channel", "low_rank"])
def test_grape_turns_its_paths_to_the_jacobian(form):
    """Of a linear network, whose Jacobian is the same everywhere; at the length they had."""
    units, params, mstate = split("linear")
    options = {"form": form, "limit": 900} if form == "low_rank" else {"form": form}
    method = make_method("grape", units, params, mstate, rate=0.05, **options)
    _, _, tape = forward(units, params, mstate, make_batch(256).images)
    begun = state = method.init(jax.random.key(0), params, mstate)
    update = jax.jit(lambda state: method.update(state, params, params, tape, None))
    for _ in range(300):
        state = update(state)

    full = plan(output_shapes(units, params, mstate, IMAGE), "full", 0)
    jacobians = composed_paths(units, params, None, mstate, make_batch().images, full)
    for path, was, jacobian in zip(state.paths, begun.paths, jacobians, strict=True):
        if form == "low_rank":
            jacobian, path, was = jnp.tensordot(path.basis.T, jacobian, 1), path.core, was.core
        if form == "channel":
            jacobian = over_positions(jacobian)
        assert float(jnp.linalg.norm(path)) == pytest.approx(float(jnp.linalg.norm(was)), rel=1e-4)
        assert cosine(path, jacobian) > 0.9 > 0.5 > cosine(was, jacobian)


def test_svd_bp_needs_factors():
    units, params, mstate = split("conv")
    method = make_method("svd_bp", units, params, mstate)
    with pytest.raises(ValueError, match="backpropagation on factors, and this model has none"):
        method.init(jax.random.key(0), params, mstate)


def test_a_blend_adds_the_helper_and_keeps_the_rest():
    units, params, mstate = split("conv", 0.5)
    main, helper = (make_method(n, units, params, mstate) for n in ("ssa", "local"))
    both = blend(main, helper, 0.3)
    state = both.init(jax.random.key(0), params, mstate)
    batch = make_batch()
    logits, _, tape = forward(units, params, mstate, batch.images)
    _, error = output_error(logits, batch.labels)
    args = (params, tape, error, batch)
    ours, theirs = main.signals(state[0], *args), helper.signals(state[1], *args)
    mixed = both.signals(state, *args)
    assert (
        max_difference(
            mixed[:-1], [a + 0.3 * b for a, b in zip(ours[:-1], theirs[:-1], strict=True)]
        )
        < 1e-6
    )
    assert jnp.array_equal(mixed[-1], error)
    assert both.refresh_every == main.refresh_every
    assert max_difference(both.twins(state), params) == 0
    moved = both.update(state, params, params, tape, batch)
    assert max_difference(moved[1].readouts, state[1].readouts) > 0


def test_a_relay_hands_on_the_weights_and_a_state_that_followed_them():
    units, params, mstate = split("conv", 0.5)
    before, after = relay(*(make_method(n, units, params, mstate) for n in ("svd_bp", "ssa")))
    state = before.init(jax.random.key(0), params, mstate)
    batch = make_batch()
    logits, _, tape = forward(units, params, mstate, batch.images)
    _, error = output_error(logits, batch.labels)
    args = (params, tape, error, batch)
    assert max_difference(before.signals(state, *args), chain(tape, error)) == 0
    direct = make_method("ssa", units, params, mstate)
    alone = direct.refresh(state[1], params, mstate)
    assert max_difference(after.signals(state, *args), direct.signals(alone, *args)) == 0
    assert (before.refresh_every, after.refresh_every) == (0, direct.refresh_every)
    assert before.twins(state) is None
    moved = jax.tree.map(lambda p: p + 1, params)
    for method in (before, after):
        assert max_difference(after.twins(method.refresh(state, moved, mstate)), moved) == 0


def test_tracked_twins_follow_at_a_refresh_only():
    units, params, mstate = split("conv", 0.5)
    method = make_method("ssa", units, params, mstate, every=5)
    assert method.refresh_every == 5
    feedback = method.init(jax.random.key(0), params, mstate)
    moved = jax.tree.map(lambda p: p + 1, params)
    after = method.update(feedback, params, moved, None, make_batch())
    assert max_difference(after.twins, params) == 0
    assert max_difference(method.refresh(after, moved, mstate).twins, moved) == 0


@pytest.mark.parametrize("update", UPDATES)
def test_a_refresh_composes_paths_on_the_inputs_of_the_first_one(update):
    units, params, mstate = split("conv", 0.5)
    method = make_method("ssa", units, params, mstate, every=5, update=update)
    before = method.init(jax.random.key(0), params, mstate)
    batch = make_batch(seed=3)
    moved = jax.tree.map(lambda p: 1.1 * p, params)
    after = method.update(before, params, moved, None, batch)
    assert max_difference(after.paths, before.paths) == 0
    refreshed = method.refresh(after, moved, mstate)
    twins = moved if update == "tracked" else after.twins
    assert max_difference(refreshed.twins, twins) == 0
    full = plan(output_shapes(units, params, mstate, IMAGE), "full", 0)
    (inputs,) = before.examples
    assert max_difference(inputs, batch.images[: len(inputs)]) > 1e-3
    paths = composed_paths(units, moved, twins, mstate, inputs, full)
    assert max_difference(refreshed.paths, paths) < 1e-6
    assert max_difference(refreshed.paths, before.paths) > 1e-3


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
        ({"form": "sparse"}, "feedback_form must be one of auto"),
    ],
)
def test_bad_options_are_refused(options, message):
    units, params, mstate = split("conv", 0.5)
    with pytest.raises(ValueError, match=message):
        make_method("ssa", units, params, mstate, **options)


@pytest.mark.parametrize("option", ["readout", "readout_update"])
def test_bad_readouts_are_refused(option):
    units, params, mstate = split("conv", 0.5)
    with pytest.raises(ValueError, match=f"{option} must be one of"):
        make_method("local", units, params, mstate, **{option: "none"})
