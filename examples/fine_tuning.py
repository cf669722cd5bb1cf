"""A run is saved, read again, and goes on from there with other data.

python examples/fine_tuning.py FOLDER
"""

import sys
from pathlib import Path

from sklearn.datasets import load_digits

import ssa_jax


def main(folder: Path) -> ssa_jax.Run:
    """Trains on digits up to four, then on all ten of them."""
    digits = load_digits()
    images, labels = (digits.images * 15).astype("uint8"), digits.target
    few = labels < 5
    ssa_jax.fit("mlp", (images[few], labels[few]), outputs=10, epochs=3, batch_size=50).save(folder)
    run = ssa_jax.fit(ssa_jax.load(folder), (images, labels), epochs=3, batch_size=50)
    print(run.history[-1]["test_accuracy"])
    return run


if __name__ == "__main__":
    main(Path(sys.argv[1]))
