"""Direct SSA on the digits of scikit-learn: a quick look that needs no download.

    python -m experiments.cifar --recipe=digits_mlp_ssa

Hardware: one core of an AMD EPYC, no GPU.
Time: 30 s; the machine was shared with other work.
Expected test accuracy: 98.89 %, seed 0, one run (results/digits_mlp/ssa).
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
