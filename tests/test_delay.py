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


@pytest.mark.parametrize(("settings", "steps"), [({}, 10), ({"train_size": 0}, 11)])
def test_the_rate_ends_where_the_training_does(settings, steps):
    trial = Trial("svd_bp_momentum", dataclasses.replace(SMALL, **settings))
    optimizer = gap.given(trial).optimizer
    params, moved = jnp.zeros(2), []
    state = optimizer.init(params)
    for _ in range(steps + 1):
        update, state = optimizer.update(jnp.ones(2), state, params)
        moved.append(float(jnp.abs(update).max()))
    assert moved[steps] == 0 < min(moved[1:steps])
