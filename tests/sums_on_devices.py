"""Run by its test in a process of its own with eight host devices: what a step sends.

    python sums_on_devices.py

prints as JSON the collectives of a training step, by kind, for some settings of a perceptron.
"""

import collections
import json
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np

from ssa_jax.data import Dataset
from ssa_jax.parallel.collectives import collectives
from ssa_jax.parallel.mesh import make_layout
from ssa_jax.runs.build import build
from ssa_jax.runs.config import Config
from ssa_jax.training import train
from ssa_jax.types import Batch

BATCH = 128
SETTINGS = {
    "bp": {"method": "bp"},
    "svd_bp": {"method": "svd_bp"},
    "direct": {"feedback_lookahead": 0},
    "one ahead": {"feedback_lookahead": 1},
    "regression": {"feedback": "regression"},
}


def main():
    images, labels = np.zeros((BATCH, 8, 8, 1), np.uint8), np.zeros(BATCH, np.int32)
    data = Dataset(images, labels, images, labels, 10, 0, False)
    layout = make_layout()
    batch = layout.place_rows(Batch(images.astype(np.float32), labels))
    sent = {}
    for name, settings in SETTINGS.items():
        settings = {"model": "mlp", "method": "ssa", "memory": "taped", **settings}
        built = build(Config(dataset="digits", batch_size=BATCH, **settings), data)
        step = train.make_step(built.units, built.method, built.optimizer, built.weights)
        with layout.active():
            step = layout.returning(layout.stepped, step)
            program = step.lower(layout.place(built.state), batch).compile().as_text()
        sent[name] = collections.Counter(c.kind for c in collectives(program))
    print(json.dumps(sent))


if __name__ == "__main__":
    main()
