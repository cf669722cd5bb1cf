"""`--help` lists every flag, and a run says what it cannot have of what was asked for."""

import dataclasses
import subprocess
import sys

import pytest
from helpers import first

from experiments import help
from experiments.demo import seen
from ssa_jax.runs.config import Config
from ssa_jax.runs.run import run

PROGRAMS = ("cifar", "imagenet", "demo", "evaluate", "report", "studies.gap", "table")


def test_every_setting_is_in_one_group_and_ten_come_first():
    grouped = [name for names in help.GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(f.name for f in dataclasses.fields(Config))
    assert len(help.GROUPS["First"]) == 10


@pytest.mark.parametrize(
    "program", [p if p == "cifar" else pytest.param(p, marks=pytest.mark.slow) for p in PROGRAMS]
)
def test_help_lists_every_flag_with_its_default_and_choices(program):
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{program}", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    if program in ("cifar", "imagenet", "demo", "studies.gap"):
        for field in dataclasses.fields(Config):
            assert f"--{field.name}=" in done.stdout or f"--[no]{field.name}" in done.stdout
    if program == "cifar":
        assert "--learning_rate=0.002" in done.stdout
        assert "One of none, linear, hybrid" in done.stdout
        assert "--seeds=1" in done.stdout
        assert "--unit_size=N" in done.stdout


@pytest.mark.parametrize(("schedule", "said"), first([("stable_rank", True), ("none", False)], 1))
def test_a_streamed_run_says_what_of_it_is_held_at_once(schedule, said, tmp_path, capsys):
    config = Config(
        dataset="digits", model="mlp", memory="streamed", rank_schedule=schedule, epochs=1,
        max_steps=1, workdir=str(tmp_path / "run"), compile_cache="off",
    )  # fmt: skip
    run(config)
    assert ("looks at all units together" in capsys.readouterr().out) == said


def test_the_demo_says_what_was_seen():
    bp, dfa, ssa = (
        {"test_accuracy": a, "wall_s": s, "params_ratio": p}
        for a, s, p in ((0.9, 5.0, 1.0), (0.8, 4.0, 1.0), (0.895, 12.0, 0.41))
    )
    sentences = seen((bp, dfa, ssa))
    assert len(sentences) == 3
    assert "0.5 points below backpropagation, at 89.5 %, on 41 %" in sentences[2]
    assert "0.5 points above" in seen((ssa, dfa, bp))[2]
