"""Regression: mean squared error, or a loss of one's own, on inputs that are no images.

python examples/regression.py
"""

import numpy as np
from flax import nnx

import ssa_jax


class Perceptron(nnx.Module):
    """Two hidden layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.List([nnx.Linear(8, 64, rngs=rngs), nnx.Linear(64, 64, rngs=rngs)])
        self.out = nnx.Linear(64, 1, rngs=rngs)

    def __call__(self, x):
        for layer in self.hidden:
            x = ssa_jax.cut(nnx.tanh(layer(x)))
        return self.out(x)


def main() -> ssa_jax.Run:
    """Trains on a smooth function of eight numbers, with two losses."""
    x = np.random.default_rng(0).normal(size=(4000, 8))
    y = np.sin(x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    for loss in ("mean_squared_error", lambda y, t: abs(y - t).mean()):
        run = ssa_jax.fit(Perceptron(nnx.Rngs(0)), (x, y), loss=loss, epochs=20, batch_size=50)
        print(run.history[-1]["test_loss"])
    return run


if __name__ == "__main__":
    main()
