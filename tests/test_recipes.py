"""Recipes: they name settings that exist, say how to run them, and give way to flags."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import flags
from experiments.recipes import RECIPES
from ssa_jax.data import DATASETS, Dataset
from ssa_jax.data.streams import STREAMS
from ssa_jax.errors import ConfigError
from ssa_jax.runs import build, config
from ssa_jax.runs.config import Config
from ssa_jax.runs.network import decided

ROOT = Path(__file__).parent.parent


def resolved(name):
    return Config(**RECIPES[name].settings, recipe=name)


def like(dataset):
    """A handful of images of a data set's shape."""
    side, channels = {"digits": (8, 1), "tiny_imagenet10": (64, 3)}.get(dataset, (32, 3))
    images, labels = np.zeros((256, side, side, channels), np.uint8), np.arange(256, dtype=np.int32)
    classes = 100 if dataset == "cifar100" else 10
    return Dataset(images, labels % classes, images, labels % classes, classes, 1, False)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_builds_and_says_how_to_run_it(name):
    one = resolved(name)
    one.validate()
    assert one.dataset in (*DATASETS, *STREAMS)
    assert one.method in name
    state = jax.eval_shape(lambda: build.build(one, like(one.dataset)).state)
    assert jax.tree.leaves(state.params)
    program = "imagenet" if one.dataset in STREAMS else "cifar"
    assert RECIPES[name].command(name) == f"python -m experiments.{program} --recipe={name}"


@pytest.mark.parametrize(
    "name",
    [
        "cifar10_vgg13_ssa",
        "cifar10_resnet32_ssa",
        "cifar100_resnet32_ssa",
        "tiny_imagenet10_resnet18_ssa",
    ],
)
def test_deep_recipes_have_the_units_of_the_default(name):
    one = resolved(name)
    left = dataclasses.replace(one, unit_size=None, feedback_lookahead=None)
    assert decided(left, {"vgg13": 10, "resnet18": 9, "resnet32": 16}[one.model]) == one


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_says_it_reached_is_that_of_a_stored_run_of_its_settings(name):
    recipe = RECIPES[name]
    if recipe.stored is None:
        assert recipe.hardware.startswith("meant for ")
        assert recipe.accuracy is recipe.seconds is None
        return
    folder = ROOT / recipe.stored
    record = json.loads((folder / "config.json").read_text())["config"]
    wanted, had = config.identity(resolved(name)), config.identity(record)
    had = {setting: value for setting, value in had.items() if setting in record}
    # What the run could have had beside today's settings, it had not.
    assert not any(value for setting, value in had.items() if setting not in wanted)
    # Both retractions are the polar one: the same step to rounding, but for very long ones.
    assert {wanted.pop("retraction"), had.pop("retraction")} <= {"series", "newton_schulz"}
    shared = wanted.keys() & had.keys()
    assert {k: wanted[k] for k in shared} == {k: had[k] for k in shared}
    summary = json.loads((folder / "summary.json").read_text())
    assert recipe.accuracy == round(100 * summary["test_accuracy"], 2)
    assert recipe.seconds == round(summary["wall_s"])
    assert summary["seed"] == 0


PRINT_CONFIG = """
import dataclasses, json, sys
from absl import flags as absl_flags
from experiments import flags
flags.define({})
flags._parse(["program", *sys.argv[1:]], False)
print(json.dumps(dataclasses.asdict(flags.config_from_flags())))
"""


def test_flags_override_a_recipe_and_a_recipe_the_defaults():
    done = subprocess.run(
        [sys.executable, "-c", PRINT_CONFIG, "--recipe=cifar10_mlp_ssa", "--epochs=10",
         "--model=smallconv", "--seed=3"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    given = {"epochs": 10, "model": "smallconv"}
    # Both are also the defaults of their flags: given, they count.
    for name, value in given.items():
        assert getattr(Config(), name) == value != RECIPES["cifar10_mlp_ssa"].settings[name]
    wanted = dataclasses.replace(resolved("cifar10_mlp_ssa"), seed=3, **given)
    assert json.loads(done.stdout) == dataclasses.asdict(wanted)


def test_an_unknown_recipe_is_told_with_those_there_are():
    with pytest.raises(ConfigError, match="--recipe must be one of none, cifar10_smallconv_bp,"):
        flags.check_recipe("cifar10_vgg11_bp")


def test_the_name_of_a_recipe_is_no_part_of_what_a_run_is():
    plain = Config(**RECIPES["digits_mlp_ssa"].settings)
    assert config.identity(plain) == config.identity(resolved("digits_mlp_ssa"))
