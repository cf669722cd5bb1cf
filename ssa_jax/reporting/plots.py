"""What pictures are made with, and those of several runs or of numbers in a grid."""

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np

from ssa_jax.reporting import colors, hover

Row = dict[str, Any]
File = TypeVar("File", Path, IO[bytes])


def available() -> bool:
    """Whether matplotlib is there; a line on the terminal says so if not."""
    is_there = importlib.util.find_spec("matplotlib") is not None
    if not is_there:
        print("no plots: pip install 'ssa_jax[plots]'")
    return is_there


class Named(NamedTuple):
    """A run of a picture: its label, its epochs, and what its colour is of, such as its method."""

    label: str
    rows: list[Row]
    method: str


def draw_runs(file: Path, runs: Sequence[Named]) -> Path | None:
    """Draws test accuracy and training loss by epoch of runs side by side, each with its label.

    Returns:
      The file; None without matplotlib, which a line on the terminal says, or without a run.
    """
    if not runs:
        return None
    if not available():
        return None

    def fill(figure: Any) -> None:
        longest = max((run.rows for run in runs), key=len)
        left = epoch_axes(figure, 121, "Test accuracy", "correct test images (%)", longest)
        right = epoch_axes(figure, 122, "Training loss", "mean loss (logarithmic scale)", longest)
        logarithmic(right, "y")
        # Told apart without colours too.
        marks = itertools.cycle(itertools.product(("-", "--", ":"), "os^DvP*X"))
        hues = colors.of([run.method for run in runs])
        for (label, rows, _), color, (line, marker) in zip(runs, hues, marks, strict=False):
            epochs = [r["epoch"] for r in rows]
            style = {"linestyle": line, "marker": marker, "markersize": 4, "color": color,
                     "label": plain(label), "markevery": 1 + len(rows) // 16}  # fmt: skip
            left.plot(epochs, [100 * r["test_accuracy"] for r in rows], **style)
            right.plot(epochs, [r["train_loss"] for r in rows], **style)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper")

    return figure(file, fill)


def draw_heat_map(
    file: IO[bytes],
    values: np.ndarray,
    labels: Sequence[str],
    epochs: Sequence[int],
    top: float,
    title: str,
) -> bool:
    """Draws values (labels, epochs) between 0 and `top`, lighter for more.

    Returns:
      Whether it could: False without matplotlib.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False

    def fill(figure: Any) -> None:
        axes = figure.add_subplot(111, title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        # A cell is centred on its epoch. Cividis reads the same with any colour vision.
        extent = (epochs[0] - 0.5, epochs[-1] + 0.5, len(labels) - 0.5, -0.5)
        image = axes.imshow(
            values, cmap="cividis", aspect="auto", interpolation="nearest", extent=extent,
            vmin=0, vmax=top,
        )  # fmt: skip
        axes.set_yticks(range(len(labels)), [plain(label) for label in labels])
        figure.colorbar(image, ax=axes)

    figure(file, fill)
    return True


class Panel(NamedTuple):
    """A grid of numbers: names of its axes, their ticks, values and marks as (ys, xs)."""

    names: tuple[str, str]
    xs: Sequence[str]
    ys: Sequence[str]
    values: Sequence[Sequence[float]]
    marks: Sequence[Sequence[str]]


def draw_panels(file: Path, panels: Sequence[Panel], title: str) -> Path | None:
    """Draws grids side by side as colours of one scale, with their marks; NaN stays white.

    Returns:
      The file; None without matplotlib, which a line on the terminal says.
    """
    if not available():
        return None
    top = max((v for p in panels for row in p.values for v in row if v == v), default=1.0)

    def fill(figure: Any) -> None:
        figure.suptitle(title)
        places = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, panel in zip(places, panels, strict=True):
            image = axes.imshow(
                np.array(panel.values), cmap="cividis", aspect="auto", origin="lower",
                vmin=0, vmax=top,
            )  # fmt: skip
            axes.set(xlabel=panel.names[0], ylabel=panel.names[1])
            axes.set_xticks(range(len(panel.xs)), panel.xs)
            axes.set_yticks(range(len(panel.ys)), panel.ys)
            for j, (values, marks) in enumerate(zip(panel.values, panel.marks, strict=True)):
                for i, (value, mark) in enumerate(zip(values, marks, strict=True)):
                    # Readable on dark cells, on bright ones and on none.
                    color = "white" if value < 0.6 * top else "black"
                    axes.text(i, j, mark, ha="center", va="center", color=color)
        figure.colorbar(image, ax=list(places), label="%")

    return figure(file, fill)


def layer(path: str) -> str:
    """A layer by its unit, from 1, and its path there: "0/units/0/map/kernel" is "unit 1: map"."""
    place, *rest = path.split("/")
    if rest[:2] == ["units", place]:
        rest = rest[2:]
    if len(rest) > 1 and rest[-1] == "kernel":
        rest = rest[:-1]
    return f"unit {int(place) + 1}: {'/'.join(rest)}"


def logarithmic(axes: Any, name: str) -> None:
    """Makes x or y logarithmic, with plain numbers at 1, 2, 3 and 5 times the powers of ten."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.set(**{f"{name}scale": "log"})
    axis = {"x": axes.xaxis, "y": axes.yaxis}[name]
    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def plain(label: str) -> str:
    """A label as it reads: matplotlib takes dollars for formulas and hides what begins with _."""
    return ("\u200a" if label.startswith("_") else "") + label.replace("$", r"\$")


def figure(file: File, fill: Callable[[Any], None], height: float = 4.0) -> File:
    """Saves what `fill` draws on a figure; colours that differ with any colour vision.

    It is 9 inches wide and `height` inches high. An SVG file tells values under the pointer.
    """
    # The object interface, since pyplot keeps global state and may want a display.
    from matplotlib.figure import Figure

    with style():
        made = Figure(figsize=(9, height), layout="constrained")
        fill(made)
        svg = file if isinstance(file, Path) and file.suffix == ".svg" else None
        if svg:
            hover.add_targets(made)
        made.savefig(file, dpi=120)
    if svg:
        hover.write_titles(svg)
    return file


def style() -> AbstractContextManager[None]:
    """A context in which pictures are made in the project's colours."""
    import matplotlib
    from matplotlib import rcsetup

    return matplotlib.rc_context({"axes.prop_cycle": rcsetup.cycler(color=colors.OTHERS)})


def epoch_axes(figure: Any, place: int, title: str, unit: str, rows: list[Row]) -> Any:
    """Axes over the epochs of rows."""
    axes = figure.add_subplot(place, title=title, xlabel="epoch", ylabel=unit)
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(rows) > 1:
        axes.set_xlim(rows[0]["epoch"], rows[-1]["epoch"])
    return axes
