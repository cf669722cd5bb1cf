"""Pictures of studies: curves and bars in panels, means over seeds with their spread."""

import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.show.runs import Row
from experiments.show.variants import finite
from ssa_jax.reporting import colors, plots

# A curve of more points has a band in place of bars, and a marker on some of them alone.
_FEW = 6
# What a run's size at its end is told by.
SIZES = {"params_ratio": "parameters", "macs_ratio": "MACs"}


class Point(NamedTuple):
    """Mean of both coordinates, and sample standard deviation of y; 0 of a single value."""

    x: float
    y: float
    deviation: float

    @classmethod
    def of(cls, x: Sequence[float], y: Sequence[float]) -> "Point":
        """The point of several runs."""
        return cls(statistics.fmean(x), statistics.fmean(y), _deviation(y))


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


class Curve(NamedTuple):
    """A line of a picture: its label, by which its colour goes, and its points, in order."""

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


class Bars(NamedTuple):
    """Bars of one kind: their label, and the values of every name; none leaves a gap."""

    label: str
    values: Sequence[Sequence[float]]


class BarPanel(NamedTuple):
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


def over_variants(
    label: str, variants: Iterable[str], rows: Sequence[Row], x: Callable[[str, Row], float]
) -> Curve:
    """Test accuracy in per cent, a point a variant that has finite runs, by their x."""
    points = [
        Point.of([x(name, r) for r in runs], [100 * r["test_accuracy"] for r in runs])
        for name in variants
        if (runs := finite(rows, name))
    ]
    return Curve(label, sorted(points))


def over_epochs(
    label: str, rows: Sequence[Row], x: Callable[[Row], Sequence[float]],
    y: Callable[[Row], Sequence[float]],
) -> Curve:  # fmt: skip
    """What runs follow by epoch, of the epochs that all of them have."""
    xs, ys = (zip(*(values(r) for r in rows), strict=False) for values in (x, y))
    return Curve(label, [Point.of(*pair) for pair in zip(xs, ys, strict=True)])


def frontiers(groups: Mapping[str, Iterable[str]], rows: Sequence[Row], size: str) -> list[Curve]:
    """Accuracy by the size at the end, a curve a group of variants."""
    return [
        over_variants(g, names, rows, lambda _, r: 100 * r[size]) for g, names in groups.items()
    ]


def draw_frontiers(
    groups: Mapping[str, Iterable[str]], file: Path, rows: Sequence[Row]
) -> Path | None:
    """Draws accuracy against both sizes, parameters and multiply-accumulates."""
    return draw(
        file,
        [
            Panel(
                f"{name} (% of the dense network's)", "test accuracy (%)",
                frontiers(groups, rows, size),
            )
            for size, name in SIZES.items()
        ],
    )  # fmt: skip


def draw(file: Path, panels: Sequence[Panel | BarPanel]) -> Path | None:
    """Draws panels of one kind side by side.

    Returns:
      The file; None without matplotlib, which a line on the terminal says, and of no panel or
      one without a name.
    """
    bars = [panel for panel in panels if isinstance(panel, BarPanel)]
    if not panels or not all(panel.names for panel in bars) or not plots.available():
        return None

    def fill(figure: Any) -> None:
        # Heights compare across panels of one quantity.
        share = not bars and len({panel.y for panel in panels if isinstance(panel, Panel)}) == 1
        # Bars of the same things have their names once.
        alike = len({(panel.x, *panel.names) for panel in bars}) == 1 < len(bars)
        places = figure.subplots(1, len(panels), squeeze=False, sharey=share)[0]
        for axes, panel in zip(places, panels, strict=True):
            axes.set(xlabel="" if alike else panel.x, title=panel.title or _only(panel))
            _bars(axes, panel) if isinstance(panel, BarPanel) else _curves(axes, panel)
            if share:
                axes.label_outer()
            elif alike and axes is not places[0]:
                axes.tick_params(labelleft=False)
        if alike:
            figure.supxlabel(bars[0].x, fontsize="medium")
        handles, labels = places[0].get_legend_handles_labels()
        if len(handles) > 1:
            columns = 4 if bars else 3
            place = "outside upper center" if alike else "outside lower center"
            figure.legend(handles, labels, loc=place, ncols=columns)

    rows = max((len(panel.names) * (len(panel.bars) + 1) for panel in bars), default=0)
    return plots.figure(file, fill, height=max(4.0, 1.5 + 0.2 * rows))


def _only(panel: Panel | BarPanel) -> str:
    """The name of bars of one kind, which have no legend."""
    if isinstance(panel, BarPanel) and len(panel.bars) == 1:
        return plots.plain(panel.bars[0].label)
    return ""


def _curves(axes: Any, panel: Panel) -> None:
    axes.set(ylabel=panel.y)
    if "x" not in panel.log:
        axes.xaxis.get_major_locator().set_params(integer=True)
    for name in panel.log:
        plots.logarithmic(axes, name)
    axes.grid(alpha=0.3, which="both")
    for level in panel.levels:
        axes.axhline(level, color="0.4", linestyle=":")
    # Told apart without colours too.
    hues = colors.of([curve.label for curve in panel.curves])
    looks = zip(panel.curves, hues, itertools.cycle("os^DvP*X"), strict=False)
    for k, (curve, color, marker) in enumerate(looks):
        if curve.points:
            _curve(axes, curve, {"color": color, "marker": marker}, k)


def _curve(axes: Any, curve: Curve, look: dict[str, Any], place: int) -> None:
    xs, ys, spread = zip(*curve.points, strict=True)
    style = {"label": plots.plain(curve.label), "markersize": 5, **look}
    if len(xs) <= _FEW:
        axes.errorbar(xs, ys, yerr=spread if any(spread) else None, capsize=3, **style)
        return
    # Marks of curves that lie on one another stand at different points.
    every = len(xs) // _FEW
    axes.plot(xs, ys, markevery=(place % every, every), **style)
    low, high = ([y + sign * d for y, d in zip(ys, spread, strict=True)] for sign in (-1, 1))
    axes.fill_between(xs, low, high, color=look["color"], alpha=0.2, linewidth=0)


def _bars(axes: Any, panel: BarPanel) -> None:
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)
    width = 0.8 / len(panel.bars)
    # Of one kind the names tell apart, such as methods; of several also a hatching.
    hues: Sequence[Any] = colors.of([bars.label for bars in panel.bars])
    if len(panel.bars) == 1:
        hues = [colors.of(panel.names, colors.OTHERS[:1])]
    hatches = ("", "//", "..", "xx")
    for k, (bars, color, hatch) in enumerate(zip(panel.bars, hues, hatches, strict=False)):
        places = [i + (k - (len(panel.bars) - 1) / 2) * width for i in range(len(panel.names))]
        means = [statistics.fmean(v) if v else 0.0 for v in bars.values]
        spread = [_deviation(v) for v in bars.values]
        style = {"label": plots.plain(bars.label), "hatch": hatch, "color": color}
        axes.barh(places, means, width, xerr=spread if any(spread) else None, capsize=2,
                  edgecolor="white", **style)  # fmt: skip
    axes.set_yticks(range(len(panel.names)), [plots.plain(name) for name in panel.names])
    axes.invert_yaxis()
    if panel.level is not None:
        axes.axvline(panel.level, color="0.2", linestyle=":")
