"""A Linen model, with batch norm and dropout, told by `train` whether it is trained.

python examples/linen_model.py
"""

from flax import linen as nn
from sklearn.datasets import load_digits

import ssa_jax


class Net(nn.Module):
    """Two convolutions and a hidden layer."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(32, (3, 3))(x)))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(ssa_jax.cut(x)))
        x = nn.Dropout(0.1, deterministic=not train)(ssa_jax.cut(x.reshape(len(x), -1)))
        return nn.Dense(10)(ssa_jax.cut(nn.relu(nn.Dense(64)(x))))


def main() -> ssa_jax.Run:
    """Trains on digits, with falling ranks."""
    digits = load_digits()
    images, labels = (digits.images * 15).astype("uint8"), digits.target
    run = ssa_jax.fit(Net(), (images, labels), epochs=8, batch_size=50, rank_schedule="hybrid")
    print(run.history[-1]["test_accuracy"], run.summary["ranks"])
    return run


if __name__ == "__main__":
    main()
