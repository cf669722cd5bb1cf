"""Gradients that come late: variants of the study of the gap."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.studies import gap, trials
from experiments.studies.trials import Trial
from ssa_jax.factors import Factors
from ssa_jax.runs.config import Config
from ssa_jax.runs.run import run

SMALL = Config(
    method="svd_bp", dataset="digits", model="mlp", epochs=1, batch_size=128, train_size=1280
)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_updates_come_so_many_steps_late(steps):
    late = gap.late(steps)
    state = late.init(jnp.zeros(2))
    given = [jnp.full(2, float(i)) for i in range(1, 6)]
    handed = []
    for update in given:
        out, state = late.update(update, state)
        handed.append(float(out[0]))
    assert handed == [0.0] * steps + [1.0, 2.0, 3.0, 4.0, 5.0][: 5 - steps]


def test_momentum_at_once_is_the_run_of_its_name(tmp_path):
    rate = gap.FASTER * SMALL.learning_rate
    named = dataclasses.replace(SMALL, optimizer="momentum", learning_rate=rate)
    plain = run(dataclasses.replace(named, workdir=str(tmp_path / "plain")))
    variant = {v.name: v for v in gap.VARIANTS}["svd_bp_momentum"]
    config = dataclasses.replace(SMALL, workdir=str(tmp_path / "study"), **variant.changes)
    trial = Trial(variant.name, config)
    trials.run_trial(trial, lambda: None, lambda: gap.given(trial))
    found = trials.result(trial)
    assert found["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-5)
    assert found["test_accuracy"] == pytest.approx(plain["test_accuracy"], abs=0.005)


def test_stiefel_muon_turns_u_and_v_and_leaves_the_rest_to_adam():
    rng = np.random.default_rng(0)
    u, v = (jnp.linalg.qr(rng.normal(size=(8, 3)).astype(np.float32))[0] for _ in range(2))
    params = {"map": Factors(u, jnp.ones(3), v), "bias": jnp.zeros(4)}
    gradients = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)
    optimizer = gap.OPTIMIZERS["stiefel_muon"](optax.constant_schedule(0.01))
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    adam = optax.adam(0.01)
    expected, _ = adam.update(gradients, adam.init(params), params)
    for ours, theirs in (
        (updates["map"].s, expected["map"].s),
        (updates["bias"], expected["bias"]),
    ):
        assert jnp.allclose(ours, theirs, atol=1e-7)
    for x, moved in ((u, updates["map"].u), (v, updates["map"].v)):
        tangent = x.T @ moved + moved.T @ x
        assert jnp.abs(tangent).max() < 1e-6
        # Orthogonalised: a turn of about the rate, whatever the gradient's length.
        assert 0.05 < jnp.linalg.norm(moved, 2) < 0.15


def updates_of(variant, steps, **settings):
    """What the optimiser of a variant makes of the gradients 1, 2, ... of one number."""
    trial = Trial(variant, dataclasses.replace(SMALL, **settings))
    optimizer, params, moved = gap.given(trial).optimizer, jnp.zeros(2), []
    state = optimizer.init(params)
    for step in range(steps):
        update, state = optimizer.update(jnp.full(2, 1.0 + step), state, params)
        moved.append(float(jnp.abs(update).max()))
    return moved


@pytest.mark.parametrize(("settings", "steps"), [({}, 10), ({"train_size": 0}, 11)])
def test_the_rate_ends_where_the_training_does(settings, steps):
    moved = updates_of("svd_bp_momentum", steps + 1, **settings)
    assert moved[steps] == 0 < min(moved[1:steps])
    # Schedules do not go on behind the training.
    assert moved == updates_of("svd_bp_momentum", steps + 1, schedule_steps=99, **settings)


def test_a_late_variant_is_its_optimiser_on_gradients_of_the_step_before():
    rates = updates_of("svd_bp_momentum", 10)
    late = updates_of("svd_bp_momentum_late_1", 10)
    momentum, expected = 0.0, []
    for step, update in enumerate(rates):
        sent = sum(0.9**k * (1.0 + step - k) for k in range(step + 1))
        momentum = 0.9 * momentum + step
        expected.append(update / sent * momentum)
    assert late == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore::ssa_jax.transforms.NothingToActOn")
@pytest.mark.parametrize("variant", list(gap.LATE))
def test_a_variant_is_named_by_its_optimiser_and_its_delay(variant):
    name, steps = gap.LATE[variant]
    assert variant == f"svd_bp_{name}" + (f"_late_{steps}" if steps else "")
    moved = updates_of(variant, 9)
    assert moved[:steps] == [0.0] * steps
    assert min(moved[max(1, steps) : 9]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["svd_bp_muon_late_1", "svd_bp_stiefel_muon"])
def test_a_variant_learns(variant, tmp_path):
    changes = {v.name: v for v in gap.VARIANTS}[variant].changes
    config = dataclasses.replace(SMALL, workdir=str(tmp_path / "run"), epochs=3, **changes)
    trial = Trial(variant, config)
    trials.run_trial(trial, lambda: None, lambda: gap.given(trial))
    found = trials.result(trial)
    assert found["test_accuracy"] > 0.8
    assert found["drift"] < 1e-4
