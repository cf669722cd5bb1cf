"""Run by its test in a process of its own with eight host devices: batch norms of devices' rows.

Prints as JSON, of a network with batch norms trained for three steps in double precision,
how far a mesh of eight devices that normalise by their own rows ends from one device that
normalises by groups of as many rows, how far one that normalises by all rows ends from that, and
the collectives of a step on the mesh.
"""

import json
from unittest import mock

import jax
import jax.numpy as jnp
import mesh_on_devices
import numpy as np

from ssa_jax.data import Dataset
from ssa_jax.layers.norm import BatchNorm
from ssa_jax.parallel.collectives import collectives
from ssa_jax.parallel.compiling import Compiling
from ssa_jax.parallel.mesh import ONE_DEVICE, make_layout
from ssa_jax.runs import build
from ssa_jax.runs.config import Config
from ssa_jax.runs.trainer import Trainer
from ssa_jax.training.running_means import RunningMeans

BATCH, STEPS = 32, 3


def dataset():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (BATCH * (STEPS + 1), 8, 8, 3), np.uint8)
    labels = rng.integers(0, 10, len(images)).astype(np.int32)
    at = BATCH * STEPS
    return Dataset(images[:at], labels[:at], images[at:], labels[at:], 10, 1, True)


def trained(statistics, layout, data):
    """The state after some steps, and the step as it was compiled."""
    config = Config(
        method="dfa", model="smallconv", batch_size=BATCH, epochs=1,
        optimizer="momentum", learning_rate=1e-2, batch_statistics=statistics,
    )  # fmt: skip
    with layout.active():
        trainer = Trainer(config, data, build.build(config, data), Compiling(), layout)
        trainer.state = mesh_on_devices.cast(trainer.state, jnp.float64)
        feed = next(trainer.loader.feeds(trainer.state.key, 0, BATCH, 0)).source
        step = trainer.programs.steps.programs[1].lower(trainer.state, feed).compile().as_text()
        trainer.train_epoch(0, RunningMeans({}, 0), lambda step: None)
        return jax.tree.map(np.asarray, trainer.state._replace(key=None)), step


def main():
    jax.config.update("jax_enable_x64", True)
    data, mesh = dataset(), make_layout()
    with mock.patch.object(BatchNorm, "groups", mesh.devices):
        alone, _ = trained("global", ONE_DEVICE, data)
    spread, by_device = trained("device", mesh, data)
    whole, by_all = trained("global", mesh, data)
    found = {
        "apart": mesh_on_devices.distance(spread, alone),
        "otherwise": mesh_on_devices.distance(whole, alone),
        "sums": [len(collectives(text)) for text in (by_device, by_all)],
        "kinds": sorted({c.kind for c in collectives(by_device)}),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
