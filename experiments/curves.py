"""Pictures of studies: labelled curves in panels, means over seeds with their spread."""

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ssa_jax.reporting import plots

# A curve of more points has a band in place of bars, and a marker on some of them alone.
_FEW = 6


class Point(NamedTuple):
    """Mean of both coordinates, and sample standard deviation of y; None of a single value."""

    x: float
    y: float
    deviation: float | None

    @classmethod
    def of(cls, x: Sequence[float], y: Sequence[float]) -> "Point":
        """The point of several runs."""
        deviation = statistics.stdev(y) if len(y) > 1 else None
        return cls(statistics.fmean(x), statistics.fmean(y), deviation)


class Curve(NamedTuple):
    """A line of a picture: its label and its points, in order."""

    label: str
    points: Sequence[Point]


class Panel(NamedTuple):
    """Curves over axes named x and y.

    Attributes:
      x: name of the axis, with its unit.
      y: likewise.
      curves: with the same labels in the same order in all panels of a picture, which have one
        legend.
      title: above the panel.
      log: the axes that are logarithmic, of "x" and "y".
      levels: values of y at which a dotted line stands.
    """

    x: str
    y: str
    curves: Sequence[Curve]
    title: str = ""
    log: Sequence[str] = ()
    levels: Sequence[float] = ()


def draw(file: Path, panels: Sequence[Panel]) -> Path | None:
    """Draws panels side by side.

    Returns:
      The file; None without matplotlib, which a line on the terminal says.
    """
    if not plots.available():
        return None

    def fill(figure: Any) -> None:
        # Heights compare across panels of one quantity.
        share = len({panel.y for panel in panels}) == 1
        places = figure.subplots(1, len(panels), squeeze=False, sharey=share)[0]
        for axes, panel in zip(places, panels, strict=True):
            _panel(axes, panel)
            if share:
                axes.label_outer()
        handles, labels = places[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=3)

    return plots.figure(file, fill)


def _panel(axes: Any, panel: Panel) -> None:
    axes.set(xlabel=panel.x, ylabel=panel.y, title=panel.title)
    if "x" not in panel.log:
        axes.xaxis.get_major_locator().set_params(integer=True)
    for name in panel.log:
        _logarithmic(axes, name)
    axes.grid(alpha=0.3, which="both")
    for level in panel.levels:
        axes.axhline(level, color="0.4", linestyle=":")
    # Told apart without colours too.
    for curve, marker in zip(panel.curves, itertools.cycle("os^DvP*X")):
        if curve.points:
            _curve(axes, curve, marker)


def _logarithmic(axes: Any, name: str) -> None:
    """One of both axes, with plain numbers at 1, 2, 3 and 5 times the powers of ten."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.set(**{f"{name}scale": "log"})
    axis = {"x": axes.xaxis, "y": axes.yaxis}[name]
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _curve(axes: Any, curve: Curve, marker: str) -> None:
    xs, ys = [p.x for p in curve.points], [p.y for p in curve.points]
    spread = [p.deviation or 0.0 for p in curve.points]
    style = {"label": plots.plain(curve.label), "marker": marker, "markersize": 5}
    if len(xs) <= _FEW:
        axes.errorbar(xs, ys, yerr=spread if any(spread) else None, capsize=3, **style)
        return
    (line,) = axes.plot(xs, ys, markevery=len(xs) // _FEW, **style)
    low, high = ([y + sign * d for y, d in zip(ys, spread, strict=True)] for sign in (-1, 1))
    axes.fill_between(xs, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
