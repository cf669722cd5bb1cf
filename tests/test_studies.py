"""Studies as a person meets them: cells, interruptions, tables, wrong commands."""

import dataclasses
import json
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import first
from streamed import stream

from experiments import folders
from experiments.measure import step_costs
from experiments.show import charts, variants
from experiments.show.variants import Column
from experiments.studies import (
    ablation,
    alignment,
    budget,
    convergence,
    depth,
    gap,
    methods,
    program,
    ranks,
    sensitivity,
    study,
    trials,
    tuning,
)
from experiments.studies.study import Settings, Study, Variant
from ssa_jax.errors import ConfigError
from ssa_jax.methods import METHODS
from ssa_jax.runs.config import Config
from ssa_jax.runs.workdir import WorkdirError

ROOT = Path(__file__).parent.parent
SMALL = Config(dataset="digits", model="mlp", epochs=1, batch_size=128)
STEPS = 11  # in an epoch


def pair(name="pair", **changes):
    """A study of BP and DFA; `changes` are those of the second variant."""
    compared = (
        Variant("bp", "BP", {"method": "bp"}),
        Variant("dfa", "DFA, much", {"method": "dfa", **changes}),
    )

    def columns(folder):
        assert folder.is_dir()
        return [
            Column("test accuracy", variants.accuracy),
            Column("angle", variants.hidden_angle),
            Column("parameters", variants.per_cent("params_ratio")),
        ]

    return Study(name, compared, columns, "A note.")


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


@pytest.mark.slow
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


@pytest.mark.slow
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
    program.show(pair(), settings(folder, 2), shared[1])
    page = (folder / "index.html").read_text()
    for line in table_lines(folder):
        for cell in line:
            assert f">{cell}<" in page
    for row in shared[1]:
        assert f">{row['variant']}-seed{row['seed']}<" in page
    record = json.loads((folder / "study.json").read_text())
    for fact in (record["hardware"], record["versions"]["jax"], record["commit"]):
        assert f">{fact}</td>" in page
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


@pytest.mark.slow
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
    (cell,) = [study.make_trial(once, pair().variants[0], 0)]
    study.run_study(pair(), once._replace(only=[]))
    cell.path.mkdir()
    record = {"config": dataclasses.asdict(cell.config)}
    (cell.path / "config.json").write_text(json.dumps(record))
    (row,) = study.run_study(pair(), once)
    assert row["status"] == "finished"


def test_a_cell_of_another_process_is_left_to_it(tmp_path, capsys):
    once = settings(tmp_path / "study")
    cell = study.make_trial(once, pair().variants[0], 0)
    cell.path.mkdir(parents=True)
    with folders.locked(cell.path):
        trials.run_trial(cell, lambda: pytest.fail("loads data for a cell that it leaves alone"))
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
    line = variants.table({"dfa": "DFA"}, [], both).splitlines()[-1]
    assert "1 not finite, 1 finished" in line


@pytest.mark.slow
def test_costs_count_the_share_of_a_refresh():
    forms = {v.name: v for v in methods.FORMS}
    configs = {
        name: dataclasses.replace(SMALL, **forms[name].changes)
        for name in ("bp", "ssa_direct", "ssa_sequential")
    }
    measured = step_costs.measure(configs, 3, study.load(SMALL))
    assert measured["hardware"]
    assert measured["batch_size"] == 128
    costs = measured["costs"]
    assert {name: c["refresh_every"] for name, c in costs.items()} == {
        "bp": 0, "ssa_direct": 10, "ssa_sequential": 1
    }  # fmt: skip
    for cost in costs.values():
        share = cost["refresh_ms"] / max(1, cost["refresh_every"])
        assert cost["ms"] == pytest.approx(cost["step_ms"] + share)
        assert cost["step_ms"] > 0
        assert cost["bytes"] > 0
        assert (cost["model"], cost["dataset"]) == ("mlp", "digits")


def test_a_step_on_streamed_images_has_its_costs_and_none_is_read():
    config = dataclasses.replace(SMALL, method="bp", batch_size=4)
    unreadable = stream(corrupt=range(23))
    measured = step_costs.measure({"bp": config}, 1, unreadable)
    assert measured["batch_size"] == 4
    assert measured["costs"]["bp"]["step_ms"] > 0
    assert measured["costs"]["bp"]["refresh_every"] == 0


def test_every_method_is_in_the_study_of_methods():
    assert {v.changes["method"] for v in methods.FORMS} == set(METHODS)


PROGRAMS = (
    ablation, alignment, budget, convergence, depth, gap, methods, ranks, sensitivity, tuning
)  # fmt: skip


@pytest.mark.parametrize("one", [p.STUDY for p in PROGRAMS], ids=lambda s: s.name)
def test_variants_have_names_of_their_own_and_settings_that_a_run_may_have(one):
    names = [v.name for v in one.variants]
    assert len(set(names)) == len(names)
    for variant in one.variants:
        dataclasses.replace(SMALL, **variant.changes).validate()
    assert set(one.quick_only) <= set(names)
    dataclasses.replace(SMALL, **{k: v for k, v in one.quick.items() if k != "seeds"})


def test_the_parts_of_ssa_are_dropped_one_at_a_time():
    full, *others = ablation.VARIANTS
    assert not full.changes
    base = Config(**ablation.DEFAULTS)
    off = {"alpha": 0.0, "beta": 0.0, "gamma": 0.0, "hoyer": 0.0, "projection": "none",
           "retraction": "none"}  # fmt: skip
    assert all(getattr(base, name) != value for name, value in off.items())
    dropped = [{k: v for k, v in x.changes.items() if k != "drift_bound"} for x in others]
    assert dropped == [{name: value} for name, value in off.items()]


def test_several_networks_share_the_methods_and_each_has_its_own_reference(tmp_path):
    networks = methods.networks_of(("mlp", "smallconv"), ("cifar10", "cifar100"))
    found = methods.study_of(networks)
    assert len(found.variants) == 4 * len(methods.FORMS)
    assert len({v.name for v in found.variants}) == len(found.variants)
    (ours,) = [v for v in found.variants if v.name == "smallconv_cifar100_ssa_direct"]
    assert (ours.changes["model"], ours.changes["dataset"]) == ("smallconv", "cifar100")
    assert ours.label == "smallconv on cifar100, ssa direct"
    costs = {"smallconv_cifar100_bp": {"ms": 2.0}, "mlp_cifar10_bp": {"ms": 1.0},
             ours.name: {"ms": 3.0}}  # fmt: skip
    (tmp_path / methods.COSTS).write_text(json.dumps({"costs": costs}))
    (column,) = [c for c in found.columns(tmp_path) if c.title == "step time"]
    assert column.text(ours.name, []) == "1.50"
    assert column.text("mlp_cifar100_ssa_direct", []) == "-"
    # One network is named by the settings, as in stored results.
    assert [v.name for v in methods.STUDY.variants] == [form.name for form in methods.FORMS]


def test_the_best_learning_rate_of_a_method_is_that_of_its_runs_that_stayed_finite(tmp_path):
    slow, fast, wild = tuning.RATES[0], tuning.RATES[3], tuning.RATES[-1]
    found = {f"dfa_{slow:g}": [0.4, 0.5], f"dfa_{fast:g}": [0.5, 0.6], f"bp_{slow:g}": [0.7]}
    rows = [
        {"variant": name, "test_accuracy": a, "status": "finished"}
        for name, accuracies in found.items()
        for a in accuracies
    ]
    rows.append({"variant": f"dfa_{wild:g}", "test_accuracy": 0.9, "status": "not_finite"})
    assert [tuning.best_rate(m, rows) for m in ("bp", "dfa", "ssa")] == [slow, fast, None]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert tuning.best_rates(tmp_path) == {"bp": slow, "dfa": fast}
    (column,) = [c for c in tuning.columns(tmp_path) if c.title.startswith("best")]
    marked = {v.name for v in tuning.VARIANTS if column.text(v.name, []) == "yes"}
    assert marked == {f"bp_{slow:g}", f"dfa_{fast:g}"}
    curves = {c.label: [p.y for p in c.points] for c in tuning.panel(rows).curves}
    assert curves == {"bp": [70.0], "dfa": [45.0, 55.0]}


def test_each_method_takes_the_rate_that_did_best_and_the_others_that_of_the_flags(tmp_path):
    row = {"variant": "dfa_0.001", "test_accuracy": 0.5, "status": "finished"}
    (tmp_path / "results.jsonl").write_text(json.dumps(row) + "\n")
    rates = tuning.best_rates(tmp_path)
    found = methods.study_of(methods.networks_of(("mlp",), ("cifar10",), rates)).variants
    changed = {v.name: v.changes.get("learning_rate") for v in found}
    assert changed.pop("dfa") == 0.001
    assert set(changed.values()) == {None}
    with pytest.raises(ConfigError, match="holds no runs of"):
        tuning.best_rates(tmp_path / "elsewhere")


def test_a_rate_is_the_exponent_of_a_power_of_the_step():
    steps = [10, 20, 40, 80]
    assert convergence.rate(steps, [3 / t**0.5 for t in steps]) == pytest.approx(-0.5)
    assert convergence.rate([10], [3.0]) is None
    rows = [{"step_by_epoch": steps, "train_loss_by_epoch": [t**p for t in steps]}
            for p in (-1, -2)]  # fmt: skip
    columns = {c.title: c for c in convergence.STUDY.columns(Path())}
    assert columns["rate of the loss"].text("", rows) == "-1.500 ± 0.707"


def test_curves_of_convergence_are_means_over_seeds_at_each_step():
    rows = [
        {"variant": "ssa", "status": "finished", "step_by_epoch": [10, 20],
         "train_loss_by_epoch": [loss, 1.0], "gradient_norm_by_epoch": [4.0, 2.0]}
        for loss in (1.0, 3.0)
    ]  # fmt: skip
    rows.append({"variant": "bp", "status": "not_finite", "step_by_epoch": []})
    loss, _ = convergence.panels(rows)
    points = {curve.label: curve.points for curve in loss.curves}
    assert not points["bp"]
    assert [(p.x, p.y) for p in points["ssa direct, 1 ahead"]] == [(10, 2.0), (20, 1.0)]
    assert [p.deviation for p in points["ssa direct, 1 ahead"]] == pytest.approx([2**0.5, 0])


def test_angles_by_epoch_are_in_the_table_and_in_the_panel_of_their_unit(tmp_path):
    rows = [
        {"variant": "dfa", "status": "finished", "test_accuracy": 0.5,
         **alignment.measured([{"angles": [80.0 + s, 70.0, 0.0]}, {"angles": [60.0, 50.0, 0.0]}])}
        for s in (0, 4)
    ]  # fmt: skip
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    shown = {c.title: c.text("dfa", rows) for c in alignment.columns(tmp_path)}
    assert shown == {"test accuracy": "50.00 ± 0.00 %", "epoch 1": "82° 70°", "epoch 2": "60° 50°"}
    assert alignment.at_epoch(3)("dfa", rows) == "-"
    first, second = alignment.panels(rows)
    (curve,) = [c for c in first.curves if c.points]
    assert [(p.x, p.y) for p in curve.points] == [(1, 82.0), (2, 60.0)]
    assert [p.y for c in second.curves for p in c.points] == [70.0, 50.0]


def test_the_frontier_has_every_hybrid_run_by_its_size_and_not_those_that_failed():
    def row(name, size, accuracy, status="finished"):
        return {"variant": name, "status": status, "params_ratio": size, "test_accuracy": accuracy}

    rows = [row("hybrid_50_99", 0.3, 0.7), row("hybrid_50_90", 0.2, 0.6),
            row("adaptive_20", 0.2, None, "not_finite")]  # fmt: skip
    drawn = {
        c.label: c.points for c in charts.frontiers(ranks.GROUPS, rows, "params_ratio") if c.points
    }
    (points,) = drawn.values()
    assert [(p.x, p.y) for p in points] == [(20, 60), (30, 70)]
    assert next(iter(drawn)).startswith("hybrid, 0.5 of r0")


def test_thirds_of_the_depth_are_means_over_their_hidden_units():
    rows = [{"angles": [10.0, 20.0, 30.0, 40.0, 99.0]}, {"angles": [30.0, 20.0, 50.0, 60.0, 99.0]}]
    # Four hidden units: the first, the next two, the last.
    shown = [depth.third("angles", part)("", rows) for part in range(3)]
    assert shown == ["20°", "30°", "50°"]
    assert depth.third("angles", 0)("", []) == "-"


def command(name, *args):
    network = ("--dataset=digits", "--model=mlp")
    if name == "methods":
        network = ("--datasets=digits", "--models=mlp")
    return subprocess.run(
        [sys.executable, "-m", f"experiments.studies.{name}", *network, *args],
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("program", "flag", "message"),
    first(
        [
            ("methods", "--only=bp,magic", "--only must be among bp, "),
            ("methods", "--method=bp", "--method is set by this study"),
            ("methods", "--model=mlp", "--model is set by this study"),
            ("tuning", "--feedback_lookahead=0", "--feedback_lookahead is set by this study"),
            ("methods", "--models=mlp,magic", "--models must be among mlp, "),
            ("methods", "--workdir=here", "a study takes --folder"),
            ("depth", "--epochs=1", "--model is set by this study"),
            ("gap", "--seeds=0", "--seeds must be at least 1, got 0"),
            ("ablation", "--energy=2", "--energy must be at most 1"),
            ("ablation", "--folder=/dev/null/x", "cannot write to /dev/null/x"),
        ],
        1,
    ),
)
def test_a_wrong_command_is_one_line_and_exit_code_2(program, flag, message):
    done = command(program, flag)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert message in done.stderr


@pytest.mark.long
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
    assert len(lines) == len(methods.QUICK_FORMS)
    assert all(float(cell) > 0 for line in lines for cell in line[4:6])


@pytest.mark.long
def test_ablation_from_the_command_line(tmp_path):
    folder = tmp_path / "study"
    done = command("ablation", "--quick", f"--folder={folder}", "--gamma=0.01")
    assert done.returncode == 0, done.stderr
    _, *lines = table_lines(folder)
    assert [x[0] for x in lines] == [v.label for v in ablation.VARIANTS]
    assert json.loads((folder / "full-seed0/config.json").read_text())["config"]["gamma"] == 0.01


@pytest.mark.long
def test_gap_from_the_command_line(tmp_path):
    folder = tmp_path / "study"
    done = command("gap", "--quick", f"--folder={folder}", "--only=svd_bp,lookahead_2")
    assert done.returncode == 0, done.stderr
    _, bp, ahead = table_lines(folder)
    # Two units ahead of a perceptron's first one is its output: the same training.
    assert bp[1:4] == ahead[1:4]


def test_the_table_of_exact_paths_is_its_record():
    record = json.loads((ROOT / "results/exact_paths/record.json").read_text())
    page = (ROOT / "docs/research.md").read_text()
    groups = {}
    for row in record["rows"]:
        groups.setdefault((row["model"], row["paths"]), []).append(row)
    for (model, paths), rows in groups.items():
        accuracies = [r["test_accuracy"] for r in rows]
        shown = f"{statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f} %"
        angle = statistics.mean(r["hidden_angle"] for r in rows)
        assert f"| {model} | {paths} | {shown} |" in page
        assert f"| {angle:.1f}° | {len(rows)} |" in page


def test_the_table_of_fixed_inputs_is_its_record():
    record = json.loads((ROOT / "results/fixed_inputs/record.json").read_text())
    page = (ROOT / "docs/research.md").read_text()
    groups = {}
    for row in record["rows"]:
        groups.setdefault(tuple(row[k] for k in ("model", "form", "epochs", "inputs")), []).append(
            row
        )
    assert len(groups) == 8
    for (model, form, epochs, inputs), rows in groups.items():
        cells = []
        for name, digits, unit in (("test_accuracy", 2, " %"), ("train_loss", 3, "")):
            values = [row[name] for row in rows]
            mean, spread = statistics.mean(values), ""
            if len(rows) > 1:
                spread = f" ± {statistics.stdev(values):.{digits}f}"
            cells.append(f"{mean:.{digits}f}{spread}{unit}")
        angle = f"{statistics.mean(row['hidden_angle'] for row in rows):.1f}°"
        shown = [f"{model}, {form}", str(epochs), inputs, *cells, angle, str(len(rows))]
        assert f"| {' | '.join(shown)} |" in page


def test_the_table_of_low_rank_walks_is_its_record():
    record = json.loads((ROOT / "results/low_rank_walk/record.json").read_text())
    page = (ROOT / "docs/research.md").read_text()
    # At its commit studies were programs of the folder above.
    assert record["command"].replace("experiments.", "experiments.studies.") in page
    assert record["commit"] in page
    for r in record["rows"]:
        shown = (
            f"| {r['model']} | {r['label']} | {r['train_loss']:.3f} | {r['test_accuracy']:.2f} % "
            f"| {r['gradient_angle']:.1f}° | {r['signal_angle']:.1f}° "
            f"| {r['macs_of_a_step']:.1f} M |"
        )
        assert shown in page


def test_the_tables_of_regression_are_their_record():
    record = json.loads((ROOT / "results/regression/record.json").read_text())
    page = (ROOT / "docs/research.md").read_text()
    assert record["command"].replace("experiments.", "experiments.studies.") in page
    for r in record["rows"]:
        angles = f"{r['gradient_angle']:.1f}° | {r['signal_angle']:.1f}°"
        assert (
            f"| {r['model']} | {r['label']} | {r['keep']} | {r['ridge']} | {r['train_loss']:.3f} "
            f"| {r['test_accuracy']:.2f} % | {angles} |"
        ) in page
    for r in record["refresh"]:
        costs = f"{r['composed']:.1f} M | {r['regression']:.1f} M"
        assert f"| {r['model']} | {r['outputs']} | {costs} |" in page


def test_the_table_of_16_pixels_is_its_record():
    record = json.loads((ROOT / "results/gap_16_pixels/record.json").read_text())
    page = (ROOT / "docs/research.md").read_text()
    assert record["command"] in page
    assert record["commit"] in page
    for r in record["rows"]:
        assert (
            f"| {r['label']} | {r['train_loss']:.3f} | {r['test_accuracy']:.2f} % "
            f"| {r['gradient_angle']:.1f}° | {r['signal_angle']:.1f}° |"
        ) in page


def test_the_tables_of_walks_by_the_error_are_their_record():
    record = json.loads((ROOT / "results/walk_by_error/record.json").read_text())
    page = (ROOT / "docs/research.md").read_text()
    assert record["command"] in page
    for r in record["rows"]:
        assert r["commit"][:7] in page
        angles = f"{r['gradient_angle']:.1f}° | {r['signal_angle']:.1f}°"
        assert (
            f"| {r['label']} | {r['train_loss']:.3f} | {r['test_accuracy']:.2f} % | {angles} "
            f"| {r['first_signal_ratio']:g} |"
        ) in page
    for k in record["kept"]:
        shares = " | ".join(f"{x:.2f}" for x in k["layers"])
        name = k["directions"].replace("|", "\\|")
        assert (f"| {k['steps']} | {name} | {shares} |" in page) == (k["share"] == "1/8")


def test_the_falls_of_digits_are_those_of_their_record():
    record = json.loads((ROOT / "results/digits_steps/record.json").read_text())
    page = (ROOT / "docs/research.md").read_text()
    for runs in record["runs"].values():
        falls = []
        for epochs in runs:
            late = range(math.ceil(len(epochs) / 3), len(epochs))
            falls.append(max(0.0, *(max(epochs[:i]) - epochs[i] for i in late)))
        first, second, third = (f"{x:.2f}" for x in falls)
        assert f"{first}, {second} and {third}" in page


def test_a_study_reads_the_data_that_its_flags_describe_once():
    config = Config(dataset="digits", image_size=4)
    data = study.load(config)
    assert data.image_shape == (4, 4, 1)
    assert study.load(dataclasses.replace(config, seed=1)) is data
    assert study.load(dataclasses.replace(config, image_size=0)).image_shape == (8, 8, 1)
