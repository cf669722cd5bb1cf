"""Run by its test in a process of its own with eight host devices: training on a mesh of them.

    python mesh_on_devices.py MODEL METHOD SIZE DTYPE RANK

trains twenty steps, with a compaction of truncated ranks after ten where the method has ranks, on
one device, on eight and, where there are factors, on eight with these in parts, and prints as JSON
how far the latter end from the first, what was compiled, and where the state lay. MODEL is a name,
of `helpers.NARROW` at that width; RANK "constant" leaves out all that falling ranks bring.
"""

import functools
import json
import os
import sys
import time

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from helpers import NARROW

from ssa_jax.data import Dataset
from ssa_jax.models import MODELS
from ssa_jax.parallel.compiling import Compiling
from ssa_jax.parallel.mesh import ONE_DEVICE, make_layout
from ssa_jax.runs import build
from ssa_jax.runs.config import Config
from ssa_jax.runs.trainer import Trainer
from ssa_jax.training.running_means import RunningMeans

BATCH, STEPS = 8, 10


def dataset(size):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (BATCH * STEPS + 20, size, size, 3), np.uint8)
    labels = rng.integers(0, 10, len(images)).astype(np.int32)
    at = BATCH * STEPS
    return Dataset(images[:at], labels[:at], images[at:], labels[at:], 10, 2, True)


def narrowed(name):
    """The name of a model whose width is that of tests, where there is one."""
    if name in NARROW:
        MODELS[f"narrow_{name}"] = functools.partial(MODELS[name], **NARROW[name][1])
        name = f"narrow_{name}"
    return name


def cast(state, dtype):
    """The state with its floating-point arrays in a dtype, in which it is trained from there on."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jax.numpy.issubdtype(x.dtype, np.floating) else x, state
    )


def train(config, data, layout, dtype):
    """Two epochs: the rows, the state at their end on the host, the trainer.

    The probe that measures angles is left out: it takes longer to compile than all the rest.
    """
    with layout.active():
        trainer = Trainer(config, data, build.build(config, data), Compiling(), layout)
        trainer.state = cast(trainer.state, dtype)
        rows = []
        for epoch in range(2):
            means = RunningMeans({}, 0)
            trainer.train_epoch(epoch, means, lambda step: None)
            row = means.row() | trainer.evaluate()
            rows.append(row | trainer._compact(row))
        state = jax.tree.map(np.asarray, trainer.state._replace(key=None))
    return rows, state, trainer


def distance(state, other):
    """The largest difference of two states' parameters and statistics over the largest entry."""
    pairs = zip(*(jax.tree.leaves((s.params, s.mstate)) for s in (state, other)), strict=True)
    return max(float(np.abs(a - b).max() / max(1.0, np.abs(b).max())) for a, b in pairs)


def main():
    model, method, size, dtype, rank = *sys.argv[1:3], int(sys.argv[3]), *sys.argv[4:]
    jax.config.update("jax_enable_x64", dtype == "float64")
    # Falling far enough for a compaction to pay after the first epoch.
    ranks = {}
    if method == "ssa" and rank != "constant":
        ranks = {"rank_schedule": "hybrid", "rank_init": float(rank), "rank_target": 0.3,
                 "rank_floor": 0.3}  # fmt: skip
    # Adam's first step divides every entry by its own size, and so magnifies its rounding.
    config = Config(
        method=method, model=narrowed(model), batch_size=BATCH, epochs=6, optimizer="momentum",
        learning_rate=1e-3, feedback_every=4, **ranks,
    )  # fmt: skip
    data = dataset(size)
    rows, state, alone = train(config, data, ONE_DEVICE, dtype)
    layouts = {"whole": make_layout()}
    if ranks:
        layouts["parts"] = make_layout(shard_factors=True)
    found = {}
    for name, layout in layouts.items():
        began = time.monotonic()
        others, other, trainer = train(config, data, layout, dtype)
        losses = [[r[k] for r in rs for k in ("train_loss", "test_loss")] for rs in (rows, others)]
        found[name] = {
            "losses": float(np.abs(np.subtract(*losses)).max()),
            "state": distance(other, state),
            "compiles": [alone.compiling.steps, trainer.compiling.steps],
            "compacted": any("test_loss_before_compaction" in row for row in others),
            "spread": sum(not x.sharding.is_fully_replicated for x in
                          jax.tree.leaves(trainer.state)),
            "seconds": time.monotonic() - began,
        }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
