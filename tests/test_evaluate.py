"""The export of a run gives its accuracy, and what is wrong with one is one line."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.measure import exports, timing
from ssa_jax import export
from ssa_jax.export import ExportError
from ssa_jax.runs import trained
from ssa_jax.runs.config import Config
from ssa_jax.runs.run import run
from ssa_jax.runs.workdir import WorkdirError
from ssa_jax.training.checkpoint import CheckpointError

ROOT = Path(__file__).parent.parent
SMALL = Config(dataset="digits", model="mlp", rank_schedule="hybrid", rank_init=1.0, epochs=5)
FORMS = ["trained", *export.FORMS, "safetensors", "stablehlo", "dense"]


def command(*args):
    return subprocess.run(
        [sys.executable, "-m", "experiments.evaluate", *args],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture
def untimed(monkeypatch):
    """Latencies that cost no time: what is tested is what surrounds them."""

    def instant(calls, input_shape, batch):
        return {name: timing.Latency(1.0, 1.0, 1, 0.0) for name in calls}

    monkeypatch.setattr(exports, "latencies", instant)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A hybrid run on the digits that was compacted, with joined units."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    summary = run(dataclasses.replace(SMALL, unit_size=2, workdir=str(folder)))
    assert summary["rank_fraction"] < 0.8
    return folder, summary


@pytest.mark.slow
def test_every_form_has_the_accuracy_of_training(finished, untimed, tmp_path):
    folder, summary = finished
    rows = {row["form"]: row for row in exports.evaluate_run(folder, tmp_path / "out")}
    assert list(rows) == FORMS
    assert rows["dense"]["test_accuracy"] is None
    for name in FORMS[:-1]:
        assert rows[name]["test_accuracy"] == summary["test_accuracy"]
        assert rows[name]["difference"] <= 1e-5
    assert rows["trained"]["macs"] == rows["factored"]["macs"] == summary["macs"]
    assert rows["merged"]["macs"] == rows["dense"]["macs"] > rows["auto"]["macs"]
    assert rows["safetensors"]["bytes"] == rows["auto"]["bytes"] < rows["dense"]["bytes"]
    assert not (folder / "export").exists()
    # The export alone, without its run.
    alone = exports.evaluate_export(tmp_path / "out")
    assert [r["form"] for r in alone] == ["safetensors", "stablehlo", "dense"]
    assert alone[0]["test_accuracy"] == summary["test_accuracy"]


@pytest.mark.long
def test_a_dense_convolutional_run_and_its_normalisation(untimed, tmp_path):
    folder = tmp_path / "run"
    config = dataclasses.replace(
        SMALL, model="smallconv", method="bp", epochs=1, workdir=str(folder)
    )
    summary = run(config)
    rows = exports.evaluate_run(folder)
    assert [r["form"] for r in rows] == ["trained", "merged", "safetensors", "stablehlo", "dense"]
    assert {r["test_accuracy"] for r in rows[:-1]} == {summary["test_accuracy"]}
    # By hand, as someone without this project's data pipeline would do it.
    data = trained.restore(folder).data
    known = export.read_config(folder / "export")["metadata"]["normalization"]
    images = (data.test_images - known["mean"]) / known["std"]
    logits = export.load_stablehlo(folder / "export")(images.astype("float32"))
    assert (logits.argmax(-1) == data.test_labels).mean() == summary["test_accuracy"]


@pytest.mark.slow
def test_an_export_that_differs_from_its_run_is_told(finished, untimed, tmp_path):
    folder, _ = finished
    run_now = trained.restore(folder)
    model = export.to_inference(run_now.model, run_now.data.image_shape)
    metadata = exports.metadata_of(run_now)
    bias = model.layers[-1].bias
    bias.set_value(bias.get_value() + 1e-3)
    export.save(tmp_path / "moved", model, metadata)
    with pytest.raises(ExportError, match="the safetensors form differs from the trained one"):
        exports.evaluate_run(folder, tmp_path / "moved")
    export.save(tmp_path / "older", model, {**metadata, "epoch": 3})
    with pytest.raises(ExportError, match="holds an export of epoch=3, the run is at 5"):
        exports.evaluate_run(folder, tmp_path / "older")
    export.save(tmp_path / "better", model, {**metadata, "test_accuracy": 0.999})
    with pytest.raises(ExportError, match=r"training measured 0\.9990"):
        exports.evaluate_export(tmp_path / "better")
    export.save(tmp_path / "nameless", model)
    with pytest.raises(ExportError, match="names no model and data set"):
        exports.evaluate_export(tmp_path / "nameless")


@pytest.mark.slow
def test_folders_that_hold_no_trained_run(finished, tmp_path):
    folder, _ = finished
    with pytest.raises(WorkdirError, match=r"holds no run: config\.json is missing"):
        trained.restore(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    shutil.rmtree(broken / "checkpoints")
    with pytest.raises(CheckpointError, match="holds no checkpoint; train it first"):
        trained.restore(broken)
    (broken / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint; train it first"):
        trained.restore(broken)


@pytest.mark.slow
def test_the_program_prints_a_table_and_its_errors_are_one_line(finished, tmp_path):
    folder, summary = finished
    out = tmp_path / "out"
    done = command(f"--workdir={folder}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert f"export: {out}" in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [line.split()[1] for line in lines] == ["form", *FORMS]
    assert sum(f"{100 * summary['test_accuracy']:.2f} %" in line for line in lines) == 6
    (out / "model.safetensors").write_bytes(b"")
    for flags, message in (
        ([f"--export={out}"], "is damaged or of another export"),
        ([f"--workdir={tmp_path / 'nowhere'}"], "holds no run"),
        ([], "give either --workdir, a run, or --export"),
    ):
        done = command(*flags)
        assert done.returncode == 2
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith("error: ")
        assert message in line


@pytest.mark.long
@pytest.mark.skipif("TFDS_DATA_DIR" not in os.environ, reason="TFDS_DATA_DIR is not set")
def test_all_forms_agree_on_the_test_set_of_cifar10(untimed, tmp_path):
    folder = tmp_path / "run"
    # Two epochs, so that ranks are compacted and a checkpoint is kept after that.
    summary = run(
        Config(rank_schedule="hybrid", rank_init=0.25, batch_size=1000, epochs=2,
               workdir=str(folder))
    )  # fmt: skip
    # Compacted: the last layer began at 128, a quarter of its full rank.
    assert summary["ranks"]["3/units/3/map/kernel"] < 128
    rows = exports.evaluate_run(folder)
    assert [r["form"] for r in rows] == FORMS
    for row in rows[:-1]:
        assert row["test_accuracy"] == summary["test_accuracy"]
        assert row["difference"] <= 1e-5
