"""Outcomes of the loss coefficients, and the split that they are measured on."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from experiments.studies import sensitivity
from ssa_jax import data
from ssa_jax.errors import ConfigError
from ssa_jax.reporting import plots
from ssa_jax.runs.config import Config


def row(accuracy, variant="gamma_1e-4_hoyer_1e-5", status="finished", findings=()):
    return {
        "variant": variant, "seed": 0, "status": status, "test_accuracy": accuracy,
        "diagnosis": [{"name": name} for name in findings], "classes": 10,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("found", "mark"),
    [
        (row(0.76), "S"),
        (row(0.75), "w"),
        (row(0.41), "w"),
        (row(0.39), "C"),
        (row(0.39, findings=[sensitivity.PRUNED]), "P"),
        # A drop that the run mended is no failure.
        (row(0.8, findings=[sensitivity.PRUNED]), "S"),
        (row(0.39, findings=["alignment failing"]), "C"),
        (row(None, status="not_finite"), "X"),
    ],
)
def test_outcome_of_a_run(found, mark):
    assert sensitivity.outcome(found, 0.8 - 1e-9) == mark


def test_runs_that_hardly_beat_guessing_are_not_stable_among_themselves():
    assert sensitivity.outcome(row(0.29), best=0.29) == "C"
    assert sensitivity.outcome(row(0.31), best=0.31) == "S"
    assert sensitivity.outcome(row(0.29, findings=[sensitivity.PRUNED]), best=0.29) == "P"


def test_the_worst_seed_is_the_outcome_of_a_variant():
    rows = [row(0.8), row(0.3), row(None, status="not_finite")]
    assert sensitivity.worst(rows[:1], 0.8) == "S"
    assert sensitivity.worst(rows[:2], 0.8) == "C"
    assert sensitivity.worst(rows, 0.8) == "X"
    assert sensitivity.worst([], 0.8) == ""
    assert sensitivity.best_accuracy(rows) == 0.8
    assert sensitivity.best_accuracy(rows[2:]) == 0.0


def test_every_point_of_a_plane_is_a_variant_once_and_where_it_belongs(tmp_path):
    names = [v.name for v in sensitivity.VARIANTS]
    assert len(set(names)) == len(names) == 50
    for variant in sensitivity.VARIANTS:
        Config(**variant.changes).validate()
    plane = sensitivity.PLANES[1]
    rows = [row(0.8), row(0.2, plane.name(0, -1)), row(None, plane.name(0, -5), "not_finite")]
    panel = sensitivity.panel(plane, rows)
    assert (panel.values[0][0], panel.marks[0][0]) == (80.0, "S")
    assert (panel.values[-1][-1], panel.marks[-1][-1]) == (20.0, "C")
    assert panel.marks[0][-1] == "X"
    assert math.isnan(panel.values[0][-1])
    assert math.isnan(panel.values[2][2])
    file = plots.draw_panels(tmp_path / "grid.png", [panel, panel], "title")
    with Image.open(file) as picture:
        low, high = picture.convert("L").getextrema()
        assert high - low > 100


def test_the_table_names_outcomes(tmp_path):
    rows = [row(0.8), row(0.2, "gamma_1e0_hoyer_1e-1")]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (column,) = [c for c in sensitivity.columns(tmp_path) if c.title == "outcome"]
    assert [column.text(r["variant"], [r]) for r in rows] == ["stable", "collapsed"]


def test_a_validation_split_is_of_the_training_images_and_leaves_the_test_set():
    whole = data.load("digits")
    split = data.hold_out(whole, 0.1)
    n = len(whole.train_labels)
    assert len(split.test_labels) == round(0.1 * n)
    both = np.concatenate([split.train_images, split.test_images]).reshape(n, -1)
    # The same images, each in one part alone.
    assert sorted(map(bytes, both)) == sorted(map(bytes, whole.train_images.reshape(n, -1)))
    pairs = {(x.tobytes(), y) for x, y in zip(whole.train_images, whole.train_labels, strict=True)}
    assert all(
        (x.tobytes(), y) in pairs for x, y in zip(split.test_images, split.test_labels, strict=True)
    )
    again = data.hold_out(whole, 0.1)
    assert np.array_equal(split.test_images, again.test_images)
    assert data.hold_out(whole, 0.0) is whole
    with pytest.raises(ConfigError, match=r"--validation must be at most 0\.5, got 0.9"):
        Config(validation=0.9).validate()


def test_a_limited_data_set_is_a_part_of_the_training_images_always_the_same():
    whole = data.load("digits")
    part = data.limited(whole, 200)
    assert len(part.train_labels) == 200
    rows = {(x.tobytes(), y) for x, y in zip(whole.train_images, whole.train_labels, strict=True)}
    ours = [(x.tobytes(), y) for x, y in zip(part.train_images, part.train_labels, strict=True)]
    assert set(ours) <= rows
    assert len(set(part.train_labels)) == 10
    assert np.array_equal(data.limited(whole, 200).train_images, part.train_images)
    assert part.test_images is whole.test_images
    assert data.limited(whole, 0) is data.limited(whole, 10**6) is whole
    with pytest.raises(ConfigError, match="--train_size must be at least 0, got -1"):
        Config(train_size=-1).validate()
