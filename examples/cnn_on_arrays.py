"""A residual network on arrays of one's own: marks by `cut`, then `fit`.

python examples/cnn_on_arrays.py
"""

from flax import nnx
from sklearn.datasets import load_digits

import ssa_jax


class Net(nnx.Module):
    """A stem, a residual block and a classifier, as one writes them."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.body = nnx.Conv(32, 32, (3, 3), rngs=rngs)
        self.head = nnx.Linear(32 * 16, 10, rngs=rngs)

    def __call__(self, x):
        x = ssa_jax.cut(nnx.relu(self.norm(self.stem(x))))
        x = ssa_jax.cut(nnx.max_pool(nnx.relu(x + self.body(x)), (2, 2), (2, 2)))
        return self.head(x.reshape(len(x), -1))


def main() -> ssa_jax.Run:
    """Trains on digits."""
    digits = load_digits()
    images, labels = (digits.images * 15).astype("uint8"), digits.target
    train, test = (images[:1500], labels[:1500]), (images[1500:], labels[1500:])
    run = ssa_jax.fit(Net(nnx.Rngs(0)), train, test=test, epochs=8, batch_size=50)
    print(run.evaluate(test), run.predict(images[:3]).argmax(-1))
    return run


if __name__ == "__main__":
    main()
