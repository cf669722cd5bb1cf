"""Backpropagation on ResNet-32, CIFAR-10, 100 epochs.

    python -m experiments.cifar --recipe=cifar10_resnet32_bp

Hardware: meant for one GPU.
Time: not measured yet.
Expected test accuracy: not measured yet.
The reference of the run of direct SSA with the same network and length; the learning rate is that
of smallconv and was not chosen for this network.
"""

from typing import Any

FIELDS: dict[str, Any] = {
    "dataset": "cifar10",
    "batch_size": 128,
    "optimizer": "adam",
    "learning_rate": 0.002,
    "model": "resnet32",
    "epochs": 100,
    "method": "bp",
}
