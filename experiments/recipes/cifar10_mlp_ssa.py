"""Direct SSA on a perceptron of two hidden layers, CIFAR-10, with mean slopes in its paths.

    python -m experiments.cifar --recipe=cifar10_mlp_ssa

Hardware: one core of an AMD EPYC, no GPU, the other core at other work.
Time: 771 s, an upper bound on that hardware.
Expected test accuracy: 59.38 %, seed 0, one run (results/cifar10_mlp/gates).
Backpropagation on the dense network reaches 58.97 % in as many epochs; see docs/research.md.
"""

from typing import Any

FIELDS: dict[str, Any] = {
    "dataset": "cifar10",
    "batch_size": 128,
    "optimizer": "adam",
    "learning_rate": 0.002,
    "model": "mlp",
    "epochs": 50,
    "method": "ssa",
    "feedback_lookahead": 0,
    "feedback": "composed",
    "feedback_update": "tracked",
    "mean_gates": True,
    "rank_init": 0.5,
    "rank_schedule": "none",
}
