"""The records say what was measured, and the benchmarks write what the records read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import records
from experiments import environment, timing

ROOT = Path(__file__).parent.parent


def test_records_are_made_from_the_stored_results():
    assert (ROOT / "RECORDS.md").read_text() == records.document()


@pytest.mark.parametrize("file", sorted(records.STORED.glob("*.json")), ids=lambda f: f.stem)
def test_stored_results_say_where_they_come_from(file):
    record = json.loads(file.read_text())
    assert file.stem in records.SECTIONS
    assert record["hardware"]
    assert record["versions"]["jax"]
    # A result of uncommitted code could not be repeated.
    assert record["commit"]
    assert not record["commit"].endswith("+")


def test_environment_names_what_is_missing():
    found = environment.environment("no-such-package")
    assert found["versions"]["no-such-package"] == "not installed"
    assert "CPUs" in found["hardware"]


def test_contestants_take_turns_and_their_preparation_is_off_the_clock():
    calls = []

    def contestant(name):
        def prepare():
            calls.append(f"prepare {name}")

        def call():
            calls.append(name)

        return prepare, call

    times = timing.side_by_side([contestant("a"), contestant("b")], rounds=4)
    assert [t.rounds for t in times] == [4, 4]
    measured = [c for c in calls if not c.startswith("prepare")]
    assert measured[:2] == ["a", "b"]
    assert measured[2:] == ["a", "a", "b", "b"] * 4
    assert all(t.min_ms <= t.median_ms for t in times)


@pytest.mark.slow
def test_stiefel_quick_writes_rows_with_errors_at_rounding(tmp_path):
    file = tmp_path / "rows.json"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.stiefel", "--quick", "--threads", "1",
         "--json", str(file)],
        cwd=ROOT, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    record = json.loads(file.read_text())
    ours = [r for r in record["rows"] if r["library"] == "ssa_jax"]
    assert {r["optimizer"] for r in ours} >= {"sgd", "momentum", "adam (matrix)", "muon"}
    assert all(r["error"] < 1e-6 and r["median_ms"] > 0 for r in ours)
    assert "| 96x16, sgd | 1 |" in records.stiefel(record)


@pytest.mark.slow
def test_inference_quick_writes_rows_beside_the_dense_network(tmp_path):
    file = tmp_path / "rows.json"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.inference", "--quick", "--notes", "A test.",
         "--json", str(file)],
        cwd=ROOT, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    record = json.loads(file.read_text())
    dense, *compact = (r for r in record["rows"] if r["batch"] == 1)
    assert dense["form"] == "dense"
    assert dense["ratio_to_dense"] == 1
    assert {r["form"] for r in compact} == {"factored", "auto"}
    for r in compact:
        assert r["macs"] < dense["macs"]
        assert r["bytes"] < dense["bytes"]
        assert r["ms"] > 0
    page = records.inference(record)
    assert "| mlp, auto at 0.5 |" in page
    assert "A test." in page


@pytest.mark.slow
def test_convolution_quick_writes_every_lowering_of_every_pass(tmp_path):
    file = tmp_path / "rows.json"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.convolution", "--quick", "--json", str(file)],
        cwd=ROOT, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    record = json.loads(file.read_text())
    passes = {r["pass"] for r in record["rows"]}
    assert passes == {"forward", "kernel gradient", "both"}
    for row in record["rows"]:
        assert row["ms"] > 0
        assert (row["ratio_to_lax"] == 1) or row["lowering"] != "lax"
    assert "| 3x3, 8 to 8 on 2x2, forward |" in records.convolution(record)
