"""A small vision transformer: attention's projections are put on factors as well.

python examples/vision_transformer.py
"""

import jax
from flax import nnx
from sklearn.datasets import load_digits

import ssa_jax


class Block(nnx.Module):
    """Attention and a perceptron, each behind a layer norm and around a skip."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x):
        x = ssa_jax.cut(x + self.attention(self.norms[0](x)))
        return ssa_jax.cut(x + self.down(nnx.gelu(self.up(self.norms[1](x)))))


class ViT(nnx.Module):
    """Patches of 2x2, three blocks, the mean over positions."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.patch = nnx.Conv(1, width, (2, 2), strides=2, rngs=rngs)
        self.place = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, 16, width)))
        self.blocks = nnx.List([Block(width, rngs) for _ in range(3)])
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        x = self.patch(x)
        x = ssa_jax.cut(x.reshape(len(x), 16, -1) + self.place[...])
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def main() -> ssa_jax.Run:
    """Trains on digits."""
    digits = load_digits()
    images, labels = (digits.images * 15).astype("uint8"), digits.target
    model = ssa_jax.factorize(ViT(64, nnx.Rngs(0)), rank=0.5, include=["blocks/*"])
    run = ssa_jax.fit(model, (images, labels), epochs=10, batch_size=50)
    print(run.history[-1]["test_accuracy"], run.summary["params_ratio"])
    return run


if __name__ == "__main__":
    main()
