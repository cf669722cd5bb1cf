"""How signals and gradients of direct SSA turn away from the true ones with depth.

    python -m experiments.depth
    python -m experiments.depth --quick --dataset=digits --only=plain_direct

The 32-layer network with residual blocks, with blocks without the activation after their sum, and
without skips, a block a unit, trained for some steps with backpropagation on factors, with direct
SSA, and with direct SSA whose signals come from one unit ahead.
`experiments.study` says what the folder holds and how a study goes on.
"""

import functools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments import flags, study
from experiments.study import Study, Variant
from experiments.study_table import Column, accuracy, per_cent, train_loss

DEFAULTS = {"batch_size": 64, "epochs": 1, "max_steps": 150}

_MODELS = {
    "resnet": ("resnet32", "residual"),
    "identity": ("resnet32_identity", "open residual"),
    "plain": ("plain32", "plain"),
}
_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "svd_bp": ("svd_bp", {"method": "svd_bp"}),
    "direct": ("ssa direct", {"method": "ssa", "feedback_lookahead": 0}),
    "ahead": ("one unit ahead", {"method": "ssa", "feedback_lookahead": 1}),
}
VARIANTS = (
    *(
        Variant(f"{short}_{name}", f"{word}, {label}", {"model": model, **changes})
        for short, (model, word) in _MODELS.items()
        for name, (label, changes) in _METHODS.items()
    ),
    Variant(
        "conv_direct",
        "residual, a convolution a unit, ssa direct",
        {"model": "resnet32_conv", "method": "ssa", "feedback_lookahead": 0},
    ),
)


def third(key: str, part: int) -> Callable[[str, Sequence[study.Row]], str]:
    """Mean angle over a third of the hidden units, 0 being next to the image, and seeds."""

    def text(name: str, rows: Sequence[study.Row]) -> str:
        del name
        angles = []
        for row in rows:
            hidden = row[key][:-1]
            bounds = [round(i * len(hidden) / 3) for i in range(4)]
            angles += hidden[bounds[part] : bounds[part + 1]]
        return f"{statistics.fmean(angles):.0f}°" if angles else "-"

    return text


def columns(folder: Path) -> list[Column]:
    """Everything from the summaries."""
    del folder
    return [
        Column("train loss", train_loss),
        Column("test accuracy", accuracy),
        *(
            Column(f"{what}, {where}", third(key, part))
            for what, key in (("signal", "signal_angles"), ("gradient", "angles"))
            for part, where in enumerate(("first third", "middle", "last"))
        ),
        Column("parameters", per_cent("params_ratio")),
    ]


STUDY = Study(
    "depth",
    VARIANTS,
    columns,
    "Angles are to the true signal and the true gradient, means over a third of the hidden units "
    "at the end of training; the train loss is the mean over training.",
)


if __name__ == "__main__":
    study.define(DEFAULTS, seeds=1)
    flags.run_program(functools.partial(study.main, STUDY))
