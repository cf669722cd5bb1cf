"""The networks that the benchmarks of training run, by name, depth and width."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ssa_jax.models import MODELS
from ssa_jax.models.blocks import Plain, batch_norm, conv, dense
from ssa_jax.models.feedforward import Feedforward, mlp, smallconv
from ssa_jax.types import Batch

CLASSES = 10
# Of the hidden units of a chain.
MLP_WIDTH = 256
CONV_WIDTH = 32


class Case(NamedTuple):
    """One network on one batch size.

    Attributes:
      model: a name in `MODELS`, or ``"conv_chain"``.
      batch: number of examples.
      depth: hidden units of a chain of equal ones (``"mlp"``, ``"conv_chain"``); 0 for the
        model as it is.
      width: multiple of the usual widths (``"mlp"``, ``"smallconv"``).
    """

    model: str
    batch: int
    depth: int = 0
    width: int = 1

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(H, W, C): CIFAR's, and a quarter of it for a chain of convolutions."""
        side = 16 if self.model == "conv_chain" else 32
        return side, side, 3


def network(case: Case, rank: float | None) -> nnx.Module:
    """The untrained network, dense for rank None; one seed, so always the same weights.

    Raises:
      ValueError: a depth or width that the model does not have.
    """
    rngs = nnx.Rngs(0)
    if case.model == "conv_chain":
        return _conv_chain(case, rank, rngs)
    if case.model == "mlp":
        hidden = (MLP_WIDTH,) * case.depth or (512 * case.width,) * 2
        return mlp(case.input_shape, CLASSES, rank=rank, rngs=rngs, hidden=hidden)
    if case.depth:
        raise ValueError(f"{case.model} has a depth of its own; use mlp or conv_chain")
    if case.model == "smallconv":
        return smallconv(case.input_shape, CLASSES, rank=rank, rngs=rngs, width=case.width)
    if case.width != 1:
        raise ValueError(f"{case.model} has a width of its own; use mlp or smallconv")
    return MODELS[case.model](case.input_shape, CLASSES, rank=rank, rngs=rngs)


def _conv_chain(case: Case, rank: float | None, rngs: nnx.Rngs) -> Feedforward:
    """Equal 3x3 convolutions with norm and ReLU at one size of map, then a mean classifier."""
    units: list[Plain] = []
    c_in = case.input_shape[2]
    for _ in range(case.depth):
        layer = conv(c_in, CONV_WIDTH, 3, rank=rank if units or rank is None else 1.0, rngs=rngs)
        units.append(Plain(layer, norm=batch_norm(CONV_WIDTH, rngs), activation=nnx.relu))
        c_in = CONV_WIDTH
    head = Plain(dense(c_in, CLASSES, rank=None, rngs=rngs), average=True)
    return Feedforward([*units, head])


def random_batch(case: Case) -> Batch:
    """Normal images with random labels: a step takes as long on them as on real ones."""
    images, labels = jax.random.split(jax.random.key(0))
    return Batch(
        jax.random.normal(images, (case.batch, *case.input_shape), jnp.float32),
        jax.random.randint(labels, (case.batch,), 0, CLASSES),
    )
