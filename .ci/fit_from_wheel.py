"""Trains with the installed wheel, and checks that it brings nothing but the library."""

import importlib.util

import numpy as np
from flax import nnx

import ssa_jax


class Net(nnx.Module):
    """A perceptron."""

    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 2, rngs=rngs)

    def __call__(self, x):
        return self.b(ssa_jax.cut(nnx.relu(self.a(x))))


for name in ("experiments", "benchmarks", "tests", "examples"):
    assert importlib.util.find_spec(name) is None, f"the wheel holds {name}"
x = np.random.default_rng(0).normal(size=(400, 16))
run = ssa_jax.fit(Net(nnx.Rngs(0)), (x, (x[:, 0] > 0).astype(int)), epochs=5, batch_size=20)
assert run.history[-1]["test_accuracy"] > 0.7, run.history[-1]
print("the wheel trains:", run.history[-1]["test_accuracy"])
