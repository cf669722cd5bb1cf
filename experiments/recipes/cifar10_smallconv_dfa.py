"""Direct feedback alignment on smallconv, CIFAR-10.

    python -m experiments.cifar --recipe=cifar10_smallconv_dfa

Hardware: two cores of an AMD EPYC, no GPU, shared with other work.
Time: 695 s, an upper bound on that hardware.
Expected test accuracy: 66.74 %, seed 0, one run (results/cifar10_smallconv/dfa).
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
    "method": "dfa",
}
