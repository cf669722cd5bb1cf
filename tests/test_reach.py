"""What a direct signal can tell each unit of a trained network."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.measure import gates, reach
from ssa_jax.errors import ConfigError
from ssa_jax.methods import chain, composed
from ssa_jax.networks.forward import forward
from ssa_jax.networks.models import split
from ssa_jax.runs import network, trained
from ssa_jax.runs.config import Config
from ssa_jax.runs.run import run
from ssa_jax.training import train
from ssa_jax.training.tasks import output_error

ROOT = Path(__file__).parent.parent
DIGITS = Config(dataset="digits", epochs=1, batch_size=64, max_steps=6)


def trained_by(folder, method, model="mlp", **changes):
    run(dataclasses.replace(DIGITS, method=method, model=model, workdir=str(folder), **changes))
    return trained.restore(folder)


@pytest.fixture(scope="module", params=["svd_bp", pytest.param("bp", marks=pytest.mark.slow)])
def measured(request, tmp_path_factory):
    """A run, on factors or dense, and the forms on its weights; its folder stays as it is."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    read = trained_by(folder, request.param)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    rows = {row["form"]: row for row in reach.measure(read, 512)}
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    return read, rows


def test_the_path_through_the_linear_output_layer_is_exact(measured):
    _, rows = measured
    for row in rows.values():
        assert row["angles"][-1] < 0.5
        assert row["signal_angles"][-1] < 0.5
    # Below it stands a rectifier, which no path knows.
    assert rows[reach.LAYERS.label]["angles"][0] > 5


def test_one_ahead_two_hidden_layers_learn_by_backpropagation(measured):
    _, rows = measured
    assert max(rows["each layer a unit, one ahead"]["angles"]) < 0.1


def test_no_linear_map_of_the_error_is_nearer_than_the_regression(measured):
    """In the mean square over the examples it was measured on, here those of the probe too."""
    read, _ = measured
    built = reach._built(read, reach.LINEAR)
    batch = reach._batches(read)(0, 512)
    regressed = train.make_refresh(built.method)(reach._seeing(built.state, batch))
    layers = reach._built(read, reach.LAYERS)

    def errors(method, state):
        outputs, pullbacks = composed.pullbacks_of(
            built.units, state.params, None, state.mstate, batch.images
        )
        error = jax.nn.softmax(outputs) - jax.nn.one_hot(batch.labels, 10)
        (true,) = pullbacks[0](pullbacks[1](error)[0])
        sent = method.direct(state.feedback, error, batch, 0)
        return float(np.mean((sent - true) ** 2))

    assert errors(built.method, regressed) < errors(layers.method, layers.state)


def test_gates_bring_the_map_nearer_on_what_it_was_fitted_on(measured):
    """The linear maps are among the gated ones."""
    read, _ = measured
    built = reach._built(read, reach.LAYERS)
    batch = reach._batches(read)(0, 512)
    linear = reach._built(read, reach.LINEAR)
    seen = reach._seeing(linear.state, batch)
    regressed = train.make_refresh(linear.method)(seen)
    _, _, tape = forward(built.units, built.state.params, built.state.mstate, batch.images)
    _, error = output_error(built.weights.task, tape.outputs[-1], batch.labels)

    def missed(method, feedback):
        sent = method.signals(feedback, built.state.params, tape, error, batch)
        true = chain(tape, error)
        return [float(np.mean((a - b) ** 2)) for a, b in zip(sent[:-1], true[:-1], strict=True)]

    halves = [reach._batches(read)(start, 256) for start in (0, 256)]
    gated = missed(gates.nearest(built, halves), built.state.feedback)
    assert gated == pytest.approx(
        missed(gates.nearest(built, [batch]), built.state.feedback), rel=1e-2
    )
    linear_ones = missed(linear.method, regressed.feedback)
    assert gated[0] < 0.9 * linear_ones[0]
    # That of the last hidden unit is linear in the error, but for the ridges.
    assert max(gated[1], linear_ones[1]) < 1e-3 * linear_ones[0]


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_gates_that_are_seldom_open_do_no_harm(scale):
    """A signal that is linear in the error is found, and on other examples too."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(10, 64))

    def examples():
        logits, labels = 8 * rng.normal(size=(512, 10)), rng.integers(0, 10, 512)
        error = jax.nn.softmax(logits) / 100 - jax.nn.one_hot(labels, 10) / 100
        h = scale * np.maximum(rng.normal(-2.5, 1, (512, 64)), 0)
        f = gates.features(jnp.asarray(error, jnp.float32), jnp.asarray(h, jnp.float32))
        return f, jnp.asarray(error @ w, jnp.float32)

    f, true = examples()
    found = gates._solved(jnp.einsum("bfj,bgj->jfg", f, f), jnp.einsum("bfj,bj->jf", f, true))
    f, true = examples()
    missed = jnp.einsum("bfj,jf->bj", f, found) - true
    assert float(jnp.linalg.norm(missed) / jnp.linalg.norm(true)) < 3e-3


def test_a_gated_map_that_would_not_fit_is_left_out(measured, monkeypatch):
    read, rows = measured
    assert reach.GATED.label in rows
    batch = reach._batches(read)(0, 64)
    # Of 40 features for each of 512 entries, in float32.
    assert gates.size(reach._built(read, reach.LAYERS), batch) == 4 * 40**2 * 512
    monkeypatch.setattr(reach, "LARGEST", 4 * 40**2 * 512 - 1)
    assert reach.GATED.label not in {row["form"] for row in reach.measure(read, 64)}


def test_the_weights_are_those_of_the_run(measured):
    read, _ = measured
    built = reach._built(read, reach.LAYERS)
    there = jax.tree.leaves(split(read.model, read.data.example).params)
    here = jax.tree.leaves(built.state.params)
    assert len(there) == len(here)
    for a, b in zip(there, here, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_of_a_joined_run_every_grouping_is_measured(tmp_path):
    """Of four hidden layers one unit would be backpropagation, so units of two are the largest."""
    read = trained_by(tmp_path / "run", "ssa", "smallconv", unit_size=2)
    rows = {row["form"]: row for row in reach.measure(read, 256)}
    assert list(rows) == [*(form.label for form in reach.FORMS[:4]), "units of 2"]
    assert rows["units of 2"]["units"] == [2, 2]
    assert rows["units of 2"]["angles"][1] < 0.5
    assert rows["units of 2"]["angles"][0] < rows[reach.LAYERS.label]["angles"][0]


STORED = sorted((ROOT / "results/reach").glob("*.json"))


@pytest.mark.parametrize("file", STORED, ids=[f.stem for f in STORED])
def test_a_page_shows_the_stored_angles(file):
    assert (
        reach.table(json.loads(file.read_text())["rows"]) in (ROOT / "docs/research.md").read_text()
    )


def line(angles):
    return reach.advice([{"form": reach.LAYERS.label, "angles": angles}])


def test_the_last_line_says_from_where_up_a_direct_signal_will_do():
    assert "hidden layers 3 to 4, those next to the output," in line([9, 40, 20, 0])
    assert "of hidden layer 3, next to the output," in line([9, 40, 0])
    assert "of all hidden layers" in line([20, 0])
    assert "of no hidden layer" in line([20, 40])


def test_too_few_examples_are_told(measured):
    read, _ = measured
    with pytest.raises(ConfigError, match=r"lower --examples, now 9999"):
        next(reach.measure(read, 9999))


def test_a_run_with_fewer_examples_than_are_probed_is_told_so(tmp_path):
    read = trained_by(tmp_path / "run", "svd_bp", train_size=256)
    with pytest.raises(ConfigError, match=r"^4 batches of 64 examples are probed, and the run has"):
        next(reach.measure(read))


def test_by_itself_the_regression_takes_the_examples_that_are_there(measured):
    read, _ = measured
    assert reach._examples(read, None) == read.data.train_size - 4 * 64 < reach.EXAMPLES


def program(*flags):
    return subprocess.run(
        [sys.executable, "-m", "experiments.reach", *flags],
        cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_the_program_prints_a_table_and_keeps_the_figures(tmp_path):
    trained_by(tmp_path / "run", "svd_bp")
    kept = tmp_path / "new" / "reach.json"
    done = program(f"--workdir={tmp_path / 'run'}", "--examples=256", f"--out={kept}")
    assert done.returncode == 0, done.stderr
    record = json.loads(kept.read_text())
    assert record["command"].startswith("python -m experiments.reach --workdir=")
    assert [row["form"] for row in record["rows"]] == [form.label for form in reach.FORMS[:4]]
    for row in record["rows"]:
        assert row["form"] in done.stdout


@pytest.mark.slow
def test_the_default_of_a_deep_network_is_a_row_of_its_own(tmp_path, monkeypatch):
    read = trained_by(tmp_path / "run", "svd_bp", "smallconv")
    monkeypatch.setattr(network, "DEEP", 3)
    monkeypatch.setattr(network, "UPPER", 1)
    row = list(reach.measure(read, 64))[-1]
    assert row["form"] == "default, units of 3"
    assert row["units"] == [3, 1]
    assert row["signal_angles"][1] < 0.5 < row["signal_angles"][0]


def test_what_cannot_be_kept_is_told_before_it_is_measured(tmp_path):
    (tmp_path / "file").write_text("")
    done = program(f"--workdir={tmp_path / 'none'}", f"--out={tmp_path / 'file' / 'reach.json'}")
    assert done.returncode == 2
    assert "give another --out" in done.stderr
    done = program(f"--workdir={tmp_path / 'none'}", f"--out={tmp_path / 'reach.json'}")
    assert "holds no run" in done.stderr
    assert not (tmp_path / "reach.json").exists()


def test_a_folder_without_a_run_is_told(tmp_path):
    done = program(f"--workdir={tmp_path}")
    assert done.returncode == 2
    assert "holds no run" in done.stderr
