"""SSA on smallconv, CIFAR-10, one unit ahead, its ranks falling by the paper's heuristic.

    python -m experiments.cifar --recipe=cifar10_smallconv_ssa_hybrid

Hardware: one core of an AMD EPYC, no GPU, the other core at other work.
Time: 920 s, an upper bound on that hardware.
Expected test accuracy: 81.05 %, seed 0, one run (results/cifar10_smallconv/ssa_hybrid).
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
    "feedback": "composed",
    "feedback_update": "tracked",
    "rank_init": 0.5,
    "rank_schedule": "hybrid",
}
