"""Every failure is found where it occurs, and in no run that lacks it."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from ssa_jax.reporting import diagnosis
from ssa_jax.reporting.diagnosis import diagnose
from ssa_jax.runs.config import Config
from ssa_jax.runs.run import run
from ssa_jax.training.ranks import SCHEDULES

ROOT = Path(__file__).parent.parent
ACCURACIES = (0.2, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7)


def healthy(accuracies=ACCURACIES, angle=40.0):
    """Rows of a run that learns on the manifold, without a rank step."""
    return [
        {"epoch": i, "train_accuracy": a, "test_accuracy": a, "angles": [angle, angle, 0.0],
         "drift": 1e-6}
        for i, a in enumerate(accuracies, start=1)
    ]  # fmt: skip


def cut(row, before, after):
    return {
        **row, "truncations": 1, "loss_before_truncation": before, "loss_after_truncation": after
    }  # fmt: skip


PLATEAU = (0.2, 0.3, 0.35, 0.36, 0.37, 0.37, 0.37, 0.37, 0.375)


def test_a_plateau_at_wide_angles_is_failing_alignment():
    (found,) = diagnose(healthy(PLATEAU, 75.0), Config(method="dfa"))
    assert (found.name, found.epoch, found.value) == ("alignment failing", 9, 75.0)
    assert "75° off" in found.shown
    assert "from 37.0 % to 37.5 % in the last 3 epochs" in found.shown
    # The output unit, whose gradient is exact, makes no angle narrower.
    rows = [{**row, "angles": [61.0, 0.0]} for row in healthy(PLATEAU)]
    assert diagnose(rows, Config())
    # Nor do hidden units whose gradients are exact, such as the upper one of two.
    rows = [{**row, "angles": [75.0, 0.02, 0.0]} for row in healthy(PLATEAU)]
    assert diagnose(rows, Config())[0].value == 75.0
    # At chance for ever is a plateau too.
    assert diagnose(healthy((0.1,) * 6, 90.0), Config())


@pytest.mark.parametrize(
    "rows",
    [
        healthy(PLATEAU, 59.0),
        healthy(ACCURACIES, 75.0),
        healthy((*PLATEAU[:-3], 0.96, 0.96, 0.96), 75.0),
        healthy(PLATEAU[:5], 75.0),
        [{**row, "angles": [0.0]} for row in healthy(PLATEAU)],
        [{**row, "angles": [0.02, 0.01, 0.0]} for row in healthy(PLATEAU)],
        [],
    ],
    ids=["narrow", "learns", "saturated", "short", "one-unit", "exact", "empty"],
)
def test_no_failing_alignment(rows):
    assert diagnose(rows, Config()) == []


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"method": "fa"}, "--method=ssa"),
        ({"feedback": "random"}, "--feedback=composed"),
        ({"feedback_update": "fixed"}, "--feedback_update=tracked"),
        ({"feedback": "sequential"}, "--feedback_every=1"),
        ({"feedback_lookahead": 1}, "--feedback_lookahead=2"),
        ({"unit_size": 4, "feedback_lookahead": 0}, "--unit_size=8"),
    ],
)
def test_the_flag_that_brings_the_signals_nearer(change, flag):
    (found,) = diagnose(healthy(PLATEAU, 75.0), Config(**change))
    assert found.flag == flag


def test_drift_above_the_bound_in_use():
    rows = healthy()
    rows[3]["drift"], rows[4]["drift"] = 0.02, 0.5
    (found,) = diagnose(rows, Config(retraction="none"))
    assert (found.name, found.epoch, found.value) == ("orthogonality lost", 4, 0.02)
    assert found.flag == "--retraction=series"
    assert diagnose(rows, Config(retract_every=10))[0].flag == "--retract_every=1"
    assert diagnose(rows, Config(drift_bound=0.1))[0].epoch == 5
    assert diagnose(rows, Config(drift_bound=1.0)) == []
    # A run that repairs nothing still says that it left the manifold.
    assert diagnose(rows, Config(drift_bound=0.0))[0].epoch == 4
    rows[1]["drift"] = float("nan")
    assert diagnose(rows, Config())[0].epoch == 2


def test_a_truncation_that_raises_the_loss():
    rows = healthy()
    rows[2], rows[5] = cut(rows[2], 1.0, 1.31), cut(rows[5], 1.0, 1.5)
    (found,) = diagnose(rows, Config(rank_schedule="hybrid"))
    assert (found.name, found.epoch, found.value) == ("sudden drop at a rank step", 6, 0.5)
    assert "from 1.00 to 1.50" in found.shown
    rows[2], rows[5] = cut(rows[2], 1.0, 1.29), cut(rows[5], 1.5, 1.0)
    assert diagnose(rows, Config(rank_schedule="hybrid")) == []


def test_an_epoch_of_truncation_that_costs_accuracy():
    rows = healthy()
    rows[5]["test_accuracy"] = 0.3
    # Without a truncation it is no matter of ranks.
    assert diagnose(rows, Config(rank_schedule="hybrid")) == []
    rows[5] = cut(rows[5], 1.0, 1.1)
    (found,) = diagnose(rows, Config(rank_schedule="hybrid"))
    assert (found.epoch, found.value) == (6, pytest.approx(0.2))
    assert "from 50.0 % to 30.0 %" in found.shown
    rows[5]["test_accuracy"] = 0.41
    assert diagnose(rows, Config(rank_schedule="hybrid")) == []


def test_every_flag_to_turn_exists():
    rows = [cut({**row, "drift": 1.0}, 1.0, 2.0) for row in healthy(PLATEAU, 80.0)]
    known = {field.name for field in dataclasses.fields(Config)}
    for schedule in SCHEDULES:
        for change in ({}, {"rank_budget": 0.3}, {"retraction": "none", "method": "dfa"}):
            found = diagnose(rows, Config(rank_schedule=schedule, **change))
            assert len(found) == 3
            for finding in found:
                names = re.findall(r"--(\w+)", str(finding))
                assert names
                assert set(names) <= known


STORED = sorted((ROOT / "results").glob("*/*/metrics.jsonl"))


@pytest.mark.parametrize("file", STORED, ids=[f.parent.name for f in STORED])
def test_stored_runs_that_learned_to_their_end_are_healthy(file):
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    stored = json.loads(file.with_name("config.json").read_text())["config"]
    known = {field.name for field in dataclasses.fields(Config)}
    # Of settings that are no more the judgement asks for none.
    config = Config(**{name: value for name, value in stored.items() if name in known})
    assert diagnose(rows, config) == []


def test_each_finding_is_told_once(capsys):
    rows = [cut(row, 1.0, 2.0) for row in healthy()]
    told = diagnosis.tell(diagnose(rows, Config()))
    assert capsys.readouterr().out == f"diagnosis: {told[0]}\n"
    assert diagnosis.tell(diagnose(rows, Config()), told) == told
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_run_without_retraction_is_told_so_while_it_runs(tmp_path, capsys):
    # Without the projection too, U and V leave the manifold at once.
    config = Config(
        dataset="digits", model="mlp", epochs=2, batch_size=128, retraction="none", watch=True,
        projection="none", drift_bound=0.0, workdir=str(tmp_path / "run"),
    )  # fmt: skip
    (found,) = run(config)["diagnosis"]
    assert (found["name"], found["epoch"]) == ("orthogonality lost", 1)
    assert found["flag"] == "--retraction=series"
    lines = capsys.readouterr().out.splitlines()
    (told,) = [i for i, line in enumerate(lines) if line.startswith("diagnosis: ")]
    assert lines[told - 1].startswith("epoch 1/2")
    assert lines[told + 1].startswith("epoch 2/2")
