"""Studies as a person meets them: cells, interruptions, tables, wrong commands."""

import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import ablation, cells, depth, gap, methods, step_costs, study, study_table
from experiments.config import Config, ConfigError
from experiments.study import Settings, Study, Variant
from experiments.study_table import Column
from experiments.workdir import WorkdirError
from ssa_jax.methods import METHODS

ROOT = Path(__file__).parent.parent
SMALL = Config(dataset="digits", model="mlp", epochs=1, batch_size=128)
STEPS = 11  # in an epoch


def pair(name="pair", **changes):
    """A study of BP and DFA; `changes` are those of the second variant."""
    variants = (
        Variant("bp", "BP", {"method": "bp"}),
        Variant("dfa", "DFA, much", {"method": "dfa", **changes}),
    )

    def columns(folder):
        assert folder.is_dir()
        return [
            Column("test accuracy", study_table.accuracy),
            Column("angle", study_table.hidden_angle),
            Column("parameters", study_table.per_cent("params_ratio")),
        ]

    return Study(name, variants, columns, "A note.")


def settings(folder, seeds=1, only=("bp", "dfa"), **change):
    return Settings(dataclasses.replace(SMALL, **change), seeds, folder, only)


def results(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def metric_rows(cell):
    return [json.loads(line) for line in (cell / "metrics.jsonl").read_text().splitlines()]


def table_lines(folder):
    lines = (folder / "table.md").read_text().splitlines()
    return [[c.strip() for c in x.strip("|").split("|")] for x in lines if x.startswith("| ")]


def files(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A study of two seeds, whose variants were run by two calls."""
    folder = tmp_path_factory.mktemp("shared") / "study"
    study.run_study(pair(), settings(folder, 2, only=["dfa"]))
    assert [r["variant"] for r in results(folder)] == ["dfa", "dfa"]
    return folder, study.run_study(pair(), settings(folder, 2, only=["bp"]))


def test_results_have_every_cell_of_the_folder(shared):
    folder, rows = shared
    assert results(folder) == rows
    assert [(r["variant"], r["seed"]) for r in rows] == [
        ("bp", 0), ("bp", 1), ("dfa", 0), ("dfa", 1)
    ]  # fmt: skip
    for row in rows:
        summary = json.loads(
            (folder / f"{row['variant']}-seed{row['seed']}/summary.json").read_text()
        )
        assert row == {"variant": row["variant"], **summary}
        assert summary["status"] == "finished"
    record = json.loads((folder / "study.json").read_text())
    assert record["hardware"]
    assert record["versions"]["jax"]


def test_table_has_mean_and_deviation_of_the_summaries(shared):
    folder, rows = shared
    header, *lines = table_lines(folder)
    assert header == ["variant", "test accuracy", "angle", "parameters", "n", "state"]
    assert [x[0] for x in lines] == ["BP", "DFA, much"]
    for name, line in zip(("bp", "dfa"), lines, strict=True):
        ours = [r for r in rows if r["variant"] == name]
        values = [100 * r["test_accuracy"] for r in ours]
        assert values[0] != values[1]
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        assert line[1] == f"{mean:.2f} ± {deviation:.2f} %"
        angles = [statistics.mean(r["angles"][:-1]) for r in ours]
        assert float(line[2].rstrip("°")) == pytest.approx(statistics.mean(angles), abs=0.051)
        assert line[3:] == ["100.0 %", "2", "finished"]


def test_the_page_has_the_table_every_run_and_the_curves(shared, tmp_path):
    folder = tmp_path / "study"
    shutil.copytree(shared[0], folder)
    study.show(pair(), settings(folder, 2), shared[1])
    page = (folder / "index.html").read_text()
    for line in table_lines(folder):
        for cell in line:
            assert f">{cell}<" in page
    for row in shared[1]:
        assert f">{row['variant']}-seed{row['seed']}<" in page
    record = json.loads((folder / "study.json").read_text())
    for fact in (record["hardware"], record["versions"]["jax"], record["commit"]):
        assert f"<td>{fact}</td>" in page
    assert page.count("data:image/png;base64,") == 1


def test_finished_cells_are_kept(shared, capsys):
    folder, rows = shared
    before = files(folder)
    assert study.run_study(pair(), settings(folder, 2)) == rows
    after = files(folder)
    changed = {p.name for p in before.keys() | after.keys() if before.get(p) != after.get(p)}
    assert changed == {"results.jsonl", "table.md"}
    assert capsys.readouterr().out.count("kept") == 4


def test_another_configuration_or_study_or_folder_is_refused(shared, tmp_path):
    folder, _ = shared
    before = files(folder)
    with pytest.raises(WorkdirError, match="another configuration: epochs=2 here and 1 there"):
        study.run_study(pair(), settings(folder, epochs=2))
    with pytest.raises(WorkdirError, match="holds the study 'pair'"):
        study.run_study(pair("other"), settings(folder))
    with pytest.raises(ConfigError, match="--learning_rate must be more than 0"):
        study.run_study(pair(learning_rate=0.0), settings(folder))
    assert files(folder) == before
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(WorkdirError, match="holds other things"):
        study.run_study(pair(), settings(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_interrupted_cell_goes_on(tmp_path, capsys):
    folder = tmp_path / "study"
    stopped = settings(folder, only=["bp"], epochs=2, max_steps=STEPS + 3)
    (row,) = study.run_study(pair(), stopped)
    assert row["status"] == "stopped"
    cell = folder / "bp-seed0"
    first = metric_rows(cell)[0]
    before = files(cell)
    assert study.run_study(pair(), stopped) == [row]
    assert files(cell) == before
    # As after a kill: a checkpoint of the first epoch, and no summary.
    (cell / "summary.json").unlink()
    (row,) = study.run_study(pair(), stopped._replace(config=dataclasses.replace(SMALL, epochs=2)))
    assert (row["status"], row["epochs"]) == ("finished", 2)
    assert metric_rows(cell)[0] == first
    assert [r["epoch"] for r in metric_rows(cell)] == [1, 2]
    assert "kept" in capsys.readouterr().out


def test_a_cell_that_ended_before_its_first_checkpoint_begins_anew(tmp_path):
    folder = tmp_path / "study"
    once = settings(folder, only=["bp"])
    (cell,) = [study.make_cell(once, pair().variants[0], 0)]
    study.run_study(pair(), once._replace(only=[]))
    cell.path.mkdir()
    record = {"config": dataclasses.asdict(cell.config)}
    (cell.path / "config.json").write_text(json.dumps(record))
    (row,) = study.run_study(pair(), once)
    assert row["status"] == "finished"


def test_a_cell_of_another_process_is_left_to_it(tmp_path, capsys):
    once = settings(tmp_path / "study")
    cell = study.make_cell(once, pair().variants[0], 0)
    cell.path.mkdir(parents=True)
    with cells.locked(cell.path):
        cells.run_cell(cell, lambda: pytest.fail("loads data for a cell that it leaves alone"))
    assert "another process is running it" in capsys.readouterr().out
    assert not list(cell.path.iterdir())


def test_a_failed_cell_is_reported_and_the_rest_runs(tmp_path, capsys):
    folder = tmp_path / "study"
    bad = pair(optimizer="momentum", learning_rate=1e12)
    bad = bad._replace(variants=bad.variants[::-1])
    rows = study.run_study(bad, settings(folder))
    assert [(r["variant"], r["status"]) for r in rows] == [
        ("dfa", "not_finite"), ("bp", "finished")
    ]  # fmt: skip
    assert "dfa-seed0 failed: loss or parameters are not finite" in capsys.readouterr().out
    _, failed, fine = table_lines(folder)
    assert failed == ["DFA, much", "-", "-", "-", "0", "not finite"]
    assert fine[-2:] == ["1", "finished"]
    before = files(folder / "dfa-seed0")
    assert study.run_study(bad, settings(folder)) == rows
    assert files(folder / "dfa-seed0") == before
    both = [*rows, {**rows[1], "variant": "dfa"}]
    line = study_table.table({"dfa": "DFA"}, [], both).splitlines()[-1]
    assert "1 not finite, 1 finished" in line


def test_costs_count_the_share_of_a_refresh():
    variants = {v.name: v for v in methods.VARIANTS}
    configs = {
        name: dataclasses.replace(SMALL, **variants[name].changes)
        for name in ("bp", "ssa_direct", "ssa_sequential")
    }
    measured = step_costs.measure(configs, rounds=3)
    assert measured["hardware"]
    assert (measured["model"], measured["batch_size"]) == ("mlp", 128)
    costs = measured["costs"]
    assert {name: c["refresh_every"] for name, c in costs.items()} == {
        "bp": 0, "ssa_direct": 10, "ssa_sequential": 1
    }  # fmt: skip
    for cost in costs.values():
        share = cost["refresh_ms"] / max(1, cost["refresh_every"])
        assert cost["ms"] == pytest.approx(cost["step_ms"] + share)
        assert cost["step_ms"] > 0
        assert cost["bytes"] > 0


def test_every_method_is_in_the_study_of_methods():
    assert {v.changes["method"] for v in methods.VARIANTS} == set(METHODS)
    for program in (methods, ablation, gap, depth):
        names = [v.name for v in program.VARIANTS]
        assert len(set(names)) == len(names)
        for variant in program.VARIANTS:
            dataclasses.replace(SMALL, **variant.changes).validate()


def test_thirds_of_the_depth_are_means_over_their_hidden_units():
    rows = [{"angles": [10.0, 20.0, 30.0, 40.0, 99.0]}, {"angles": [30.0, 20.0, 50.0, 60.0, 99.0]}]
    # Four hidden units: the first, the next two, the last.
    shown = [depth.third("angles", part)("", rows) for part in range(3)]
    assert shown == ["20°", "30°", "50°"]
    assert depth.third("angles", 0)("", []) == "-"


def command(program, *args):
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{program}", "--dataset=digits", "--model=mlp", *args],
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("program", "flag", "message"),
    [
        ("methods", "--only=bp,magic", "--only must be among bp, "),
        ("methods", "--method=bp", "--method is what this study varies"),
        ("methods", "--workdir=here", "a study takes --folder"),
        ("depth", "--epochs=1", "--model is what this study varies"),
        ("gap", "--seeds=0", "--seeds must be at least 1, got 0"),
        ("ablation", "--energy=2", "--energy must be at most 1"),
        ("ablation", "--folder=/dev/null/x", "cannot write to /dev/null/x"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(program, flag, message):
    done = command(program, flag)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert message in done.stderr


@pytest.mark.slow
def test_methods_from_the_command_line(tmp_path):
    folder = tmp_path / "study"
    done = command("methods", "--quick", f"--folder={folder}", "--only=bp")
    assert done.returncode == 0, done.stderr
    assert not (folder / "costs.json").exists()
    done = command("methods", "--quick", f"--folder={folder}")
    assert done.returncode == 0, done.stderr
    header, *lines = table_lines(folder)
    assert header[4:6] == ["step time", "step memory"]
    assert lines[0][4:6] == ["1.00", "1.00"]
    assert len(lines) == len(methods.VARIANTS)
    assert all(float(cell) > 0 for line in lines for cell in line[4:6])


@pytest.mark.slow
def test_ablation_from_the_command_line(tmp_path):
    folder = tmp_path / "study"
    done = command("ablation", "--quick", f"--folder={folder}", "--gamma=0.01")
    assert done.returncode == 0, done.stderr
    _, *lines = table_lines(folder)
    assert [x[0] for x in lines] == [v.label for v in ablation.VARIANTS]
    assert json.loads((folder / "full-seed0/config.json").read_text())["config"]["gamma"] == 0.01


@pytest.mark.slow
def test_gap_from_the_command_line(tmp_path):
    folder = tmp_path / "study"
    done = command("gap", "--quick", f"--folder={folder}", "--only=svd_bp,lookahead_2")
    assert done.returncode == 0, done.stderr
    _, bp, ahead = table_lines(folder)
    # Two units ahead of a perceptron's first one is its output: the same training.
    assert bp[1:4] == ahead[1:4]
