"""What a run shows while it trains: a line an epoch, failures as they occur, TensorBoard."""

from typing import Any

import numpy as np

from ssa_jax import factors
from ssa_jax.reporting import diagnosis, tensorboard
from ssa_jax.reporting.diagnosis import Finding
from ssa_jax.runs import summary
from ssa_jax.runs.config import Config
from ssa_jax.runs.workdir import Workdir

Row = dict[str, Any]
Tree = Any


class Progress:
    """A context that ends what it writes; makes nothing before the first epoch.

    Args:
      config: the run.
      folder: its workdir, whose metrics.jsonl has every epoch before it is shown.
    """

    def __init__(self, config: Config, folder: Workdir):
        self.config, self.folder = config, folder
        writes = config.tensorboard and folder.ours
        self.board = tensorboard.Board(folder.path / "tensorboard") if writes else None
        self._told: list[Finding] = []

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.board:
            self.board.close()

    def epoch(self, row: Row, params: Tree) -> None:
        """Shows an epoch that is logged."""
        print(summary.line(row, self.config.epochs), flush=True)
        if self.config.watch:
            self.diagnose()
        if self.board:
            spectra = {n: np.asarray(f.s) for n, f in factors.named_leaves(params).items()}
            self.board.write(self.folder.rows(), spectra)

    def diagnose(self) -> list[Finding]:
        """The failures so far; those that are new are printed."""
        found = diagnosis.diagnose(self.folder.rows(), self.config)
        self._told = diagnosis.tell(found, self._told)
        return self._told
