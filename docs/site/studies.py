"""Pages of the stored studies and runs: their pictures, drawn from what is stored."""

import importlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from experiments.show import charts, overhead_page, variants
from experiments.studies import overhead
from experiments.studies import study as study_lib
from ssa_jax.reporting import plots
from ssa_jax.runs.config import Config

Row = dict[str, Any]
PAGE = "studies.md"
_HEAD = """# Studies in pictures

Drawn from stored results while this site is built; values stand under the pointer. What they say, with commands, hardware and commits, is told in [results](results.md) and [research](research.md).
"""  # noqa: E501


def pages(root: Path) -> dict[str, str | bytes]:
    """Path on the site -> the page, and its pictures."""
    parts, files = [_HEAD], {}
    studies = {path.parent: _study for path in root.glob("results/*/study.json")}
    runs = {path.parent.parent: _runs for path in root.glob("results/*/*/summary.json")}
    for folder, told in sorted((runs | studies).items()):
        if told is _study and not _is_compared(folder):
            continue
        text, picture = told(folder)
        files[f"pictures/studies/{folder.name}.svg"] = picture
        parts.append(text)
    text, files[f"pictures/studies/{overhead_page.NAME}.svg"] = _overhead(root)
    return {PAGE: "\n".join([*parts, text]), **files}


def _is_compared(folder: Path) -> bool:
    """Whether a study is one of variants; `overhead` is drawn from the record of steps."""
    name = json.loads((folder / "study.json").read_text())["study"]
    return hasattr(importlib.import_module(f"experiments.studies.{name}"), "STUDY")


def _section(title: str, about: str, name: str, note: str = "", stored: str = "") -> str:
    file = f"pictures/studies/{name}.svg"
    # A picture in an img element would show no values.
    image = f'<object type="image/svg+xml" data="{file}" aria-label="{title}"></object>'
    told = f"{about} Stored in `{stored or f'results/{name}'}`; [the picture alone]({file})."
    return f"## {title}\n\n{told}\n\n{image}\n\n{note}\n"


def _study(folder: Path) -> tuple[str, bytes]:
    record = json.loads((folder / "study.json").read_text())
    study = importlib.import_module(f"experiments.studies.{record['study']}").STUDY
    rows = [row for row in study_lib.read_results(folder) if row["variant"] in study.labels]
    picture = _drawn(
        lambda file: study.draw(file, rows) or charts.draw(file, [_accuracies(study.labels, rows)])
    )
    known = {k: v for k, v in record["config"].items() if k in Config.__dataclass_fields__}
    config = Config(**known)
    about = f"{study_lib.about(study, config)}, commit `{record['commit']}`."
    title = folder.name.replace("_", " ")
    return _section(title, about, folder.name, study_lib.note(study)), picture


def _accuracies(labels: dict[str, str], rows: Sequence[Row]) -> charts.BarPanel:
    """Bars of the accuracy of all variants, for a study without a picture of its own."""
    runs = {label: good for v, label in labels.items() if (good := variants.finite(rows, v))}
    values = [[100 * row["test_accuracy"] for row in good] for good in runs.values()]
    return charts.BarPanel("test accuracy (%)", list(runs), [charts.Bars("test accuracy", values)])


def _runs(folder: Path) -> tuple[str, bytes]:
    """Runs side by side, a run of each folder of seeds."""
    drawn = []
    for path in sorted(folder.glob("*/summary.json")):
        summary = json.loads(path.read_text())
        rows = [json.loads(s) for s in (path.parent / "metrics.jsonl").read_text().splitlines()]
        drawn.append(plots.Named(path.parent.name, rows, summary["method"]))
    picture = _drawn(lambda file: plots.draw_runs(file, drawn))
    return _section(folder.name.replace("_", " "), "", folder.name), picture


def _overhead(root: Path) -> tuple[str, bytes]:
    """What steps take beside what they promise, of the record that has all that the study draws."""
    stored = "benchmarks/records/step.json"
    record = json.loads((root / stored).read_text())
    shown = {entry.method for entry in overhead.entries(overhead.RANKS)}
    rows = [r for r in overhead_page.beside_reference(record["rows"]) if r["method"] in shown]
    picture = _drawn(lambda file: charts.draw(file, overhead_page.panels(rows)))
    about = f"One training step at batch {rows[0]['batch']}, commit `{record['commit']}`."
    return _section(overhead_page.NAME, about, overhead_page.NAME, stored=stored), picture


def _drawn(draw: Callable[[Path], Any]) -> bytes:
    """What a function draws to a file, as SVG of whatever size there is room for."""
    with TemporaryDirectory() as made:
        file = Path(made) / "picture.svg"
        draw(file)
        return re.sub(rb' width="[\d.]+pt" height="[\d.]+pt"', b"", file.read_bytes(), count=1)
