"""How far gradients are exact where it is not given: the network decides."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

import ssa_jax
from experiments.show.runs import method
from ssa_jax.networks.units import group_units
from ssa_jax.runs import network
from ssa_jax.runs.config import Config
from ssa_jax.runs.network import DEEP, decided
from ssa_jax.runs.workdir import WorkdirError
from ssa_jax.training.checkpoint import CheckpointError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 16)).astype(np.float32)
Y = (X[:, :8].sum(1) > X[:, 8:].sum(1)).astype(np.int32)


class Chain(nnx.Module):
    """A perceptron of a cut behind every hidden layer."""

    def __init__(self, hidden):
        rngs = nnx.Rngs(0)
        self.maps = nnx.List([nnx.Linear(16, 16, rngs=rngs) for _ in range(hidden)])
        self.out = nnx.Linear(16, 2, rngs=rngs)

    def __call__(self, x):
        for linear in self.maps:
            x = ssa_jax.cut(nnx.relu(linear(x)))
        return self.out(x)


def train(hidden, **settings):
    return ssa_jax.fit(Chain(hidden), (X, Y), epochs=2, batch_size=16, **settings)


@pytest.mark.parametrize(
    ("settings", "hidden", "size", "ahead"),
    [
        ({}, DEEP, 1, 1),
        ({}, DEEP + 1, 7, 0),
        ({"feedback": "regression"}, DEEP + 2, 8, 0),
        ({"feedback": "sequential"}, DEEP + 1, 1, 1),
        ({"method": "svd_bp"}, DEEP + 1, 1, 1),
        ({"method": "dfa"}, DEEP + 1, 1, 1),
        ({"feedback_lookahead": 0}, DEEP + 1, 1, 0),
        ({"feedback_lookahead": 1}, DEEP + 1, 1, 1),
        ({"unit_size": 1}, DEEP + 1, 1, 1),
        ({"unit_size": 2}, DEEP, 2, 0),
        ({"unit_size": 2, "feedback_lookahead": 1}, DEEP, 2, 1),
    ],
)
def test_what_is_not_given_the_network_decides(settings, hidden, size, ahead):
    config = decided(Config(**settings), hidden)
    assert (config.unit_size, config.feedback_lookahead) == (size, ahead)
    assert decided(config, hidden) == config
    given = {"unit_size": size, "feedback_lookahead": ahead}
    assert config == dataclasses.replace(Config(**settings), **given)


@pytest.mark.parametrize(
    ("hidden", "given", "named"),
    [
        (DEEP, {"unit_size": 1, "feedback_lookahead": 1}, "ssa direct, 1 ahead"),
        (DEEP + 1, {"unit_size": 7, "feedback_lookahead": 0}, "ssa direct, units of 7"),
    ],
)
def test_a_run_of_the_defaults_is_the_run_of_what_they_come_to(
    hidden, given, named, tmp_path, capsys
):
    runs, summaries = [], []
    for name, settings in (("default", {}), ("given", given)):
        runs.append(train(hidden, workdir=tmp_path / name, **settings))
        summaries.append(json.loads((tmp_path / name / "summary.json").read_text()))
    states = [jax.tree.leaves((run.state.params, run.state.feedback)) for run in runs]
    assert all(map(np.array_equal, *states))
    assert summaries[0]["train_loss"] == summaries[1]["train_loss"]
    assert [method(summary) for summary in summaries] == [named] * 2
    joined = "3 units of up to 7 neighbours," if given["unit_size"] > 1 else f"{hidden + 1} units,"
    told = capsys.readouterr().out
    assert told.count(joined) == 2
    how = "exact within joined units of up to 7" if given["unit_size"] > 1 else "1 unit ahead"
    assert told.count(f"; {how} (unit_size, feedback_lookahead)") == 2


def test_the_upper_unit_below_a_linear_output_learns_by_the_exact_gradient():
    """The path of its end is the output layer's map, which is exact."""
    run = train(DEEP + 1, feedback_every=1)
    assert [len(params) for params in run.state.params] == [14, 4, 2]
    lower, upper, _ = run.history[-1]["angles"]
    assert upper < 0.1 < lower


def test_a_stored_run_that_says_nothing_of_units_had_them_as_they_were(tmp_path):
    run = train(DEEP + 1, workdir=tmp_path / "run", unit_size=1, feedback_lookahead=0)
    file = tmp_path / "run" / "config.json"
    stored = json.loads(file.read_text())
    for name in ("unit_size", "feedback_lookahead"):
        del stored["config"][name]
    file.write_text(json.dumps(stored))
    again = ssa_jax.load(tmp_path / "run", model=Chain(DEEP + 1))
    assert again.built.config.unit_size == 1
    assert again.built.config.feedback_lookahead == 0
    assert all(map(np.array_equal, *(jax.tree.leaves(r.state.params) for r in (run, again))))


def test_a_resumed_run_of_the_defaults_is_the_uninterrupted_one(tmp_path):
    whole = train(DEEP + 1, workdir=tmp_path / "whole")
    train(DEEP + 1, workdir=tmp_path / "parts", max_steps=5, save_every=5)
    given = {"unit_size": 7, "feedback_lookahead": 0}
    stored = json.loads((tmp_path / "parts" / "config.json").read_text())["config"]
    assert given.items() <= stored.items()
    assert given.items() <= dataclasses.asdict(whole.config).items()
    # What the network decided may be given too.
    parts = train(DEEP + 1, workdir=tmp_path / "parts", resume=True, **given)
    states = [jax.tree.leaves(run.state.params) for run in (whole, parts)]
    assert all(map(np.array_equal, *states))


def test_a_deep_run_that_looked_ahead_is_gone_on_with_as_it_was_or_not_at_all(tmp_path):
    before = {"unit_size": 1, "feedback_lookahead": 1}
    whole = train(DEEP + 1, workdir=tmp_path / "whole", **before)
    train(DEEP + 1, workdir=tmp_path / "parts", max_steps=5, save_every=5, **before)
    with pytest.raises(
        WorkdirError, match="feedback_lookahead=0 here and 1 there, unit_size=7 here and 1 there"
    ):
        train(DEEP + 1, workdir=tmp_path / "parts", resume=True)
    parts = train(DEEP + 1, workdir=tmp_path / "parts", resume=True, **before)
    states = [jax.tree.leaves(run.state.params) for run in (whole, parts)]
    assert all(map(np.array_equal, *states))


@pytest.mark.slow
def test_joined_units_learn_over_stages_by_default():
    whole, parts = train(DEEP + 1), train(DEEP + 1, micro_batches=2)
    assert parts.built.bounds == (0, 3)
    losses = [run.history[-1]["train_loss"] for run in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_run_of_otherwise_divided_units_is_refused_and_stays_as_it_is(tmp_path, monkeypatch):
    """Such as one of before what is left over went to the last unit."""
    given = {"unit_size": 4, "feedback_lookahead": 0, "workdir": tmp_path / "run"}
    with monkeypatch.context() as before:
        before.setattr(network, "group_units", lambda u, p, m, size: group_units(u, p, m, 5))
        train(DEEP + 1, max_steps=5, save_every=5, **given)
    kept = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(
        CheckpointError, match=r"or whose units are divided otherwise: .* here and .* there"
    ):
        train(DEEP + 1, resume=True, **given)
    assert {p: p.read_bytes() for p in kept} == kept
