"""Checkpoints of the whole training state, written by Orbax.

Ranks change while training, so the stored ranks are read first and give the shapes that the
rest is read with.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from ssa_jax import ranks
from ssa_jax.train import TrainState
from ssa_jax.train import ranks as ranks_of


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


class CheckpointError(ValueError):
    """No checkpoint, or one that does not fit the run."""


class Checkpoints:
    """The checkpoints of one run, the newest `keep` of them.

    Args:
      directory: created when missing.
      keep: how many to keep.
    """

    def __init__(self, directory: Path, keep: int = 2):
        self._directory = directory
        self._checkpointer = ocp.training.Checkpointer(
            directory.resolve(),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def save(self, epoch: int, state: TrainState) -> None:
        """Writes the state after `epoch` epochs, in the background."""
        # Orbax reads the arrays while training goes on, and the next step is donated them.
        # Forced, since a save while another is running is otherwise skipped without a word.
        self._checkpointer.save_checkpointables_async(
            epoch,
            {"state": jax.tree.map(jnp.copy, state)},
            custom_metadata={"ranks": ranks_of(state.params)},
            force=True,
        )

    def latest(self) -> int | None:
        """Epochs done at the newest checkpoint, or None."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def restore(self, like: TrainState) -> tuple[int, TrainState]:
        """The newest state and the epochs it has done.

        Args:
          like: a state of the same run at its initial ranks.

        Raises:
          CheckpointError: there is none, or it is of another model, method or optimiser.
        """
        epoch = self.latest()
        if epoch is None:
            raise CheckpointError(f"no checkpoint in {self._directory}; run without --resume")
        metadata = self._checkpointer.checkpointables_metadata(epoch)
        stored = metadata.custom_metadata["ranks"]
        here = ranks_of(like.params)
        if stored.keys() != here.keys() or any(stored[k] > here[k] for k in here):
            raise CheckpointError(
                f"the checkpoint in {self._directory} holds factors {stored}, this run has {here}"
            )
        target = ranks.compact(like, {k: np.arange(r) for k, r in stored.items() if r < here[k]})
        abstract = jax.tree.map(_abstract, target)
        try:
            loaded = self._checkpointer.load_checkpointables(epoch, {"state": abstract})["state"]
        except Exception as e:
            cause = e.__cause__ or e
            raise CheckpointError(
                f"checkpoint {epoch} in {self._directory} does not fit this run: {cause}"
            ) from e
        # Copied, since the buffers may belong to the reader and the first step is donated them.
        return epoch, jax.tree.map(jnp.copy, loaded)

    def close(self) -> None:
        """Waits until everything is written."""
        self._checkpointer.close()
