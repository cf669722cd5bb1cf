"""Direct SSA on the digits of scikit-learn: a quick look that needs no download.

    python -m experiments.cifar --recipe=digits_mlp_ssa

Hardware: one core of an AMD EPYC, no GPU.
Time: not measured yet.
Expected test accuracy: not measured yet.
"""

from typing import Any

FIELDS: dict[str, Any] = {
    "dataset": "digits",
    "model": "mlp",
    "epochs": 20,
    "batch_size": 64,
    "optimizer": "adam",
    "learning_rate": 0.002,
    "method": "ssa",
    "feedback": "composed",
    "feedback_update": "tracked",
    "rank_init": 0.5,
    "rank_schedule": "none",
}
