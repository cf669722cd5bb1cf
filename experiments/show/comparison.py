"""Runs compared: what they reached and cost, their curves, the settings in which they differ."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments import folders
from experiments.show import markdown, runs, webpage
from experiments.show.markdown import Table
from experiments.show.runs import Row
from experiments.show.webpage import Picture, Section
from ssa_jax.errors import ConfigError
from ssa_jax.reporting import plots
from ssa_jax.runs import workdir
from ssa_jax.runs.workdir import Workdir, WorkdirError, read_json, write_text

FILES = ("report.md", "curves.png", "index.html")
_TITLE = "Comparison of runs"
_NOTE = (
    "Rank is the mean over layers of rank over full rank; parameters and MACs are for inference, "
    "and relative to the dense network."
)
_SAME = Section("Settings that differ", "All settings are the same.")
_CURVES = "Test accuracy and training loss of each run by epoch"


class Run(NamedTuple):
    """A workdir: what its files hold, the summary is empty until the run has ended."""

    name: str
    record: Row
    rows: list[Row]
    summary: Row

    @property
    def latest(self) -> Row:
        """The summary; before there is one, the last epoch."""
        last = self.rows[-1] if self.rows else {}
        return {"status": "running", **last, **self.summary}


def read(workdirs: Sequence[str]) -> list[Run]:
    """The runs in folders, of seeds each, by the shortest names that tell them apart.

    Raises:
      ConfigError: no folder.
      WorkdirError: a folder that holds no run.
    """
    if not workdirs:
        raise ConfigError("give the workdirs to compare: python -m experiments.report WORKDIR ...")
    paths = list(dict.fromkeys(path for w in workdirs for path in workdir.runs_in(Path(w))))
    compared = []
    for path, name in zip(paths, runs.names(paths), strict=True):
        record = read_json(path / "config.json")
        if not isinstance(record.get("config"), dict):
            raise WorkdirError(
                f"{path} holds no run: config.json is missing or damaged; give a --workdir that "
                "experiments.cifar has written"
            )
        rows = Workdir(path).rows()
        compared.append(Run(name, record, rows, read_json(path / "summary.json")))
    return compared


def reached(compared: Sequence[Run]) -> Table:
    """What the runs reached and cost."""
    return runs.HEADER, [runs.line(run.name, run.latest) for run in compared]


def differing(compared: Sequence[Run]) -> Table:
    """The settings in which runs differ, a line a setting; a dash where a run's code had none."""
    configs = [run.record["config"] for run in compared]
    names = dict.fromkeys(name for config in configs for name in config if name not in runs.OWN)
    lines = [(name, *(str(c.get(name, "-")) for c in configs)) for name in names]
    return (
        ("setting", *(run.name for run in compared)),
        [line for line in lines if len(set(line[1:])) > 1],
    )


def provenance(compared: Sequence[Run]) -> Table:
    """What each run was made with, as its config.json says."""

    def line(run: Run) -> Sequence[str]:
        facts = (str(run.record.get(k) or "-") for k in ("started", "commit", "hardware"))
        versions = run.record.get("versions") or {}
        return run.name, *facts, ", ".join(f"{k} {v}" for k, v in versions.items()) or "-"

    return ("run", "started", "commit", "hardware", "versions"), [line(run) for run in compared]


def write(compared: Sequence[Run], folder: Path) -> Path:
    """Writes the files of a report, over those of an earlier one; returns its page.

    Raises:
      WorkdirError: the folder cannot be written, or holds something else.
    """
    with folders.writing(folder, "--out"):
        if any(path.name not in FILES for path in folder.iterdir()):
            raise WorkdirError(f"{folder} holds other things than a report; give another --out")
        drawn = [
            plots.Named(run.name, run.rows, run.record["config"].get("method", ""))
            for run in compared
            if run.rows
        ]
        curves = plots.draw_runs(folder / "curves.png", drawn)
        changed = differing(compared)
        sections = [
            Section(text=_NOTE),
            Section("Results", table=reached(compared)),
            *([Section("Curves", pictures=[Picture(curves, _CURVES)])] if curves else []),
            Section("Settings that differ", "", changed) if changed[1] else _SAME,
            Section("Made with", table=provenance(compared)),
        ]
        write_text(folder / "report.md", _markdown(sections))
        write_text(folder / "index.html", webpage.page(_TITLE, sections))
    return folder / "index.html"


def _markdown(sections: Sequence[Section]) -> str:
    parts = [f"# {_TITLE}"]
    for section in sections:
        parts += [f"## {section.title}"] * bool(section.title) + [section.text] * bool(section.text)
        if section.table:
            header, rows = markdown.filled(section.table)
            escaped = [[_escape(cell) for cell in row] for row in (header, *rows)]
            parts.append(markdown.table(escaped[0], escaped[1:]))
        parts += [f"![{picture.text}]({picture.file.name})" for picture in section.pictures]
    return "\n\n".join(parts) + "\n"


def _escape(text: str) -> str:
    for mark in ("\\", "|", "<", "`", "*", "_", "[", "!"):
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.split())
