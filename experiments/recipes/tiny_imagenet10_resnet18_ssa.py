"""Direct SSA on resnet18 at a quarter of full rank, 64x64 images of ten classes of ImageNet.

    python -m experiments.imagenet --recipe=tiny_imagenet10_resnet18_ssa

Hardware: one core of an AMD EPYC, no GPU, the other core at work on something else.
Time: 1616 s, an upper bound on that hardware.
Expected test accuracy: 51.60 %, seed 0, one run (results/tiny_imagenet10/ssa).
Chance is 10 %; of the validation set of 500 images one is 0.2 points.
"""

from typing import Any

FIELDS: dict[str, Any] = {
    "dataset": "tiny_imagenet10",
    "batch_size": 64,
    "optimizer": "adam",
    "learning_rate": 0.002,
    "label_smoothing": 0.1,
    "crop_area": 0.35,
    "model": "resnet18",
    "epochs": 20,
    "method": "ssa",
    "feedback_lookahead": 0,
    "rank_exclude": "",
    "feedback": "composed",
    "feedback_form": "channel",
    "feedback_update": "tracked",
    "rank_init": 0.25,
    "rank_schedule": "none",
}
