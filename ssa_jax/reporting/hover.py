"""Values that an SVG of a figure tells when the pointer is over them."""

import re
from pathlib import Path
from typing import Any

_MARK = "value: "
# A curve of more points would be more targets than picture.
_MOST = 200


def add_targets(figure: Any) -> None:
    """Names each bar by its value, and lays an unseen target of that kind over each point."""
    from matplotlib.container import BarContainer, ErrorbarContainer

    for axes in figure.axes:
        axes.autoscale(False)
        curves = [(str(line.get_label()), line) for line in axes.lines]
        for held in axes.containers:
            if isinstance(held, ErrorbarContainer):
                curves.append((str(held.get_label()), held.lines[0]))
            elif isinstance(held, BarContainer):
                lies = held.orientation == "horizontal"
                for bar in held:
                    value = bar.get_width() if lies else bar.get_height()
                    bar.set_gid(_named(str(held.get_label()), f"{value:.4g}"))
        for label, line in curves:
            # Of lines without a label, such as the caps of error bars, there is nothing to tell.
            if label.startswith("_") or line is None or len(line.get_xydata()) > _MOST:
                continue
            for x, y in line.get_xydata():
                text = _named(label, f"{x:.4g}, {y:.4g}")
                axes.plot([x], [y], "o", markersize=9, alpha=0, gid=text, label="_")


def _named(label: str, value: str) -> str:
    words = "" if label.startswith("_") else label.replace(r"\$", "$").strip() + ": "
    return f"{_MARK}{words}{value}"


def write_titles(file: Path) -> None:
    """Makes the names in an SVG that was saved titles, which browsers show."""
    text = file.read_text(encoding="utf-8")
    file.write_text(re.sub(f'<g id="{_MARK}([^"]*)">', r"<g><title>\1</title>", text), "utf-8")
