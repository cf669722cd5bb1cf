"""Pictures of studies: bars side by side, means over seeds with their spread."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ssa_jax.reporting import plots


class Bars(NamedTuple):
    """Bars of one kind: their label, and the values of every name; none leaves a gap."""

    label: str
    values: Sequence[Sequence[float]]


class Panel(NamedTuple):
    """Groups of bars, a group a name, first name on top.

    Attributes:
      x: name of the axis of lengths, with its unit.
      names: of the groups.
      bars: with the same labels in all panels of a picture, which have one legend.
      title: above the panel.
      level: where a dotted line stands.
    """

    x: str
    names: Sequence[str]
    bars: Sequence[Bars]
    title: str = ""
    level: float | None = None


def draw(file: Path, panels: Sequence[Panel]) -> Path | None:
    """Draws panels side by side.

    Returns:
      The file; None without matplotlib, which a line on the terminal says.
    """
    if not plots.available():
        return None

    def fill(figure: Any) -> None:
        places = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, panel in zip(places, panels, strict=True):
            _panel(axes, panel)
        figure.legend(*places[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)

    rows = max(len(panel.names) * (len(panel.bars) + 1) for panel in panels)
    return plots.figure(file, fill, height=max(4.0, 1.5 + 0.2 * rows))


def _panel(axes: Any, panel: Panel) -> None:
    axes.set(xlabel=panel.x, title=panel.title)
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)
    width = 0.8 / len(panel.bars)
    # Told apart without colours too.
    for k, (bars, hatch) in enumerate(zip(panel.bars, ("", "//", "..", "xx"), strict=False)):
        places = [i + (k - (len(panel.bars) - 1) / 2) * width for i in range(len(panel.names))]
        means = [statistics.fmean(v) if v else 0.0 for v in bars.values]
        spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in bars.values]
        axes.barh(places, means, width, xerr=spread if any(spread) else None, capsize=2,
                  label=plots.plain(bars.label), hatch=hatch, edgecolor="white")  # fmt: skip
    axes.set_yticks(range(len(panel.names)), [plots.plain(name) for name in panel.names])
    axes.invert_yaxis()
    if panel.level is not None:
        axes.axvline(panel.level, color="0.2", linestyle=":")
