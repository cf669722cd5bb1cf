"""Direct SSA on smallconv, CIFAR-10, at half of full rank.

    python -m experiments.cifar --recipe=cifar10_smallconv_ssa

Hardware: two cores of an AMD EPYC, no GPU, shared with other work.
Time: 936 s, an upper bound on that hardware.
Expected test accuracy: 79.91 %, seed 0, one run (results/cifar10_smallconv/ssa).
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
    "method": "ssa",
    "feedback_lookahead": 0,
    "feedback": "composed",
    "feedback_update": "tracked",
    "rank_init": 0.5,
    "rank_schedule": "none",
}
