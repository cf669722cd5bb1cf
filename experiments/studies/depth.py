"""How signals and gradients of direct SSA turn away from the true ones with depth.

    python -m experiments.studies.depth
    python -m experiments.studies.depth --quick --dataset=digits --only=plain_direct

The 32-layer network with residual blocks, with blocks without the activation after their sum, and
without skips, a block a unit, trained for some steps with backpropagation on factors, with direct
SSA, and with direct SSA whose signals come from one unit ahead.
"""

from typing import Any

from experiments.show import variants
from experiments.show.variants import Column, Text
from experiments.studies import program
from experiments.studies.study import Study, Variant

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


def third(key: str, part: int) -> Text:
    """Mean angle over a third of the hidden units, 0 being next to the image, and seeds."""

    def angles(row: dict[str, Any]) -> list[float]:
        hidden = row[key][:-1]
        first, last = (round(i * len(hidden) / 3) for i in (part, part + 1))
        return hidden[first:last]

    return variants.mean(angles, "{:.0f}°")


STUDY = Study(
    "depth",
    VARIANTS,
    variants.always(
        Column("train loss", variants.train_loss),
        Column("test accuracy", variants.accuracy),
        *(
            Column(f"{what}, {where}", third(key, part))
            for what, key in (("signal", "signal_angles"), ("gradient", "angles"))
            for part, where in enumerate(("first third", "middle", "last"))
        ),
        variants.PARAMETERS,
    ),
    "Angles are to the true signal and the true gradient, means over a third of the hidden units "
    "at the end of training; the train loss is the mean over training.",
    defaults={"batch_size": 64, "epochs": 1, "max_steps": 150},
    seeds=1,
)

if __name__ == "__main__":
    program.run(STUDY)
