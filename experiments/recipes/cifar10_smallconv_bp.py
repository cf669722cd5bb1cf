"""Backpropagation on smallconv, CIFAR-10: the reference of the results table.

    python -m experiments.cifar --recipe=cifar10_smallconv_bp

Hardware: two cores of an AMD EPYC, no GPU, shared with other work.
Time: 833 s, an upper bound on that hardware.
Expected test accuracy: 80.47 %, seed 0, one run (results/cifar10_smallconv/bp).
One seed: differences of half a point mean nothing.
"""

from typing import Any

FIELDS: dict[str, Any] = {
    "dataset": "cifar10",
    "batch_size": 128,
    "optimizer": "adam",
    "learning_rate": 0.002,
    "model": "smallconv",
    "epochs": 10,
    "method": "bp",
}
