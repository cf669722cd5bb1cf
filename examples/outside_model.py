r"""A model and data from outside, by name: flags take ``package.module:name`` too.

python -m experiments.cifar --model=examples.outside_model:wide \\
        --dataset=examples.outside_model:halves
"""

import numpy as np
from flax import nnx

import ssa_jax
from ssa_jax.data import Dataset
from ssa_jax.data.arrays import from_arrays


class Wide(nnx.Module):
    """One wide hidden layer."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(inputs, 256, rngs=rngs)
        self.out = nnx.Linear(256, outputs, rngs=rngs)

    def __call__(self, x):
        return self.out(ssa_jax.cut(nnx.relu(self.hidden(x.reshape(len(x), -1)))))


def wide(input_shape, outputs, *, rank, rngs):
    """The model for inputs of a shape, on factors unless `rank` is None."""
    model = Wide(int(np.prod(input_shape)), outputs, rngs)
    # Which layers pay is judged by the run, which knows how far its ranks fall.
    return model if rank is None else ssa_jax.factorize(model, rank=rank, lowest=0.0)


def halves(data_dir: str | None = None) -> Dataset:
    """Images of 8x8 pixels, of which the left or the right half is brighter."""
    images = np.random.default_rng(0).integers(0, 256, (2000, 8, 8, 1), np.uint8)
    labels = images[:, :, :4].sum((1, 2, 3)) > images[:, :, 4:].sum((1, 2, 3))
    return from_arrays((images, labels), name="halves")
