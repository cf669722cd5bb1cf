"""A hundred classes on images like those of CIFAR-100: paths of every form, and guesses of five."""

import dataclasses

import numpy as np
import pytest

from ssa_jax.data import Dataset
from ssa_jax.runs.config import Config
from ssa_jax.runs.run import run

CLASSES, SIDE = 100, 16
# The values of all hidden units of smallconv on these images.
VALUES = 8 * 8 * 32 + 4 * 4 * 64 + 2 * 2 * 128 + 512


def images_of_a_hundred_kinds():
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 256, (CLASSES, SIDE, SIDE, 3))

    def some(n):
        labels = np.arange(n, dtype=np.int32) % CLASSES
        noisy = kinds[labels] + rng.normal(0, 20, (n, SIDE, SIDE, 3))
        return np.clip(noisy, 0, 255).astype(np.uint8), labels

    return Dataset(*some(1600), *some(200), CLASSES, 0, False, name="kinds")


def settings(folder, feedback, form):
    return Config(
        model="smallconv", method="ssa", feedback=feedback, feedback_form=form, epochs=2,
        feedback_limit_mib=1 if form == "low_rank" else 256,
        batch_size=50, learning_rate=5e-3, workdir=str(folder),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("feedback", "form"),
    [
        pytest.param("composed", "full", marks=pytest.mark.slow),
        ("composed", "channel"),
        ("composed", "low_rank"),
        pytest.param("regression", "low_rank", marks=pytest.mark.slow),
        ("regression", "full"),
    ],
)
def test_direct_ssa_learns_a_hundred_classes(tmp_path, feedback, form):
    summary = run(settings(tmp_path, feedback, form), images_of_a_hundred_kinds())
    names = {
        "low_rank": f"low-rank ({2**20 // (4 * (VALUES + 4 * CLASSES))} directions)",
        "channel": "per-channel",
    }
    assert names.get(form, form) in summary["feedback_note"]
    assert summary["train_loss"] < np.log(CLASSES)
    # By chance one in a hundred, and five.
    assert summary["test_accuracy"] > 0.1
    assert 0.3 < summary["test_top5_accuracy"] <= 1
    assert summary["test_accuracy"] <= summary["test_top5_accuracy"]


@pytest.mark.slow
def test_a_run_of_low_rank_paths_is_resumed_to_the_bit(tmp_path):
    data = images_of_a_hundred_kinds()
    expected = run(settings(tmp_path / "whole", "regression", "low_rank"), data)
    parts = settings(tmp_path / "parts", "regression", "low_rank")
    assert run(dataclasses.replace(parts, max_steps=40), data)["status"] == "stopped"
    resumed = run(dataclasses.replace(parts, resume=True), data)
    for name in ("train_loss", "test_loss", "test_accuracy", "angles"):
        assert resumed[name] == expected[name]
