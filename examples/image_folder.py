"""A folder of class folders of images, with a stock model and augmentation.

python examples/image_folder.py FOLDER
"""

import sys

import ssa_jax


def main(folder: str) -> ssa_jax.Run:
    """Trains on FOLDER/train/CLASS/*.png (or FOLDER/CLASS/*.png), cut to squares of 32 pixels."""
    run = ssa_jax.fit("smallconv", folder, size=32, crop=4, flip=True, epochs=2, batch_size=20)
    print(run.history[-1]["test_accuracy"], run.config.dataset)
    return run


if __name__ == "__main__":
    main(sys.argv[1])
