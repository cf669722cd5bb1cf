"""The command line as a person meets it: results, resume, and errors of one line."""

import dataclasses
import importlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from absl import flags as absl_flags
from helpers import first
from PIL import Image

from experiments import flags, table
from experiments.seeds import run_seeds
from experiments.show import overhead_page, runs, variants
from ssa_jax.errors import ConfigError, NotFiniteError
from ssa_jax.methods.walk import BASES
from ssa_jax.networks.factorize import LeftDense
from ssa_jax.reporting.summary import best_epoch
from ssa_jax.runs import config as config_lib
from ssa_jax.runs import trained, workdir
from ssa_jax.runs.config import Config
from ssa_jax.runs.run import run
from ssa_jax.runs.workdir import WorkdirError

ROOT = Path(__file__).parent.parent
SMALL = Config(dataset="digits", model="mlp", epochs=3, batch_size=128)


def command(*args, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "experiments.cifar", *args],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, **kwargs,
    )  # fmt: skip


def rows(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One hybrid run on the digits, and its summary."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    config = dataclasses.replace(
        SMALL, rank_schedule="hybrid", rank_init=1.0, epochs=8, workdir=str(folder)
    )
    return config, folder, run(config)


def test_the_workdir_tells_the_run(finished):
    config, folder, summary = finished
    assert json.loads((folder / "summary.json").read_text()) == summary
    record = json.loads((folder / "config.json").read_text())
    decided = {"unit_size": 1, "feedback_lookahead": 1}
    assert record["config"] == dataclasses.asdict(config) | decided
    assert record["versions"]["jax"]
    assert [r["epoch"] for r in rows(folder)] == list(range(1, 9))
    wanted = {"method", "model", "dataset", "seed", "epochs", "test_accuracy", "params",
              "params_ratio", "macs_ratio", "ranks", "compiles", "wall_s"}  # fmt: skip
    assert wanted <= summary.keys()
    row = rows(folder)[-1]
    terms = {"local_task", "local_alignment", "local_orthogonality", "local_hoyer"}
    a_unit = {"angles", "weight_angles", "signal_angles", "subspace_angles",
              "gradient_ratios", "signal_ratios", "local_task"}  # fmt: skip
    assert terms | a_unit | {"train_loss", "test_accuracy", "ranks", "drift"} <= row.keys()
    assert {len(row[name]) for name in a_unit} == {3}
    assert row["subspace_angles"][-1] is None
    for name in ("angles", "weight_angles", "signal_angles", "drift"):
        assert summary[name] == row[name]


@pytest.mark.slow
def test_a_warm_up_is_its_method_until_the_other_takes_over(tmp_path):
    def losses(name, **changes):
        folder = str(tmp_path / name)
        run(dataclasses.replace(SMALL, epochs=2, workdir=folder, **changes))
        return [row["train_loss"] for row in rows(folder)]

    bp = losses("bp", method="svd_bp")
    warm = losses("warm", method="ssa", warmup_method="svd_bp", feedback_update="fixed")
    assert warm[0] == bp[0]
    assert warm[1] > bp[1] + 1e-3


def test_it_learns_and_stays_on_the_manifold(finished):
    _, folder, summary = finished
    assert summary["status"] == "finished"
    assert summary["diagnosis"] == []
    assert summary["test_accuracy"] > 0.7
    assert rows(folder)[-1]["train_loss"] < rows(folder)[0]["train_loss"]
    assert max(r["drift"] for r in rows(folder)) < 1e-4
    assert all(0 <= a < 90 for a in summary["angles"])


def test_ranks_shrink_tensors_and_compaction_leaves_the_accuracy(finished):
    _, folder, summary = finished
    first, last = rows(folder)[0]["ranks"], summary["ranks"]
    layers = ["0/units/0/map/kernel", "1/units/1/map/kernel"]
    # The first layer widens, and keeps its rank.
    assert first[layers[0]] == last[layers[0]] == 64
    assert last[layers[1]] < first[layers[1]]
    assert summary["params_ratio"] < 1
    assert summary["macs_ratio"] < 1
    compacted = [r for r in rows(folder) if "test_accuracy_before_compaction" in r]
    assert compacted
    for r in compacted:
        assert r["test_accuracy"] == r["test_accuracy_before_compaction"]
        assert r["test_loss"] == pytest.approx(r["test_loss_before_compaction"], rel=1e-5)
    # One compilation for each set of ranks that was trained at.
    trained = [json.dumps(r["ranks"]) for r in rows(folder)[:-1]]
    assert summary["compiles"] == len({*trained, "initial"} if compacted[0]["epoch"] == 1
                                      else {*trained})  # fmt: skip


def test_pictures_are_drawn(finished):
    _, folder, _ = finished
    for name in ("curves", "angles", "ranks"):
        with Image.open(folder / "plots" / f"{name}.png") as picture:
            assert picture.size[0] > 500
            low, high = picture.convert("L").getextrema()
            assert high - low > 100


def test_table_has_the_summary_numbers(finished, capsys):
    _, folder, summary = finished
    table.main([str(folder)])
    text = capsys.readouterr().out
    assert f"{100 * summary['test_accuracy']:.2f} %" in text
    assert "ssa direct, 1 ahead (hybrid ranks)" in text
    with pytest.raises(WorkdirError, match=r"holds no summary\.json of a run"):
        table.main([str(folder.parent)])


RUNS = sorted({f.parent.parent for f in (ROOT / "results").glob("*/*/summary.json")})
PAGES = [
    (ROOT / name).read_text() for name in ("docs/results.md", "docs/running.md", "docs/research.md")
]


@pytest.mark.parametrize("folder", RUNS, ids=[f.name for f in RUNS])
def test_a_page_shows_the_stored_runs(folder):
    summaries = [json.loads(f.read_text()) for f in folder.glob("*/summary.json")]
    for line in runs.table(summaries).splitlines()[2:]:
        cells = [c.strip() for c in line.strip("|").split("|")]
        pattern = r"\s*\|\s*".join(map(re.escape, cells))
        assert any(re.search(pattern, page) for page in PAGES), line


OVERHEAD = ROOT / "results" / "overhead"
STUDIES = sorted({f.parent for f in (ROOT / "results").glob("*/study.json")} - {OVERHEAD})


def line_of(first, *cells):
    """A pattern of a line of a table, of which the first cell is a pattern."""
    return r"\| *" + r" *\| *".join([first, *map(re.escape, cells)]) + r" *\|\n"


RULE = r"\|[-|:]*\n"


def test_a_page_shows_the_stored_overhead():
    rows = [json.loads(line) for line in (OVERHEAD / "results.jsonl").read_text().splitlines()]
    header, lines = overhead_page.table(rows)
    shown = line_of(*header) + RULE + "".join(line_of(*map(str, line)) for line in lines)
    assert any(re.search(shown, page) for page in PAGES)


@pytest.mark.parametrize("folder", STUDIES, ids=[f.name for f in STUDIES])
def test_a_page_shows_the_stored_studies(folder):
    """Also of variants that the study no longer has: whatever a page calls them."""
    name = json.loads((folder / "study.json").read_text())["study"]
    study = importlib.import_module(f"experiments.studies.{name}").STUDY
    summaries = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    labels = {v.name: v.label for v in study.variants}
    names = {row["variant"]: row["variant"] for row in summaries}
    whole = variants.lines(names, study.columns(folder), summaries)
    # Tables leave out what no row has.
    kept = [i for i, cells in enumerate(zip(*whole[1], strict=True)) if set(cells) != {"-"}]
    header, *lines = ([line[i] for i in kept] for line in (whole[0], *whole[1]))
    shown = [line_of(*header), RULE]
    for name, *numbers in lines:
        label = re.escape(labels[name]) if name in labels else r"[^|\n]*"
        shown.append(line_of(label, *numbers))
    assert any(re.search("".join(shown), page) for page in PAGES)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"method": "local", "readout": "pred"},
        {"feedback_form": "channel", "kappa": 0.1, "label_smoothing": 0.1},
        {"unit_size": 2, "feedback_lookahead": 1, "local_weight": 0.3},
        {"feedback_lookahead": 2, "feedback_update": "mutual", "beta": 1e-3},
    ],
    ids=lambda x: "-".join(x),
)
def test_options_of_the_feedback_run_to_the_end(change, tmp_path):
    summary = run(dataclasses.replace(SMALL, epochs=1, workdir=str(tmp_path / "run"), **change))
    assert summary["status"] == "finished"
    assert len(summary["angles"]) == (2 if "unit_size" in change else 3)
    assert ("paths of" in summary["feedback_note"]) == ("method" not in change)
    if change.get("feedback_lookahead") == 2:
        # Two units ahead of the first is the output: backpropagation but for the alignment term.
        assert max(summary["signal_angles"]) < 0.1


@pytest.mark.slow
def test_same_seed_same_run_and_another_seed_another(tmp_path):
    def losses(name, **change):
        run(dataclasses.replace(SMALL, workdir=str(tmp_path / name), epochs=2, **change))
        return [r["train_loss"] for r in rows(tmp_path / name)]

    first = losses("a")
    assert losses("b") == first
    assert losses("c", seed=1) != first


def test_a_run_that_stops_within_an_epoch_tells_what_it_reached(tmp_path):
    summary = run(dataclasses.replace(SMALL, max_steps=3, workdir=str(tmp_path / "run")))
    (last,) = rows(tmp_path / "run")
    assert (summary["status"], summary["epochs"], summary["steps"]) == ("stopped", 0, 3)
    for name in ("test_accuracy", "train_loss", "angles"):
        assert summary[name] == last[name] is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    "walk",
    [
        {},
        *({"feedback_basis": basis, "feedback_rank": 0.25} for basis in BASES),
        {"feedback_basis": "error", "feedback_energy": 0.8},
    ],
)
def test_resume_equals_an_uninterrupted_run(tmp_path, walk):
    change = {"rank_schedule": "hybrid", "rank_init": 1.0, "epochs": 4}
    if walk:
        change |= {"feedback": "sequential", **walk}
    whole = dataclasses.replace(SMALL, workdir=str(tmp_path / "whole"), **change)
    expected = run(whole)
    steps = expected["steps"] // 4
    initial, *later = (row["ranks"] for row in rows(tmp_path / "whole"))
    assert any(ranks != initial for ranks in later[:2])
    parts = dataclasses.replace(whole, workdir=str(tmp_path / "parts"))
    # Once at an epoch's end, once in the middle of an epoch, which is then repeated.
    first = run(dataclasses.replace(parts, max_steps=2 * steps))
    assert first["status"] == "stopped"
    resumed = dataclasses.replace(parts, resume=True)
    second = run(dataclasses.replace(resumed, max_steps=2 * steps + 3))
    # What was trained of an epoch was measured, and the summary tells it.
    last = rows(tmp_path / "parts")[-1]
    assert (second["status"], second["test_accuracy"]) == ("stopped", last["test_accuracy"])
    assert second["angles"] == last["angles"]
    summary = run(resumed)
    assert summary["status"] == "finished"
    timed = {"images_per_second", "wall_s", "compiles", "compile_s"}
    for a, b in zip(rows(tmp_path / "whole"), rows(tmp_path / "parts"), strict=True):
        assert {k: v for k, v in a.items() if k not in timed} == {
            k: v for k, v in b.items() if k not in timed
        }
    assert summary["test_accuracy"] == expected["test_accuracy"]
    # Every part compiles anew, and what compiling cost is that of all parts.
    assert first["compiles"] < second["compiles"] < summary["compiles"]
    assert first["compile_s"] < second["compile_s"] < summary["compile_s"]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path):
    folder = tmp_path / "nan"
    config = dataclasses.replace(
        SMALL, method="bp", optimizer="momentum", learning_rate=1e12, workdir=str(folder)
    )
    with pytest.raises(NotFiniteError, match="not finite in epoch 1; the state after step 0"):
        run(config)
    assert json.loads((folder / "summary.json").read_text())["status"] == "not_finite"
    assert (folder / "checkpoints" / "0").is_dir()


@pytest.mark.slow
def test_nan_is_exit_code_3(tmp_path):
    done = command(
        "--dataset=digits", "--model=mlp", "--method=bp", "--optimizer=momentum",
        "--learning_rate=1e12", f"--workdir={tmp_path / 'nan'}",
    )  # fmt: skip
    assert done.returncode == 3
    assert_one_line(done, "not finite")


def assert_one_line(done, message):
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    first(
        [
            (["--method=magic"], "--method must be one of bp, svd_bp, fa, dfa"),
            (["--epochs=0"], "--epochs must be at least 1, got 0"),
            (["--epochs=many"], "epochs"),
            (["--no_such_flag=1"], "no_such_flag"),
            (["extra"], "unexpected argument 'extra'"),
            (["--workdir=/dev/null/run"], "cannot write to /dev/null/run"),
        ],
        2,
    ),
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_a_wrong_command_is_one_line_and_exit_code_2(flags, message):
    done = command("--dataset=digits", "--model=mlp", *flags)
    assert done.returncode == 2
    assert_one_line(done, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "lenet"}, "--model must be one of mlp, smallconv, vgg13, resnet32"),
        ({"dataset": "svhn"}, "--dataset must be one of"),
        ({"learning_rate": 0.0}, "--learning_rate must be more than 0"),
        ({"learning_rate": float("nan")}, "--learning_rate must be more than 0"),
        ({"learning_rate": float("inf")}, "--learning_rate must be finite"),
        ({"epochs": -3}, "--epochs must be at least 1, got -3"),
        ({"batch_size": 0}, "--batch_size must be at least 1"),
        ({"precision": "float16"}, "--precision must be one of float32, bfloat16, got float16"),
        ({"memory": "none"}, "--memory must be one of auto, taped, streamed, got none"),
        ({"steps_per_dispatch": -1}, "--steps_per_dispatch must be at least 0"),
        ({"max_steps": -1}, "--max_steps must be at least 0"),
        ({"rank_init": 0.0}, "--rank_init must be more than 0"),
        ({"rank_init": 1.5}, "--rank_init must be at most 1"),
        ({"rank_floor": -0.1}, "--rank_floor must be at least 0"),
        ({"energy": 1.1}, "--energy must be at most 1"),
        ({"beta": -1.0}, "--beta must be at least 0"),
        ({"rank_schedule": "fast"}, "--rank_schedule must be one of none, linear, hybrid"),
        ({"feedback": "straight"}, "--feedback must be one of"),
        ({"feedback_update": "often"}, "--feedback_update must be one of"),
        ({"feedback_every": 0}, "--feedback_every must be at least 1"),
        ({"projection": "flat"}, "--projection must be one of"),
        ({"retraction": "svd"}, "--retraction must be one of"),
        ({"retract_every": 0}, "--retract_every must be at least 1"),
        ({"factorize": "maybe"}, "--factorize must be one of"),
        ({"kappa": -1.0}, "--kappa must be at least 0"),
        ({"label_smoothing": 1.0}, "--label_smoothing must be at most 0.9"),
        (
            {"feedback_form": "sparse"},
            "--feedback_form must be one of auto, full, low_rank, channel",
        ),
        ({"feedback_limit_mib": -1}, "--feedback_limit_mib must be at least 0"),
        ({"feedback_lookahead": -1}, "--feedback_lookahead must be at least 0"),
        ({"unit_size": 0}, "--unit_size must be at least 1"),
        ({"readout": "none"}, "--readout must be one of pred, sim, predsim"),
        ({"readout_update": "none"}, "--readout_update must be one of learned, fixed"),
        ({"readout_rate": 0.0}, "--readout_rate must be more than 0"),
        ({"local_weight": -0.1}, "--local_weight must be at least 0"),
        ({"resume": True}, "--resume needs --workdir"),
    ],
    ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_every_flag_has_its_limits(change, message):
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(SMALL, **change).validate()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_that_do_not_fit_each_other(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(ConfigError, match="--batch_size must be at most"):
        run(dataclasses.replace(SMALL, batch_size=5000, workdir=str(folder)))
    with pytest.raises(ConfigError, match="too small"):
        run(dataclasses.replace(SMALL, model="vgg13", workdir=str(folder)))
    with pytest.raises(ConfigError, match="svd_bp is backpropagation on factors, and this model"):
        run(dataclasses.replace(SMALL, method="svd_bp", factorize="off", workdir=str(folder)))
    streamed = dataclasses.replace(SMALL, memory="streamed", workdir=str(folder))
    for change, named in {
        ("method", "local"): "--method=local",
        ("local_weight", 0.5): "--method=ssa",
        ("warmup_method", "local"): "--warmup_method=local",
    }.items():
        with pytest.raises(ConfigError, match=f"{named}, as set here.*--memory=taped or auto$"):
            run(dataclasses.replace(streamed, **dict([change])))
    assert not folder.exists()


def test_missing_data_is_exit_code_2_and_leaves_no_workdir(tmp_path):
    done = command(f"--data_dir={tmp_path}", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert_one_line(done, "ssa_jax[prepare]")
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_older_than_a_setting_is_read_and_gone_on_with(finished, tmp_path):
    config, folder, summary = finished
    older = tmp_path / "run"
    shutil.copytree(folder, older)
    record = json.loads((older / "config.json").read_text())
    assert record["config"].pop("aux_depth") == config.aux_depth
    (older / "config.json").write_text(json.dumps(record))
    assert trained.restore(older).epoch == config.epochs
    resumed = dataclasses.replace(config, workdir=str(older), resume=True)
    assert run(resumed)["test_accuracy"] == summary["test_accuracy"]
    with pytest.raises(WorkdirError, match="another configuration: aux_depth=2 here and"):
        run(dataclasses.replace(resumed, aux_depth=2))


def test_an_existing_run_is_not_overwritten(finished):
    config, folder, _ = finished
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(WorkdirError, match="holds a run of these settings"):
        run(config)
    with pytest.raises(WorkdirError, match=r"another configuration \(seed=1 here and 0 there\)"):
        run(dataclasses.replace(config, seed=1))
    with pytest.raises(WorkdirError, match="another configuration: seed=1 here and 0 there"):
        run(dataclasses.replace(config, seed=1, resume=True))
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(WorkdirError, match="is not empty"):
        workdir.create(dataclasses.replace(SMALL, workdir=str(tmp_path)))
    with pytest.raises(WorkdirError, match="holds no run to resume"):
        workdir.reopen(dataclasses.replace(SMALL, workdir=str(tmp_path), resume=True))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_rows_survive_a_line_cut_short(tmp_path):
    folder = workdir.Workdir(tmp_path)
    for epoch in (1, 2):
        folder.log({"epoch": epoch})
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"epoch": 3, "tra')
    assert [r["epoch"] for r in folder.rows()] == [1, 2]
    folder.keep_rows(1)
    assert rows(tmp_path) == [{"epoch": 1}]


def test_every_setting_is_identity_or_excused():
    other = {"method": "bp", "seed": 5, "energy": 0.5, "precision": "bfloat16"}
    other |= {"steps_per_dispatch": 7, "memory": "streamed"}
    for name, value in other.items():
        changed = dataclasses.asdict(dataclasses.replace(SMALL, **{name: value}))
        assert name in config_lib.differences(SMALL, changed)
    moved = dataclasses.replace(SMALL, workdir="elsewhere", max_steps=5, data_dir="there")
    assert config_lib.differences(SMALL, dataclasses.asdict(moved)) == ""


@pytest.mark.slow
def test_ctrl_c_leaves_a_workdir_to_go_on_with(tmp_path):
    folder = tmp_path / "run"
    flags = ["--dataset=digits", "--model=mlp", "--epochs=4000", "--method=bp"]
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.cifar", *flags, f"--workdir={folder}"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 200
        while not (folder / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "--resume" in err
    assert "Traceback" not in err
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert (folder / "plots" / "curves.png").exists()
    done = command(*flags, f"--workdir={folder}", "--resume",
                   f"--max_steps={summary['steps'] + 30}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert rows(folder)[-1]["epoch"] > summary["epochs"]


@pytest.mark.long
@pytest.mark.skipif("TFDS_DATA_DIR" not in os.environ, reason="TFDS_DATA_DIR is not set")
@pytest.mark.parametrize("model", ["smallconv", "vgg13"])
def test_a_few_steps_on_real_cifar10_learn(model, tmp_path):
    """The loss of the last steps of a short run is below that of a network that knows nothing."""
    batch, steps = (128, 60) if model == "smallconv" else (32, 20)
    config = Config(model=model, rank_init=0.25, batch_size=batch, workdir=str(tmp_path / "run"),
                    rank_schedule="hybrid", max_steps=steps, epochs=1)  # fmt: skip
    summary = run(config)
    assert summary["status"] == "stopped"
    assert summary["steps"] == steps
    assert summary["params_ratio"] < 0.6
    if model == "smallconv":
        assert rows(tmp_path / "run")[0]["train_accuracy"] > 0.2
    # So early a single unit of many may still stand across.
    assert statistics.mean(summary["angles"][:-1]) < 90, summary["angles"]


HOLD = """
import sys
from pathlib import Path
from ssa_jax.runs import trained, workdir
with workdir.held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_workdir_has_one_writer_until_that_one_is_dead(tmp_path):
    config = dataclasses.replace(SMALL, epochs=1, workdir=str(tmp_path / "run"))
    run(config)
    more = dataclasses.replace(config, resume=True)
    before = {p: p.read_bytes() for p in Path(config.workdir).glob("*.json*")}
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, config.workdir],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(WorkdirError, match=f"in use by process {other.pid}; stop it"):
            run(more)
        assert {p: p.read_bytes() for p in before} == before
    finally:
        other.kill()
        other.communicate()
    assert run(more)["status"] == "finished"


def test_rows_count_by_their_epoch_and_not_by_their_place(tmp_path):
    folder = workdir.Workdir(tmp_path)
    for epoch, accuracy in ((1, 0.1), (2, 0.9), (1, 0.2), (3, 0.3), (2, 0.4)):
        folder.log({"epoch": epoch, "test_accuracy": accuracy})
    rows = folder.rows()
    assert [(row["epoch"], row["test_accuracy"]) for row in rows] == [(1, 0.2), (2, 0.4), (3, 0.3)]
    assert best_epoch(rows) == {"best_epoch": 2, "best_test_accuracy": 0.4}


WHOLE = [f.name for f in dataclasses.fields(Config) if f.type in (int, int | None)]


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [2**31, 2**32, 2**64, -(2**31)])
def test_every_integer_has_both_ends(name, value):
    with pytest.raises(ConfigError, match=f"--{name} must be at (most|least) "):
        dataclasses.replace(Config(), **{name: value}).validate()


def test_steps_and_seeds_do_not_run_over():
    long = dataclasses.replace(SMALL, epochs=100_000_000, batch_size=1)
    with pytest.raises(ConfigError, match=r"--epochs must be at most 14\d\d\d\d\d with 14\d\d "):
        run(long)
    with pytest.raises(ConfigError, match="--seed must be at most 2147483646 with --seeds=2"):
        run_seeds(dataclasses.replace(SMALL, seed=2**31 - 1), 2)
    with pytest.raises(ConfigError, match="--seeds must be at most"):
        run_seeds(SMALL, 2**31)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = Config(workdir="~/r1", data_dir="~/data", compile_cache="~/cache")
    assert config.workdir == f"{tmp_path}/r1"
    assert config.data_dir == f"{tmp_path}/data"
    assert config.compile_cache == f"{tmp_path}/cache"
    assert Config(compile_cache="off").compile_cache == "off"
    values = absl_flags.FlagValues()
    absl_flags.DEFINE(flags._Path(), "folder", None, "", flag_values=values)
    values(["program", "--folder=~/study"])
    assert values.folder == f"{tmp_path}/study"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["JAX_DISABLE_JIT", "JAX_DEBUG_NANS", "JAX_ENABLE_X64"])
def test_it_runs_as_one_debugs(name, tmp_path):
    """Two epochs with probes, a cut of ranks and checkpoints, and the same losses as without."""
    small = ("--dataset=digits", "--model=mlp", "--epochs=2", "--batch_size=64")
    small += ("--train_size=128", "--method=ssa", "--rank_schedule=hybrid")
    losses = []
    for folder, changes in (("plain", {}), ("debug", {name: "1"})):
        workdir = f"--workdir={tmp_path / folder}"
        done = command(*small, workdir, env={**os.environ, **changes})
        assert done.returncode == 0, done.stderr
        losses.append([row["train_loss"] for row in rows(tmp_path / folder)])
    # Random numbers are others in double precision.
    bound = 1.0 if name == "JAX_ENABLE_X64" else 1e-3
    assert losses[1] == pytest.approx(losses[0], abs=bound)


def test_what_the_library_leaves_dense_is_told_in_one_line(capsys):
    flags._show_warning(LeftDense("left dense: a (depthwise)"), LeftDense, "vit.py", 122)
    flags._show_warning("older than it looks", DeprecationWarning, "there.py", 3)
    first, *rest = capsys.readouterr().err.splitlines()
    assert first == "note: left dense: a (depthwise)"
    assert rest[0].startswith("there.py:3: DeprecationWarning: older than it looks")
