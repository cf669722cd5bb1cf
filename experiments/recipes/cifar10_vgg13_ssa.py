"""Direct SSA on VGG-13, CIFAR-10, 100 epochs, at a quarter of full rank.

    python -m experiments.cifar --recipe=cifar10_vgg13_ssa

Hardware: meant for one GPU.
Time: not measured yet.
Expected test accuracy: not measured yet.
A quarter of full rank is about half of the dense parameters in a 3x3 convolution of equal widths.
After 150 steps the direct form was behind backpropagation on the same factors, by 12 points; see
docs/research.md. The learning rate is that of smallconv and was not chosen for this network.
"""

from typing import Any

FIELDS: dict[str, Any] = {
    "dataset": "cifar10",
    "batch_size": 128,
    "optimizer": "adam",
    "learning_rate": 0.002,
    "model": "vgg13",
    "epochs": 100,
    "method": "ssa",
    "feedback": "composed",
    "feedback_update": "tracked",
    "rank_init": 0.25,
    "rank_schedule": "none",
}
