"""The run on a GPU for minutes: what fits, what is kept, and how its parts fail one by one."""

import dataclasses
import itertools
import json
import sys

import numpy as np
import pytest
from helpers import unpadded

from benchmarks import bare, gpu, gpu_data, gpu_items, gpu_page, page, records
from benchmarks.gpu_items import Item
from ssa_jax.errors import DataError
from ssa_jax.runs.config import Config
from ssa_jax.training import record


class Hand:
    """A clock that is moved by hand."""

    def __init__(self):
        self.at = 0.0

    def __call__(self):
        return self.at


def item(name, estimate, kind="step"):
    return Item(name, kind, estimate, ())


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_what_does_not_fit_is_left_out_and_named_and_what_is_cheaper_still_runs(tmp_path):
    hand = Hand()
    log = gpu.Log(tmp_path / "rows", {})

    def measure(item, seconds):
        hand.at += item.estimate
        yield {"what": "step", "seconds": seconds}

    found = [item("first", 50), item("long", 60), item("short", 40)]
    gpu.run(found, gpu.Clock(gpu._LAST_S + 100, hand), log, measure)
    assert [(r["what"], r["item"]) for r in log.rows] == [
        ("step", "first"), ("left out", "long"), ("step", "short")
    ]  # fmt: skip
    assert log.rows[1]["why"] == "may need 60 s, and 50 are left"
    # Patience ends with the clock.
    assert [r["seconds"] for r in log.rows if "seconds" in r] == [80, 50]


def test_estimates_follow_what_items_of_their_kind_took():
    hand = Hand()
    clock = gpu.Clock(100, hand)
    clock.learn(item("a", 10), 5)
    assert clock.expected(item("b", 30)) == 15
    assert clock.expected(item("c", 30, "train")) == 30


def test_every_row_is_on_disk_at_once_and_an_error_does_not_stop_the_rest(tmp_path):
    file = tmp_path / "rows"
    log = gpu.Log(file, {"jax": "1"})
    seen = []

    def measure(item, seconds):
        yield {"what": "step", "ms": 1.0}
        seen.append(len(lines(file)))
        if item.name == "bad":
            raise RuntimeError("out of memory")

    found = [item(name, 1) for name in ("good", "bad", "last")]
    gpu.run(found, gpu.Clock(100, Hand()), log, measure)
    assert seen == [1, 2, 4]
    rows = lines(file)
    assert [r["what"] for r in rows] == ["step", "step", "error", "step"]
    assert rows[2]["item"] == "bad"
    assert "out of memory" in rows[2]["error"]
    assert all(r["jax"] == "1" for r in rows)


def test_a_run_that_is_stopped_leaves_its_record(tmp_path, monkeypatch):
    row = {"what": "step", "kind": "step", "platform": "cpu", "device": "cpu", "ms": 1.0}

    def measure(item, seconds):
        yield row
        gpu._stop(15, None)

    monkeypatch.setattr(gpu, "_measure", lambda *_: measure)
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--quick", f"--out={tmp_path}", "--commit=abc"])
    assert stopped.value.code == 143
    made = json.loads((tmp_path / "gpu.json").read_text())
    assert made["commit"] == "abc"
    (kept,) = made["rows"]
    assert row.items() <= kept.items()
    with pytest.raises(ValueError, match="cpu is none of a GPU"):
        gpu_page.gpu(made)


def test_without_data_nothing_is_trained_and_that_is_said():
    setup = gpu_items.Setup(logs=None)
    (row,) = gpu._measure(setup, None)(item("training of vgg13", 1, "train"), 1.0)
    assert row["what"] == "left out"
    assert "--prepare" in row["why"]


def test_parts_are_small_useful_alone_and_together_the_whole(tmp_path):
    data = gpu_data.noise(20, 10, (4, 4, 3))
    files = gpu_data.split(data, tmp_path, most=500)
    assert len(files) == 3
    whole = gpu_data.join(tmp_path)
    for name in ("train", "test"):
        before, after = (
            sorted(zip(map(bytes, getattr(d, f"{name}_images")), getattr(d, f"{name}_labels"),
                       strict=True)) for d in (data, whole)
        )  # fmt: skip
        assert before == after
    assert (whole.classes, whole.crop, whole.flip) == (10, 4, True)
    for file in files[1:]:
        file.unlink()
    alone = gpu_data.join(tmp_path)
    np.testing.assert_array_equal(alone.train_images, data.train_images[::3])
    np.testing.assert_array_equal(alone.test_labels, data.test_labels[::3])
    files[0].unlink()
    with pytest.raises(DataError, match="see --prepare"):
        gpu_data.join(tmp_path)


def test_cifar_fits_into_parts_below_sixty_mebibytes():
    images = 60_000 * 32 * 32 * 3
    number = -(-images // gpu_data.PART_BYTES)
    assert number == 3
    assert images / number + 4 * 20_000 + 2000 < 60 * 2**20


def test_the_matrix_is_whole_and_every_setting_is_one_of_a_run():
    found = gpu_items.items(gpu_items.GROUPS, torch=True)
    cases = [case for one in found for case in one.cases]
    steps = {(c["model"], c["precision"], c["batch"], c["contestant"])
             for c in cases if c["kind"] != "train"}  # fmt: skip
    wanted = itertools.product(
        ("vgg13", "resnet32", "resnet18"), ("float32", "bfloat16"), (128, 512),
        ("bp", "dfa", "svd_bp", "direct", "direct, streamed", "ssa, default", "walk",
         "torch", "torch, compiled"),
    )  # fmt: skip
    assert steps == set(wanted)
    trained = {(c["model"], c["contestant"]) for c in cases if c["kind"] == "train"}
    assert trained == set(
        itertools.product(
            ("vgg13", "resnet32"),
            ("bp", "svd_bp", "ssa, default", "direct, one ahead", "walk"),
        )
    )
    names = {field.name for field in dataclasses.fields(Config)}
    for case in cases:
        if "settings" in case:
            assert case["settings"].keys() <= names
            Config(**case["settings"]).validate()
    json.dumps(cases)
    without = gpu_items.items(gpu_items.GROUPS, torch=False)
    assert not any(c["kind"] == "torch" for one in without for c in one.cases)


def test_epochs_fill_the_time_and_there_is_at_least_one():
    assert gpu_items.epochs_that_fit(90, step_ms=40, steps_per_epoch=390) == 4
    assert gpu_items.epochs_that_fit(1, step_ms=40, steps_per_epoch=390) == 1


@pytest.mark.slow
def test_workers_are_compiled_timed_and_heard_of_when_they_fail(tmp_path):
    (one,) = gpu_items.items(gpu_items.QUICK[:1], torch=False)
    bp = next(c for c in one.cases if c["contestant"] == "bp")
    settings = {**bp["settings"], "model": "none"}
    bad = {**bp, "contestant": "bad", "name": "bad", "settings": settings}
    setup = gpu_items.Setup(tmp_path / "logs", rounds=2)
    rows = list(gpu_items.measure_steps(one._replace(cases=(bp, bad)), setup, 300.0))
    of = {(r["contestant"], r["what"]): r for r in rows}
    assert set(of) == {("bp", "compiled"), ("bp", "step"), ("bad", "error")}
    assert of["bp", "step"]["rounds"] == 2
    assert of["bp", "step"]["ms"] >= of["bp", "step"]["least_ms"] > 0
    assert of["bp", "compiled"]["compile_s"] > 0
    assert "none" in of["bad", "error"]["error"]
    late = list(gpu_items.measure_steps(one._replace(cases=(bp,)), setup, 0.3))
    assert [r["what"] for r in late] == ["error"]
    assert "not ready" in late[0]["error"]


def test_what_is_missing_can_be_imported_from_and_not_called(monkeypatch):
    for name in ("grain", "PIL"):
        monkeypatch.setitem(sys.modules, name, bare._Absent(name))
    from PIL import Image

    assert Image.Resampling.BILINEAR is not None
    with pytest.raises(ImportError, match=r"PIL.Image.open is not installed"):
        Image.open("x")


def test_versions_are_told_where_a_package_is_not_installed(monkeypatch):
    monkeypatch.setattr(record, "_PACKAGES", ("no_such_package",))
    assert record.versions()["no_such_package"] == "not installed"


def test_the_page_compares_with_bp_and_pytorch_and_names_what_is_missing():
    def step(contestant, ms, kind="step", **more):
        return {
            "item": "steps", "what": "step", "kind": kind, "contestant": contestant,
            "model": "vgg13", "precision": "float32", "batch": 128, "platform": "gpu", "ms": ms,
            "every": 0, "refresh_ms": 0.0, "compile_s": 2.0, "peak_bytes": None, **more,
        }  # fmt: skip

    epoch = {
        "item": "training", "what": "epoch", "kind": "train", "contestant": "walk",
        "model": "vgg13", "batch": 128, "epoch": 2, "epochs": 2, "beside": 4, "train_size": 50_000,
        "test_accuracy": 0.5, "images_per_second": 1e4, "compile_s": 3.0, "wall_s": 9.0,
    }  # fmt: skip
    rows = [
        step("torch", 5.0, "torch"), step("torch, compiled", 4.0, "torch"), step("bp", 8.0),
        step("walk", 6.0, every=10, refresh_ms=1.0), epoch,
        {"item": "steps of resnet18", "what": "left out", "why": "may need 9 s"},
    ]  # fmt: skip
    made = {"platform": "gpu", "hardware": "A GPU", "versions": {"jax": "1"}, "commit": "abc",
            "rows": rows}  # fmt: skip
    text = gpu_page.gpu(made)
    lines = unpadded(text).splitlines()
    assert "| vgg13, float32, 128: walk | 6 | 0.75 | 1.50 | 1 | 2.0 | - | - |" in lines
    assert "| vgg13, walk | 2 of 2 | 50.00 % | 10000 | 3 | 9 |" in lines
    assert "- steps of resnet18: may need 9 s" in text
    assert page.setting(made, gpu_page.COMMAND) in text


def test_the_records_say_that_no_gpu_is_among_them_until_one_is():
    stored = (records.STORED / "gpu.json").exists()
    shown = records.pages()["docs/records/gpu.md"]
    assert (gpu_page.MISSING.removeprefix("#") + "\n" == shown) != stored
