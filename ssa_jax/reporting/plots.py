"""PNG pictures of a run: curves, angles, ranks."""

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np

Row = dict[str, Any]
File = TypeVar("File", Path, IO[bytes])


def available() -> bool:
    """Whether matplotlib is there; a line on the terminal says so if not."""
    is_there = importlib.util.find_spec("matplotlib") is not None
    if not is_there:
        print("no plots: pip install 'ssa_jax[plots]'")
    return is_there


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """Draws curves.png, angles.png and, for a factorised model, ranks.png.

    Returns:
      The files written; none without matplotlib, which a line on the terminal says.
    """
    if not available():
        return []
    files = [figure(folder / "curves.png", lambda f: _curves(f, rows))]
    files.append(figure(folder / "angles.png", lambda f: _angles(f, rows)))
    if rows[-1]["ranks"]:
        files.append(figure(folder / "ranks.png", lambda f: _ranks(f, rows)))
    return files


Named = tuple[str, list[Row]]


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
        longest = max((rows for _, rows in runs), key=len)
        left = _axes(figure, 121, "Test accuracy", "%", longest)
        right = _axes(figure, 122, "Training loss", "nats (logarithmic)", longest)
        right.set_yscale("log")
        # Told apart without colours too, and beyond the ten of the cycle.
        marks = itertools.product(("-", "--", ":"), "os^DvP*X")
        for (label, rows), (line, marker) in zip(runs, itertools.cycle(marks), strict=False):
            epochs = [r["epoch"] for r in rows]
            style = {"linestyle": line, "marker": marker, "markersize": 4, "label": plain(label)}
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


# As many as a legend as high as a figure has room for.
_MOST_NAMES = 20


def plain(label: str) -> str:
    """A label as it reads: matplotlib takes dollars for formulas and hides what begins with _."""
    return ("\u200a" if label.startswith("_") else "") + label.replace("$", r"\$")


def figure(file: File, fill: Callable[[Any], None], height: float = 4.0) -> File:
    """Saves what `fill` draws on a figure; colours that differ with any colour vision.

    It is 9 inches wide and `height` inches high.
    """
    # The object interface, since pyplot keeps global state and may want a display.
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"axes.prop_cycle": _cycle()}):
        made = Figure(figsize=(9, height), layout="constrained")
        fill(made)
        made.savefig(file, dpi=120)
    return file


def overview(rows: list[Row]) -> Any:
    """A matplotlib figure of losses and accuracies by epoch, which a notebook shows."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"axes.prop_cycle": _cycle()}):
        made = Figure(figsize=(9, 4), layout="constrained")
        _curves(made, rows)
    return made


def _cycle() -> Any:
    import matplotlib.style

    return matplotlib.style.library["tableau-colorblind10"]["axes.prop_cycle"]


def _axes(figure: Any, place: int, title: str, unit: str, rows: list[Row]) -> Any:
    axes = figure.add_subplot(place, title=title, xlabel="epoch", ylabel=unit)
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(rows) > 1:
        axes.set_xlim(rows[0]["epoch"], rows[-1]["epoch"])
    return axes


def _curves(figure: Any, rows: list[Row]) -> None:
    epochs = [r["epoch"] for r in rows]
    has_accuracy = "test_accuracy" in rows[0]
    left = _axes(figure, 121 if has_accuracy else 111, "Loss", "mean of the loss", rows)
    for split in ("train", "test"):
        left.plot(epochs, [r[f"{split}_loss"] for r in rows], marker=".", label=split)
    left.legend()
    if not has_accuracy:
        return
    right = _axes(figure, 122, "Accuracy", "%", rows)
    for split in ("train", "test"):
        right.plot(epochs, [100 * r[f"{split}_accuracy"] for r in rows], marker=".", label=split)
    right.legend()


def _angles(figure: Any, rows: list[Row]) -> None:
    pictures = {
        "angles": "Local gradient to the true one",
        "signal_angles": "Teaching signal to the true one",
    }
    for place, (name, title) in enumerate(pictures.items(), start=121):
        axes = _axes(figure, place, title, "degrees", rows)
        for i in range(len(rows[0][name])):
            axes.plot([r["epoch"] for r in rows], [r[name][i] for r in rows], marker=".",
                      label=f"unit {i + 1}")  # fmt: skip
        axes.axhline(90, color="0.6", linestyle=":", label="orthogonal")
        axes.set_ylim(0, max(100, *(a + 5 for r in rows for a in r[name])))
    _legend(axes)


def _legend(axes: Any) -> None:
    """Names beside the axes, the first and the last of more than have a place there."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > _MOST_NAMES:
        ends = [0, 1, len(labels) - 2, len(labels) - 1]
        handles, labels = [handles[i] for i in ends], [labels[i] for i in ends]
        axes.set_title(f"{axes.get_title()} (named: the first two and the last two)")
    axes.legend(handles, labels, loc="center left", bbox_to_anchor=(1, 0.5))


def _ranks(figure: Any, rows: list[Row]) -> None:
    axes = _axes(figure, 111, "Stored rank of each layer", "rank", rows)
    for name in rows[0]["ranks"]:
        axes.plot([r["epoch"] for r in rows], [r["ranks"][name] for r in rows], marker=".",
                  label=name.removesuffix("/kernel"))  # fmt: skip
    axes.set_ylim(bottom=0)
    _legend(axes)
