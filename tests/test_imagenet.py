"""Runs on streamed data, as a person meets them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from streamed import stream

from experiments import seeds
from experiments.measure import exports
from ssa_jax import export
from ssa_jax.data import stream_loader
from ssa_jax.errors import ConfigError, DataError
from ssa_jax.runs import inputs
from ssa_jax.runs.config import Config
from ssa_jax.runs.run import run
from ssa_jax.training.optim import OptimizerConfig, learning_rate

SMALL = Config(dataset="tiny_imagenet10", model="mlp", method="bp", epochs=2, batch_size=4)


def settings(folder, **changes):
    return dataclasses.replace(SMALL, workdir=str(folder), **changes)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(row):
    return {k: v for k, v in row.items()
            if k not in ("wall_s", "images_per_second", "compile_s", "compiles")}  # fmt: skip


@pytest.mark.slow
def test_stopped_within_an_epoch_and_resumed_it_is_the_uninterrupted_run(tmp_path):
    data = stream(corrupt=(2, 9))
    options = {"on_corrupt": "skip"}
    run(settings(tmp_path / "whole", **options), data)
    # After the second step of the second epoch.
    stopped = run(settings(tmp_path / "parts", max_steps=7, **options), data)
    assert (stopped["status"], stopped["epochs"]) == ("stopped", 1)
    run(settings(tmp_path / "parts", resume=True, **options), data)
    whole, parts = (list(map(timeless, rows(tmp_path / n))) for n in ("whole", "parts"))
    assert whole == parts
    assert sum(row["skipped"] for row in whole) > 0


@pytest.mark.slow
def test_bfloat16_learns_what_float32_does_to_its_rounding(tmp_path):
    data = stream()
    losses = {}
    for precision in ("float32", "bfloat16"):
        config = settings(
            tmp_path / precision, method="ssa", precision=precision, feedback_lookahead=0
        )
        run(config, data)
        losses[precision] = [row["train_loss"] for row in rows(tmp_path / precision)]
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.03)


@pytest.mark.slow
def test_a_corrupt_record_stops_a_run_that_goes_on_with_the_other_policy(tmp_path):
    data = stream(n=20, corrupt=(3,))
    with pytest.raises(DataError, match="record 3 is corrupt"):
        run(settings(tmp_path / "run"), data)
    summary = run(settings(tmp_path / "run", resume=True, on_corrupt="skip"), data)
    assert summary["status"] == "finished"
    assert [row["skipped"] for row in rows(tmp_path / "run")] == [1, 1]


def test_what_cannot_be_measured_is_counted_and_left_out(tmp_path):
    data = stream(n=8, corrupt_test=(0, 1, 2))._replace(classes=6)
    run(settings(tmp_path / "run", epochs=1, on_corrupt="skip"), data)
    (row,) = rows(tmp_path / "run")
    assert row["test_skipped"] == 3
    # Four examples are left, of six classes.
    assert (4 * row["test_accuracy"]).is_integer()
    assert row["test_accuracy"] <= row["test_top5_accuracy"] <= 1
    data = data._replace(test=data.test[:3])
    with pytest.raises(DataError, match="no test image could be decoded"):
        run(settings(tmp_path / "none", epochs=1, on_corrupt="skip"), data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dataset": "my.data:images", "image_size": 64},
            "--image_size is for imagenet2012, tiny_imagenet10",
        ),
        ({"steps_per_dispatch": 2}, "--steps_per_dispatch must be 1 on a streamed data set"),
        ({"on_corrupt": "ignore"}, "--on_corrupt must be one of stop, skip"),
        ({"crop_area": 0.0}, "--crop_area must be more than 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SMALL, **changes).validate()


def test_a_warm_up_longer_than_training_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--warmup_steps must be less than 10, the steps of"):
        run(settings(tmp_path / "run", warmup_steps=10), stream())


def test_warm_up_in_steps_ends_at_its_step():
    rate = learning_rate(OptimizerConfig(1.0, total_steps=100, steps_per_epoch=10, warmup_steps=20))
    values = [float(rate(i)) for i in (0, 10, 20, 100)]
    assert np.allclose(values, [0, 0.5, 1, 0], atol=1e-6)


def test_each_process_reads_its_share_of_a_batch(monkeypatch):
    def labels():
        loader = inputs.make_loader(SMALL, stream())
        return next(loader.feeds(jax.random.key(0), 0, 4, 0)).source.labels.tolist()

    whole = labels()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert labels() == whole[::2]
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert labels() == whole[1::2]


def test_seeds_on_streamed_data_run_one_after_another(tmp_path):
    config = settings(tmp_path / "seeds", epochs=1, train_size=8)
    assert seeds.run_seeds(config, 2, data=stream())["statuses"] == ["finished"] * 2
    for folder in ("seed0", "seed1"):
        (row,) = rows(tmp_path / "seeds" / folder)
        assert row["images"] == 8


@pytest.mark.long
def test_a_run_on_streamed_data_is_exported_and_measured_as_in_training(tmp_path, monkeypatch):
    data = stream(n_test=11, corrupt_test=(4,))._replace(classes=10)
    summary = run(settings(tmp_path / "run", on_corrupt="skip"), data)
    monkeypatch.setattr(inputs, "load", lambda config: data)
    trained, *others = exports.evaluate_run(tmp_path / "run")
    assert trained["test_accuracy"] == pytest.approx(summary["test_accuracy"])
    assert {row["form"] for row in others} >= {"safetensors", "stablehlo", "dense"}
    stored = export.read_config(tmp_path / "run" / "export")["metadata"]
    assert np.allclose(stored["normalization"]["mean"], stream_loader.MEAN)
