"""What a run shows while it trains: a line an epoch, failures as they occur, TensorBoard."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ssa_jax import factors
from ssa_jax.reporting import diagnosis, summary, tensorboard
from ssa_jax.reporting.diagnosis import Finding

Row = dict[str, Any]
Tree = Any


def bar(epoch: int, epochs: int, images: int, done: int) -> Any:
    """The bar of an epoch on a terminal or in a notebook, a context; hidden where nobody looks."""
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    return tqdm(
        total=images, initial=done, unit="img", desc=f"epoch {epoch}/{epochs}",
        disable=not watched, leave=False,
    )  # fmt: skip


class Progress:
    """A context that ends what it writes; makes nothing before the first epoch.

    Args:
      config: the run's, with the fields of `runs.config.Config`.
      rows: gives the rows of all epochs, also of the one that is shown.
      events: where TensorBoard looks; None writes nothing there.
    """

    def __init__(self, config: Any, rows: Callable[[], list[Row]], events: Path | None):
        self.config, self.rows = config, rows
        self.board = tensorboard.Board(events) if events else None
        self._findings: list[Finding] = []

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
            self.board.write(self.rows(), spectra)

    def diagnose(self) -> list[Finding]:
        """The failures so far; those that are new are printed."""
        findings = diagnosis.diagnose(self.rows(), self.config)
        self._findings = diagnosis.tell(findings, self._findings)
        return self._findings
