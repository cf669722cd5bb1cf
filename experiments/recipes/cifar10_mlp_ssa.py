"""Direct SSA on a perceptron of two hidden layers, CIFAR-10, at half of full rank.

    python -m experiments.cifar --recipe=cifar10_mlp_ssa

Hardware: meant for one core, without a GPU.
Time: not measured yet.
Expected test accuracy: not measured yet.
Backpropagation on the dense network reaches 58.97 % in as many epochs, see docs/research.md.
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
    "rank_init": 0.5,
    "rank_schedule": "none",
}
