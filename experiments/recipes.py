"""Named settings of runs: `python -m experiments.cifar --recipe=NAME`.

Those of streamed data sets are for `python -m experiments.imagenet` in its place. A recipe's
settings become the defaults of the flags, so a flag that is given overrides them.

Those of ssa were measured up to commit b9ffb74, with linear paths (see "Exact paths" in
docs/research.md). Times were taken beside other work and are upper bounds. One seed: differences of
half a point mean nothing.
"""

from typing import Any, NamedTuple

from ssa_jax.data.streams import STREAMS

# What recipes share; stated here, so that a recipe stays what it is when a default changes.
_RUN = {
    "dataset": "cifar10",
    "model": "smallconv",
    "epochs": 10,
    "batch_size": 128,
    "optimizer": "adam",
    "learning_rate": 0.002,
}
_SSA = {
    **_RUN,
    "method": "ssa",
    "feedback": "composed",
    "feedback_update": "tracked",
    "feedback_lookahead": 1,
    "unit_size": 1,
    "rank_init": 0.5,
    "rank_schedule": "none",
}
# The last two layers or blocks one unit, all below them one: the default of deep networks.
_VGG13_TWO = {"unit_size": 8, "feedback_lookahead": 0}
_RESNET18_TWO = {"unit_size": 7, "feedback_lookahead": 0}
_RESNET32_TWO = {"unit_size": 14, "feedback_lookahead": 0}
_ONE_GPU = "meant for one GPU"
_TWO_CORES = "two cores of an AMD EPYC, no GPU"
_ONE_CORE = "one core of an AMD EPYC, no GPU"


class Recipe(NamedTuple):
    """Settings by name, and what a run of them took and reached.

    Attributes:
      about: what is trained, and what else there is to know.
      settings: fields of `ssa_jax.runs.config.Config`.
      hardware: on which it was measured, or for which it is meant.
      stored: the run that was measured, a folder; None if there is none yet, as with the others.
      seconds: of that run.
      accuracy: its test accuracy in per cent, at seed 0.
    """

    about: str
    settings: dict[str, Any]
    hardware: str
    stored: str | None = None
    seconds: int | None = None
    accuracy: float | None = None

    def command(self, name: str) -> str:
        """How to run it under its name."""
        program = "imagenet" if self.settings["dataset"] in STREAMS else "cifar"
        return f"python -m experiments.{program} --recipe={name}"


# The learning rate of the long runs is that of smallconv and was not chosen for their networks. A
# quarter of full rank is about half of the dense parameters in a 3x3 convolution of equal widths.
RECIPES = {
    "cifar10_smallconv_bp": Recipe(
        "The reference of the results table.",
        {**_RUN, "method": "bp"},
        _TWO_CORES, "results/cifar10_smallconv/bp", 833, 80.47,
    ),
    "cifar10_smallconv_dfa": Recipe(
        "Direct feedback alignment.",
        {**_RUN, "method": "dfa"},
        _TWO_CORES, "results/cifar10_smallconv/dfa", 695, 66.74,
    ),
    "cifar10_smallconv_ssa": Recipe(
        "Direct SSA at half of full rank.",
        {**_SSA, "feedback_lookahead": 0},
        _TWO_CORES, "results/cifar10_smallconv/ssa", 936, 79.91,
    ),
    "cifar10_smallconv_ssa_hybrid": Recipe(
        "SSA one unit ahead, its ranks falling by the paper's heuristic.",
        {**_SSA, "rank_schedule": "hybrid"},
        _ONE_CORE, "results/cifar10_smallconv/ssa_hybrid", 920, 81.05,
    ),
    "cifar10_mlp_ssa": Recipe(
        "Direct SSA on a perceptron of two hidden layers, at half of full rank; backpropagation on "
        "the dense network reaches 58.97 % in as many epochs, see docs/research.md.",
        {**_SSA, "model": "mlp", "epochs": 50, "feedback_lookahead": 0},
        "meant for one core",
    ),
    "cifar10_vgg13_bp": Recipe(
        "The reference of the run of SSA with the same network and length.",
        {**_RUN, "model": "vgg13", "epochs": 100, "method": "bp"},
        _ONE_GPU,
    ),
    "cifar10_vgg13_ssa": Recipe(
        "SSA in two units at a quarter of full rank; after ten epochs at 16 pixels it was level "
        "with backpropagation on the same factors, three seeds, see docs/research.md.",
        {**_SSA, **_VGG13_TWO, "model": "vgg13", "epochs": 100, "rank_init": 0.25},
        _ONE_GPU,
    ),
    "cifar10_resnet32_bp": Recipe(
        "The reference of the run of SSA with the same network and length.",
        {**_RUN, "model": "resnet32", "epochs": 100, "method": "bp"},
        _ONE_GPU,
    ),
    "cifar10_resnet32_ssa": Recipe(
        "SSA in two units at a quarter of full rank; after ten epochs at 16 pixels it was level "
        "with backpropagation on the same factors, three seeds, see docs/research.md.",
        {**_SSA, **_RESNET32_TWO, "model": "resnet32", "epochs": 100, "rank_init": 0.25},
        _ONE_GPU,
    ),
    "cifar100_resnet32_bp": Recipe(
        "The reference of the run of SSA with the same network and length.",
        {**_RUN, "dataset": "cifar100", "model": "resnet32", "epochs": 100, "method": "bp"},
        _ONE_GPU,
    ),
    "cifar100_resnet32_ssa": Recipe(
        "SSA in two units at a quarter of full rank, as on CIFAR-10.",
        {
            **_SSA, **_RESNET32_TWO, "dataset": "cifar100", "model": "resnet32",
            "epochs": 100, "rank_init": 0.25,
        },
        _ONE_GPU,
    ),
    "digits_mlp_ssa": Recipe(
        "A quick look that needs no download.",
        {**_SSA, "dataset": "digits", "model": "mlp", "epochs": 20, "batch_size": 64},
        _ONE_CORE, "results/digits_mlp/ssa", 30, 98.89,
    ),
    "tiny_imagenet10_resnet18_ssa": Recipe(
        "SSA in two units at a quarter of full rank, 64x64 images of ten classes of ImageNet; "
        "chance is 10 %, of the validation set of 500 images one is 0.2 points.",
        {
            **_SSA, "dataset": "tiny_imagenet10", "model": "resnet18", "epochs": 20,
            "batch_size": 64, "label_smoothing": 0.1, "crop_area": 0.35, "rank_init": 0.25,
            "rank_exclude": "", "feedback_form": "full", **_RESNET18_TWO,
        },
        _ONE_CORE, "results/tiny_imagenet10/ssa_units", 972, 64.20,
    ),
}  # fmt: skip
