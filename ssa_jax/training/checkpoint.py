"""Checkpoints of the whole training state, written by Orbax in the background.

A checkpoint is a folder named by the steps done. It holds the `TrainState` and, in Orbax's custom
metadata, its sealed `record`. Where several processes train, all of them call what saves and reads,
on one file system, and the first writes the record. Orbax makes a checkpoint visible by renaming a
finished folder, so a killed process leaves whole checkpoints and at most one temporary folder,
which the next writer removes.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from ssa_jax.parallel.mesh import barrier
from ssa_jax.training import ranks
from ssa_jax.training.record import (
    DamagedError,
    Position,
    Record,
    describe,
    differences,
    of_settings,
    one_line,
    read_arrays,
    read_record,
    seal,
    shapes,
    versions,
    with_stored_feedback,
)
from ssa_jax.training.train import ranks as ranks_of
from ssa_jax.types import TrainState


class CheckpointError(ValueError):
    """No checkpoint that can be used, or one that could not be written."""


class Checkpoints:
    """The checkpoints of one run: the newest `keep` and the one of best test accuracy.

    Reading changes nothing in the directory. A context manager, which waits at its end until
    everything is written.

    Args:
      directory: created when missing by the first `save`.
      keep: how many of the newest to keep.
      config: settings that a run must share to go on with a checkpoint; None leaves them unchecked.
      tell: called with one line for each damaged checkpoint that is passed over.
    """

    def __init__(
        self,
        directory: Path,
        keep: int = 2,
        config: dict[str, Any] | None = None,
        tell: Callable[[str], None] = print,
    ):
        self._directory = directory
        self._keep = keep
        # As JSON gives it back.
        self._config = None if config is None else json.loads(json.dumps(config))
        self._tell = tell
        self._writer: ocp.training.Checkpointer | None = None
        self._accuracies: dict[int, float] = {}

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.close()
        except CheckpointError:
            # What ended the block first is what its caller should hear.
            if kind is None:
                raise

    def steps(self) -> list[int]:
        """Steps done at each checkpoint, ascending."""
        if not self._directory.is_dir():
            return []
        return sorted(int(p.name) for p in self._directory.iterdir() if p.name.isdigit())

    def latest(self) -> int | None:
        """Steps done at the newest checkpoint, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Steps done at the checkpoint of best test accuracy, the later of equals, or None."""
        accuracies = self._read_accuracies()
        return max(accuracies, key=lambda s: (accuracies[s], s), default=None)

    def save(self, state: TrainState, position: Position) -> None:
        """Writes a state in the background, under the number of its steps.

        Raises:
          CheckpointError: this save could not begin, or the one before it failed; what was
            complete before is untouched.
        """
        step = int(state.step)
        # Orbax reads the arrays while training goes on, and the next step is donated them.
        state = jax.tree.map(jnp.copy, state)
        record = {
            "position": position._asdict(),
            "config": self._config,
            "versions": versions(),
            "ranks": ranks_of(state.params),
            "arrays": describe(state),
        }
        with self._writing():
            writer = self._open()
            # Before the save, which decides what to keep.
            if position.score is not None:
                self._accuracies[step] = position.score
            # Forced, since a save while another is running is otherwise skipped without a word.
            writer.save_checkpointables_async(
                step, {"state": state}, custom_metadata=seal(record), force=True
            )

    def restore(
        self,
        like: TrainState,
        step: int | None = None,
        place: Callable[[TrainState], TrainState] = lambda state: state,
    ) -> tuple[Position, TrainState]:
        """A state and its position: of `step`, or of the newest checkpoint that is not damaged.

        Args:
          like: a state of the same run at its initial ranks.
          step: of `steps`, such as `best()`.
          place: puts arrays where those that are read shall lie, such as `Layout.place`.

        Raises:
          CheckpointError: there is none, it is of another run, or all are damaged.
        """
        candidates = self.steps()[::-1] if step is None else [step]
        if not candidates:
            raise CheckpointError(f"no checkpoint in {self._directory}; run without --resume")
        damaged = []
        for candidate in candidates:
            try:
                record, state = self._read(candidate, like, place)
            except DamagedError as e:
                damaged.append(f"checkpoint {candidate} is damaged ({one_line(e)})")
                continue
            for line in damaged:
                self._tell(f"{line}: going back to checkpoint {candidate}")
            if different := differences(versions(), record["versions"]):
                self._tell(f"checkpoint {candidate} was written by other versions: {different}")
            return Position(**record["position"]), state
        raise CheckpointError(
            f"nothing in {self._directory} can be read: {'; '.join(damaged)}; start anew in "
            "another --workdir"
        )

    def set_aside_after(self, step: int) -> None:
        """Renames what is newer than a restored checkpoint, whose steps will be saved again."""
        self.close()
        # No process may still be looking for the newest, nor look before all are set aside.
        barrier("before setting aside")
        newer_ones = [n for n in self.steps() if n > step] if jax.process_index() == 0 else []
        for newer in (self._directory / str(n) for n in newer_ones):
            aside = newer.with_name(f"{newer.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            newer.rename(aside)
        barrier("after setting aside")

    def wait(self) -> None:
        """Waits until everything is written; CheckpointError where it could not be."""
        if self._writer is not None:
            with self._writing():
                self._writer.wait()

    def close(self) -> None:
        """Like `wait`, and ends the writer's threads."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with self._writing():
                writer.close()

    def _open(self) -> ocp.training.Checkpointer:
        if self._writer is None:
            policies = ocp.training.preservation_policies
            self._accuracies = self._read_accuracies()
            kept = [policies.LatestN(self._keep), _Best(self._accuracies)]
            self._writer = ocp.training.Checkpointer(
                self._directory.resolve(),
                preservation_policy=policies.AnyPreservationPolicy(kept),
                cleanup_tmp_directories=True,
            )
        return self._writer

    def _read_accuracies(self) -> dict[int, float]:
        scores = {}
        for step in self.steps():
            with contextlib.suppress(DamagedError):
                scores[step] = read_record(self._directory / str(step))["position"]["score"]
        return {step: score for step, score in scores.items() if score is not None}

    def _read(
        self, step: int, like: TrainState, place: Callable[[TrainState], TrainState]
    ) -> tuple[Record, TrainState]:
        record = read_record(folder := self._directory / str(step))
        if different := of_settings(self._config, record["config"]):
            raise CheckpointError(f"{folder} is of another run: {different}")
        stored = {k: v[:2] for k, v in record["arrays"].items()}
        at_ranks = ranks.at_ranks(like, like.params, record["ranks"])
        target = place(with_stored_feedback(at_ranks, stored))
        if different := differences(shapes(target), stored):
            raise CheckpointError(
                f"{folder} does not fit this run, whose model or optimiser has other arrays, or "
                f"whose units are divided otherwise: {different}"
            )
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target
        )
        # Copied: the buffers may belong to the reader, and the first step is donated them.
        loaded = jax.tree.map(jnp.copy, read_arrays(folder, abstract))
        if different := differences(describe(loaded), record["arrays"], limit=1):
            raise DamagedError(f"its arrays are altered: {different}")
        return record, loaded

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Says of what fails in the block where it was to be written, and what to do."""
        try:
            yield
        except jax.errors.JaxRuntimeError:
            # Of a device or another process, and not of the directory.
            raise
        except Exception as e:
            raise CheckpointError(
                f"a checkpoint could not be written to {self._directory}: {one_line(e)}; the "
                "ones before it are kept, make room and go on with --resume"
            ) from e


class _Best(ocp.training.preservation_policies.PreservationPolicy):
    """Keeps the checkpoint of best accuracy, the later of equals, by our own records.

    Orbax's policy reads them from a file that nothing protects, and raises where one is damaged.
    """

    def __init__(self, accuracies: dict[int, float]):
        self._accuracies = accuracies

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        known = [c.step for c in checkpoints if c.step in self._accuracies]
        best = max(known, key=lambda step: (self._accuracies[step], step), default=None)
        return [c.step == best for c in checkpoints]
