"""Several seeds: each gives what it gives alone, and a folder tells them all."""

import dataclasses
import json
import shutil
import signal
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cifar, seeds, table
from experiments.show import comparison
from ssa_jax import data as data_lib
from ssa_jax.errors import ConfigError, NotFiniteError
from ssa_jax.factors import polar
from ssa_jax.parallel.interrupt import Terminated
from ssa_jax.runs import build, loop, run, workdir
from ssa_jax.runs.config import Config, differences, identity
from ssa_jax.runs.workdir import WorkdirError
from ssa_jax.training.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent
STEPS = 11
SMALL = Config(dataset="digits", model="mlp", batch_size=128, epochs=2, method="dfa")
# What may differ between two runs of one configuration.
TIMED = {"images_per_second", "wall_s", "compiles", "compile_s"}


def at(folder, **change):
    return dataclasses.replace(SMALL, workdir=str(folder), **change)


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in TIMED} for x in lines]


def last_state(folder):
    like = build.build(SMALL, data_lib.load("digits")).state
    config = identity(workdir.stored_config(folder))
    return Checkpoints(folder / "checkpoints", config=config).restore(like)[1]


def assert_equal_runs(folder, other):
    assert rows(folder) == rows(other)
    a, b = (jax.tree.leaves(last_state(f)._replace(key=None)) for f in (folder, other))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_batched_retraction_is_each_alone():
    """A matrix without full rank takes thirty iterations; its neighbour does not notice."""
    good = polar.orthonormalize(jax.random.normal(jax.random.key(0), (2, 12, 4))) * 1.01
    bad = jnp.zeros((12, 4)).at[0, 0].set(1.0)
    stack = jnp.concatenate([good, bad[None]])
    for batched in (jax.vmap(polar.orthonormalize), polar.orthonormalize):
        for matrix, q in zip(stack, batched(stack), strict=True):
            np.testing.assert_allclose(q, polar.orthonormalize(matrix), atol=1e-6)


def test_wrong_numbers_and_folders_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="--seeds must be at least 1, got 0"):
        seeds.run_seeds(at(tmp_path / "new"), 0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    with pytest.raises(WorkdirError, match="not empty; give another --workdir, or --resume"):
        seeds.run_seeds(at(tmp_path / "full"), 2)
    for name in ("full", "nothing"):
        with pytest.raises(WorkdirError, match="holds no seeds to resume"):
            seeds.run_seeds(at(tmp_path / name, resume=True), 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match=r"cannot write to .*give another --workdir"):
        seeds.run_seeds(at(tmp_path / "file"), 2)


def test_table_and_report_take_a_folder_of_seeds_for_its_runs(tmp_path, capsys):
    stored = ROOT / "results" / "cifar10_smallconv"
    for seed, method in ((10, "ssa"), (2, "bp")):
        shutil.copytree(stored / method, tmp_path / f"seed{seed}")
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "seedless").mkdir()
    assert workdir.runs_in(tmp_path) == [tmp_path / "seed2", tmp_path / "seed10"]
    assert [r.name for r in comparison.read([str(tmp_path)])] == ["seed2", "seed10"]
    table.main([str(tmp_path)])
    by_folder = capsys.readouterr().out
    table.main([str(tmp_path / "seed2"), str(tmp_path / "seed10")])
    assert capsys.readouterr().out == by_folder
    assert "80.47 %" in by_folder
    # A run stays a run, whatever else is in its folder.
    shutil.copytree(stored / "dfa", tmp_path / "seed2" / "seed0")
    assert workdir.runs_in(tmp_path / "seed2") == [tmp_path / "seed2"]


def test_seeds_of_summaries_that_lack_a_setting_are_summed_up(tmp_path):
    summary = (ROOT / "results" / "cifar10_smallconv" / "ssa" / "summary.json").read_text()
    assert "unit_size" not in json.loads(summary)
    config = Config(epochs=10, workdir=str(tmp_path), resume=True)
    for seed in (0, 1):
        (tmp_path / f"seed{seed}").mkdir()
        (tmp_path / f"seed{seed}" / "summary.json").write_text(summary)
        stored = {"config": dataclasses.asdict(dataclasses.replace(config, seed=seed))}
        (tmp_path / f"seed{seed}" / "config.json").write_text(json.dumps(stored))
    found = seeds.run_seeds(config, 2)
    assert found["unit_size"] is None
    assert (found["method"], found["test_accuracy"]["n"]) == ("ssa", 2)
    # Those that are done are none of other settings.
    with pytest.raises(WorkdirError, match=r"seed0 is a run of another .*: learning_rate=0.1 here"):
        seeds.run_seeds(dataclasses.replace(config, learning_rate=0.1), 2)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two seeds, and their summary."""
    folder = tmp_path_factory.mktemp("two") / "seeds"
    return folder, seeds.run_seeds(at(folder, seed=7), 2)


@pytest.mark.long
def test_seeds_leave_the_folders_of_separate_runs(two, tmp_path):
    folder, found = two
    for seed in (7, 8):
        ours, alone = folder / f"seed{seed}", tmp_path / f"seed{seed}"
        run.run(at(alone, seed=seed))
        assert_equal_runs(ours, alone)
        assert {p.name for p in ours.iterdir()} == {p.name for p in alone.iterdir()}
        record = json.loads((ours / "config.json").read_text())["config"]
        assert record["seed"] == seed
        assert not differences(at(ours, seed=seed), record)
        given = {name: record[name] for name in ("unit_size", "feedback_lookahead")}
        assert given == {"unit_size": 1, "feedback_lookahead": 1}
        assert identity(record) == identity(at(ours, seed=seed, **given))
    accuracies = [rows(folder / f"seed{s}")[-1]["test_accuracy"] for s in (7, 8)]
    assert found["test_accuracy"] == {
        "mean": pytest.approx(statistics.fmean(accuracies)),
        "deviation": pytest.approx(statistics.stdev(accuracies)),
        "n": 2,
    }
    assert found["statuses"] == ["finished", "finished"]
    assert json.loads((folder / "summary.json").read_text()) == found
    text = (folder / "table.md").read_text()
    mean, deviation = (100 * found["test_accuracy"][k] for k in ("mean", "deviation"))
    assert f"{mean:.2f} ± {deviation:.2f} %" in text
    assert all(f"| seed {seed} " in text for seed in (7, 8))


@pytest.mark.long
def test_more_seeds_go_on_from_those_that_are_done(two, tmp_path, capsys):
    shutil.copytree(two[0], tmp_path / "seeds")
    before = (tmp_path / "seeds" / "seed7" / "metrics.jsonl").stat().st_mtime_ns
    cifar.run_seeds(at(tmp_path / "seeds", seed=7, resume=True), 3)
    assert (tmp_path / "seeds" / "seed7" / "metrics.jsonl").stat().st_mtime_ns == before
    summary = json.loads((tmp_path / "seeds" / "summary.json").read_text())
    assert summary["seeds"] == [7, 8, 9]
    assert (tmp_path / "seeds" / "table.md").read_text() in capsys.readouterr().out


@pytest.mark.long
def test_seeds_that_are_stopped_within_an_epoch_go_on_bit_for_bit(two, tmp_path, monkeypatch):
    between = loop.Loop._between_steps

    def sending(self, step, means):
        if self.config.seed == 8 and step == STEPS + 4:
            signal.raise_signal(signal.SIGTERM)
        between(self, step, means)

    folder = tmp_path / "seeds"
    monkeypatch.setattr(loop.Loop, "_between_steps", sending)
    with pytest.raises(Terminated, match=f"SIGTERM; go on .*--workdir={folder} --resume"):
        seeds.run_seeds(at(folder, seed=7), 2)
    monkeypatch.undo()
    summary = json.loads((folder / "seed8" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("interrupted", STEPS + 4)
    seeds.run_seeds(at(folder, seed=7, resume=True), 2)
    for seed in (7, 8):
        assert_equal_runs(folder / f"seed{seed}", two[0] / f"seed{seed}")


@pytest.mark.long
def test_a_seed_that_is_not_finite_fails_alone(two, tmp_path, monkeypatch):
    begin = loop.Loop.begin

    def poisoned(self):
        begin(self)
        if self.config.seed == 8:
            params = jax.tree.map(lambda x: x * jnp.nan, self.trainer.state.params)
            self.trainer.state = self.trainer.state._replace(params=params)

    monkeypatch.setattr(loop.Loop, "begin", poisoned)
    with pytest.raises(NotFiniteError, match="not finite at seed 8; the means leave that out"):
        cifar.run_seeds(at(tmp_path / "seeds", seed=7), 2)
    found = json.loads((tmp_path / "seeds" / "summary.json").read_text())
    assert found["statuses"] == ["finished", "not_finite"]
    assert found["test_accuracy"]["n"] == 1
    assert found["test_accuracy"]["deviation"] is None
    assert_equal_runs(tmp_path / "seeds" / "seed7", two[0] / "seed7")
