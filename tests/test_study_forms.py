"""The quick form of every study of the paper's questions, on CIFAR-10, from command to page."""

import base64
import importlib
import json
import os
import re
import runpy
import sys

import jax
import pytest
from absl import flags
from jax.experimental.compilation_cache import compilation_cache

from experiments.show import overhead_page, variants

# Those that train; overhead measures steps alone.
STUDIES = ("ablation", "alignment", "convergence", "finetune", "methods", "ranks", "sensitivity",
           "tuning")  # fmt: skip
# Of all others CIFAR-10.
DATA = {"finetune": {"mnist", "fashion_mnist"}}
needs_cifar = pytest.mark.skipif(
    not os.environ.get("TFDS_DATA_DIR"), reason="TFDS_DATA_DIR names no prepared data sets"
)


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Runs of a study share most of their programs, and so do studies."""
    names = ("jax_enable_compilation_cache", "jax_compilation_cache_dir",
             "jax_persistent_cache_min_compile_time_secs")  # fmt: skip
    before = {name: getattr(jax.config, name) for name in names}
    folder = before[names[1]] or str(tmp_path_factory.mktemp("compiled"))

    def turn_on():
        for name, value in zip(names, (True, folder, 0.0), strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    yield turn_on
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def command(monkeypatch, capsys, compiled_once):
    """Runs `python -m experiments.studies.NAME` in this process, which reads a data set once."""

    def run(name, *args):
        compiled_once()
        before = set(flags.FLAGS)
        monkeypatch.setattr(sys, "argv", [name, *args])
        try:
            with pytest.raises(SystemExit) as done:
                runpy.run_module(f"experiments.studies.{name}", run_name="__main__")
        finally:
            for flag in set(flags.FLAGS) - before:
                delattr(flags.FLAGS, flag)
        assert not done.value.code
        return capsys.readouterr().out

    return run


def results(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def table_lines(folder):
    lines = (folder / "table.md").read_text().splitlines()
    return [[c.strip() for c in x.strip("|").split("|")] for x in lines if x.startswith("| ")]


def assert_page_shows(folder, lines, pictures):
    page = (folder / "index.html").read_text()
    for line in lines:
        for cell in line:
            assert f">{cell}<" in page
    shown = [base64.b64decode(x) for x in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    assert {f.name for f in folder.glob("*.png")} == pictures
    assert sorted(shown) == sorted(f.read_bytes() for f in folder.glob("*.png"))


def stamps(folder):
    return {f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}


# These two take a minute and more; what they share with the others is tested there.
LONG = ("ablation", "finetune")


@needs_cifar
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.long if n in LONG else pytest.mark.slow) for n in STUDIES],
)
def test_a_quick_study_shows_what_its_runs_found_and_repeats_nothing(name, command, tmp_path):
    program, folder = importlib.import_module(f"experiments.studies.{name}"), tmp_path / "study"
    command(name, "--quick", f"--folder={folder}")
    rows = results(folder)
    assert {r["dataset"] for r in rows} == DATA.get(name, {"cifar10"})
    assert {r["status"] for r in rows} == {"finished"}
    header, *lines = table_lines(folder)
    labels = {v.name: v.label for v in chosen(program.STUDY)}
    assert {r["variant"] for r in rows} == labels.keys()
    assert [x[0] for x in lines] == list(labels.values())
    for variant, line in zip(labels, lines, strict=True):
        ours = [r for r in rows if r["variant"] == variant]
        assert line[1] == variants.accuracy(variant, ours)
        assert line[header.index("n")] == str(len(ours))
        for column in program.STUDY.columns(folder):
            assert line[header.index(column.title)] == column.text(variant, ours)
    assert_page_shows(folder, lines, {f"{name}.png", "curves.png"})
    CLAIMS.get(name, lambda rows: None)({r["variant"]: r for r in rows})
    before = stamps(folder)
    said = command(name, "--quick", f"--folder={folder}")
    assert said.count(": kept") == len(rows)
    assert "epoch 1/" not in said
    assert "measuring" not in said
    after = stamps(folder)
    assert {f.name for f in after if before.get(f) != after[f]} <= {
        "results.jsonl", "table.md", "index.html", f"{name}.png", "curves.png"
    }  # fmt: skip


def chosen(study):
    """The variants that the quick form runs, in the order of the study."""
    return [v for v in study.variants if v.name in (study.quick_only or [v.name])]


def ranks_end_where_their_schedule_says(rows):
    # A half of full rank, of which a half and nine tenths are left before the energy rule.
    assert rows["hybrid_50_90"]["rank_fraction"] <= 0.25
    assert 0.25 < rows["hybrid_90_99"]["rank_fraction"] <= 0.46
    assert rows["adaptive_20"]["params_ratio"] == pytest.approx(0.2, abs=0.005)


def every_epoch_is_followed(rows):
    for row in rows.values():
        steps = row["step_by_epoch"]
        assert steps == [10, 20, 30]
        assert all(norm > 0 for norm in row["gradient_norm_by_epoch"])


def only_dropped_retraction_drifts(rows):
    drifts = {name: row["drift"] for name, row in rows.items()}
    assert drifts.pop("no_retraction") > 1e-4
    assert max(drifts.values()) < 1e-4


def bp_has_no_angle_and_dfa_hardly_any_alignment(rows):
    for row in rows.values():
        assert len(row["hidden_angles"]) == 3
    assert max(max(angles) for angles in rows["bp"]["hidden_angles"]) < 0.1
    assert min(rows["dfa"]["hidden_angles"][-1]) > 60


CLAIMS = {
    "ablation": only_dropped_retraction_drifts,
    "alignment": bp_has_no_angle_and_dfa_hardly_any_alignment,
    "convergence": every_epoch_is_followed,
    "ranks": ranks_end_where_their_schedule_says,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_quick_overhead_shows_what_it_measured_and_repeats_nothing(command, tmp_path):
    folder = tmp_path / "study"
    command("overhead", "--quick", f"--folder={folder}")
    rows = results(folder)
    header, *lines = table_lines(folder)
    assert len(lines) == len(rows) == 5
    for row, line in zip(rows, lines, strict=True):
        shown = dict(zip(header, line, strict=True))
        assert shown["step"] == overhead_page.label(row)
        assert shown["step time"] == f"{row['ms']:.2f} ms"
        assert shown["MACs of bp"] == f"{row['macs'] / rows[0]['macs']:.2f}"
        assert (shown["SVD"] == "-") == ("svd_ms" not in row)
    taped, streamed = rows[-2:]
    assert taped["svd_ms"] > 0
    assert 0 < taped["params_ratio"] == streamed["params_ratio"] < 0.5
    assert 0 <= taped["manifold_share"] < 1
    assert_page_shows(folder, lines, {"overhead.png"})
    before = stamps(folder)
    assert command("overhead", "--quick", f"--folder={folder}").startswith("mlp: kept\n")
    assert results(folder) == rows
    assert stamps(folder)[folder / "mlp.json"] == before[folder / "mlp.json"]
