"""PNG pictures of one run: curves, angles, ranks."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssa_jax.reporting.plots import Row, available, epoch_axes, figure, layer, plain, style

# As many as a legend as high as a figure has room for.
_MOST_NAMES = 20


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


def overview(rows: list[Row]) -> Any:
    """A matplotlib figure of losses and accuracies by epoch, which a notebook shows."""
    from matplotlib.figure import Figure

    with style():
        made = Figure(figsize=(9, 4), layout="constrained")
        _curves(made, rows)
    return made


def _curves(figure: Any, rows: list[Row]) -> None:
    epochs = [r["epoch"] for r in rows]
    has_accuracy = "test_accuracy" in rows[0]
    left = epoch_axes(figure, 121 if has_accuracy else 111, "Loss", "mean loss", rows)
    for split in ("train", "test"):
        left.plot(epochs, [r[f"{split}_loss"] for r in rows], marker=".", label=split)
    left.legend()
    if not has_accuracy:
        return
    right = epoch_axes(figure, 122, "Accuracy", "correct images (%)", rows)
    for split in ("train", "test"):
        right.plot(epochs, [100 * r[f"{split}_accuracy"] for r in rows], marker=".", label=split)
    right.legend()


def _angles(figure: Any, rows: list[Row]) -> None:
    from matplotlib import colormaps

    pictures = {
        "angles": "Local gradient and true gradient",
        "signal_angles": "Teaching signal and true signal",
    }
    epochs = [r["epoch"] for r in rows]
    for place, (name, title) in enumerate(pictures.items(), start=121):
        axes = epoch_axes(figure, place, title, "angle between them (degrees)", rows)
        by_unit = list(zip(*(r[name] for r in rows), strict=True))
        for units, marker in zip(together(by_unit), itertools.cycle("os^DvP*X"), strict=False):
            # Dark next to the inputs, light next to the outputs.
            color = colormaps["viridis"]((units[0] - 1) / len(by_unit))
            style = {"marker": marker, "markersize": 4, "color": color, "label": called(units)}
            axes.plot(epochs, by_unit[units[0] - 1], **style)
        axes.axhline(90, color="0.6", linestyle=":", label="orthogonal")
        axes.set_ylim(-3, max(100, *(a + 5 for r in rows for a in r[name])))
        _legend(axes, below=True)


# Curves that differ by less than this, in degrees, are drawn as one.
_SAME = 0.5


def together(curves: Sequence[Sequence[float]]) -> list[list[int]]:
    """Numbers of the units, from 1, of which none would be seen behind another: a list a curve."""
    groups: list[list[int]] = []
    for unit, curve in enumerate(curves, start=1):
        for group in groups:
            pairs = zip(curve, curves[group[0] - 1], strict=True)
            if all(abs(a - b) < _SAME for a, b in pairs):
                group.append(unit)
                break
        else:
            groups.append([unit])
    return groups


def called(units: Sequence[int]) -> str:
    """Numbers of units in words."""
    if len(units) == 1:
        return f"unit {units[0]}"
    if len(units) > 2 and units[-1] - units[0] == len(units) - 1:
        return f"units {units[0]} to {units[-1]}"
    return f"units {', '.join(map(str, units))}"


def _legend(axes: Any, *, below: bool = False) -> None:
    """Names beside the axes or below, the first and the last of more than have a place there."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > _MOST_NAMES:
        ends = [0, 1, len(labels) - 2, len(labels) - 1]
        handles, labels = [handles[i] for i in ends], [labels[i] for i in ends]
        axes.set_title(f"{axes.get_title()} (named: the first two and the last two)")
    if below:
        axes.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    else:
        axes.legend(handles, labels, loc="center left", bbox_to_anchor=(1, 0.5))


def _ranks(figure: Any, rows: list[Row]) -> None:
    axes = epoch_axes(figure, 111, "Rank of each layer", "stored rank", rows)
    for name in rows[0]["ranks"]:
        axes.plot([r["epoch"] for r in rows], [r["ranks"][name] for r in rows], marker=".",
                  label=plain(layer(name)))  # fmt: skip
    axes.set_ylim(bottom=0)
    _legend(axes)
