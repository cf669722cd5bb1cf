"""Compares runs: what they reached and cost, their curves, and the settings in which they differ.

    python -m experiments.report WORKDIR [WORKDIR ...] [--out=FOLDER]

The folder gets report.md, curves.png and index.html, which is one file with the picture in it.
Runs may be finished or not; what a run does not tell yet is a dash.
"""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags as absl_flags

from experiments import flags, results, webpage
from experiments.table import markdown
from ssa_jax.errors import ConfigError
from ssa_jax.reporting import plots
from ssa_jax.runs import workdir
from ssa_jax.runs.workdir import Workdir, WorkdirError, read_json, write_text

Row = dict[str, Any]
Table = tuple[Sequence[str], list[Sequence[str]]]

FILES = ("report.md", "curves.png", "index.html")
# Settings by which no two runs are the same.
_OWN = ("workdir", "resume")


class Run(NamedTuple):
    """A workdir: what its files hold, the summary is empty until the run has ended."""

    name: str
    record: Row
    rows: list[Row]
    summary: Row

    @property
    def told(self) -> Row:
        """The summary; before there is one, the last epoch."""
        last = self.rows[-1] if self.rows else {}
        return {"status": "running", **last, **self.summary}


def read(folders: Sequence[str]) -> list[Run]:
    """The runs in folders, of seeds each, by the shortest names that tell them apart.

    Raises:
      ConfigError: no folder.
      WorkdirError: a folder that holds no run.
    """
    if not folders:
        raise ConfigError("give the workdirs to compare: python -m experiments.report WORKDIR ...")
    paths = list(dict.fromkeys(path for f in folders for path in workdir.runs_in(Path(f))))
    ends = [path.resolve().name for path in paths]
    runs = []
    for path, end in zip(paths, ends, strict=True):
        record = read_json(path / "config.json")
        if not isinstance(record.get("config"), dict):
            raise WorkdirError(
                f"{path} holds no run: config.json is missing or damaged; give a --workdir that "
                "experiments.cifar has written"
            )
        name = end if ends.count(end) == 1 else str(path)
        rows = Workdir(path).rows()
        runs.append(Run(name, record, rows, read_json(path / "summary.json")))
    return runs


def reached(runs: Sequence[Run]) -> Table:
    """What the runs reached and cost."""
    return results.HEADER, [results.cells(run.name, run.told) for run in runs]


def differing(runs: Sequence[Run]) -> Table:
    """The settings in which runs differ, a line a setting; a dash where a run's code had none."""
    configs = [run.record["config"] for run in runs]
    names = dict.fromkeys(name for config in configs for name in config if name not in _OWN)
    lines = [(name, *(str(c.get(name, "-")) for c in configs)) for name in names]
    return (
        ("setting", *(run.name for run in runs)),
        [line for line in lines if len(set(line[1:])) > 1],
    )


def provenance(runs: Sequence[Run]) -> Table:
    """What each run was made with, as its config.json says."""

    def line(run: Run) -> Sequence[str]:
        facts = (str(run.record.get(k) or "-") for k in ("started", "commit", "hardware"))
        versions = run.record.get("versions") or {}
        return run.name, *facts, ", ".join(f"{k} {v}" for k, v in versions.items()) or "-"

    return ("run", "started", "commit", "hardware", "versions"), [line(run) for run in runs]


def write(runs: Sequence[Run], folder: Path) -> Path:
    """Writes the files of a report, over those of an earlier one; returns its page.

    Raises:
      WorkdirError: the folder cannot be written, or holds something else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(path.name not in FILES for path in folder.iterdir()):
            raise WorkdirError(f"{folder} holds other things than a report; give another --out")
        drawn = [run for run in runs if run.rows]
        curves = plots.draw_runs(folder / "curves.png", [(r.name, r.rows) for r in drawn])
        parts = [
            ("Results", reached(runs)),
            ("Settings that differ", differing(runs)),
            ("Made with", provenance(runs)),
        ]
        write_text(folder / "report.md", _markdown(parts, curves))
        write_text(folder / "index.html", _page(parts, curves))
    except OSError as e:
        raise WorkdirError(f"cannot write to {folder}: {e.strerror}; give another --out") from e
    return folder / "index.html"


_SAME = "All settings are the same."
_NOTE = (
    "Rank is the mean over layers of rank over full rank; parameters and MACs are for inference, "
    "and relative to the dense network."
)
_CURVES = "Test accuracy and training loss of each run by epoch"


def _markdown(parts: Sequence[tuple[str, Table]], curves: Path | None) -> str:
    texts = ["# Comparison of runs", _NOTE]
    if curves:
        texts.append(f"![{_CURVES}]({curves.name})")
    for title, (header, rows) in parts:
        escaped = [[_escape(cell) for cell in row] for row in (header, *rows)]
        texts += [f"## {title}", markdown(escaped[0], escaped[1:]) if rows else _SAME]
    return "\n\n".join(texts) + "\n"


def _escape(text: str) -> str:
    for mark in ("\\", "|", "<", "`", "*", "_", "[", "!"):
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.split())


def _page(parts: Sequence[tuple[str, Table]], curves: Path | None) -> str:
    texts = [webpage.paragraph(_NOTE)]
    for title, (header, rows) in parts:
        texts += [
            webpage.heading(title),
            webpage.table(header, rows) if rows else webpage.paragraph(_SAME),
        ]
    if curves:
        texts[3:3] = [webpage.heading("Curves"), webpage.picture(curves, _CURVES)]
    return webpage.page("Comparison of runs", texts)


def main(folders: Sequence[str]) -> None:
    """Writes the report that the command line asks for and says where it is."""
    runs = read(folders)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    page = write(runs, Path(absl_flags.FLAGS.out or f"runs/{stamp}-report"))
    print(markdown(*reached(runs)))
    print(f"\nreport: {page}")


if __name__ == "__main__":
    flags.define_path("out", "Where the report goes; default: a new folder in runs/.")
    flags.run_program(main, arguments=True)
