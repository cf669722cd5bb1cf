"""Drawings of how the error reaches the units under each method, as SVG."""

from html import escape
from typing import NamedTuple

from ssa_jax.reporting.colors import NAMED

WIDTH = 620
_MIDDLE, _LEFT, _STEP, _BOX = 0, 96, 150, (92, 44)
_UNITS = 3
_OUTPUT = _LEFT + _UNITS * _STEP


class Scheme(NamedTuple):
    """What a drawing shows.

    Attributes:
      method: gives its colour.
      chain: labels of the steps down from the output, from unit 3 to unit 1; none of a method
        whose error does not walk.
      direct: labels of the arrows from the output to units 1 and 2.
      own: what each hidden unit has beside it; empty for nothing.
      source: what direct arrows carry.
      ahead: whether a signal goes one unit further than its arrow.
    """

    method: str
    chain: tuple[str, ...] = ()
    direct: tuple[str, ...] = ()
    own: str = ""
    source: str = "e"
    ahead: bool = False


SCHEMES = {
    "bp": Scheme("bp", chain=("W₃ᵀ", "W₂ᵀ")),
    "fa": Scheme("fa", chain=("B₃ᵀ", "B₂ᵀ")),
    "usf": Scheme("usf", chain=("sign(W₃)ᵀ", "sign(W₂)ᵀ")),
    "kp": Scheme("kp", chain=("B₃ᵀ → W₃ᵀ", "B₂ᵀ → W₂ᵀ")),
    "dfa": Scheme("dfa", direct=("R₁", "R₂")),
    "drtp": Scheme("drtp", direct=("R₁", "R₂"), source="−y"),
    "grape": Scheme("grape", direct=("B₁ → J₁", "B₂ → J₂")),
    "local": Scheme("local", own="readout"),
    "auglocal": Scheme("auglocal", own="aux. net"),
    "ssa": Scheme("ssa", direct=("D₁", "D₂")),
    "ssa_ahead": Scheme("ssa", direct=("", "D₂"), ahead=True),
    "ssa_sequential": Scheme("ssa", chain=("B_V B_s B_Uᵀ", "B_V B_s B_Uᵀ")),
}


def _x(unit: int) -> int:
    """The middle of a unit's box, from 1."""
    return _LEFT + (unit - 1) * _STEP


def _text(x: float, y: float, words: str, color: str = "#333", size: int = 14) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" fill="{color}" font-size="{size}" text-anchor="middle" '
        f'font-family="system-ui, sans-serif">{escape(words)}</text>'
    )


def _box(x: int, words: str, color: str = "#333", dashed: bool = False) -> str:
    width, height = _BOX
    return (
        f'<rect x="{x - width / 2:g}" y="{_MIDDLE - height / 2:g}" width="{width}" '
        f'height="{height}" rx="7" fill="#fff" stroke="{color}" stroke-width="1.6"'
        + ' stroke-dasharray="4 3"' * dashed
        + f"/>{_text(x, _MIDDLE + 5, words)}"
    )


def _arrow(path: str, color: str) -> str:
    head = "grey" if color == "#999" else "own"
    return (
        f'<path d="{path}" fill="none" stroke="{color}" stroke-width="2" '
        f'marker-end="url(#{head})"/>'
    )


def _heads(color: str) -> str:
    return "<defs>" + "".join(
        f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
        f'markerHeight="7" orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="{c}"/>'
        "</marker>"
        for name, c in (("grey", "#999"), ("own", color))
    ) + "</defs>"  # fmt: skip


def _forward() -> list[str]:
    half = _BOX[0] / 2
    parts = [_text(20, _MIDDLE + 5, "x")]
    ends = [30, *(_x(u) + half for u in range(1, _UNITS + 1))]
    starts = [*(_x(u) - half for u in range(1, _UNITS + 1)), _OUTPUT - half]
    for a, b in zip(ends, starts, strict=True):
        parts.append(_arrow(f"M{a:g} {_MIDDLE}L{b - 2:g} {_MIDDLE}", "#999"))
    parts += [_box(_x(u), f"unit {u}") for u in range(1, _UNITS + 1)]
    return [*parts, _box(_OUTPUT, "error e", dashed=True)]


def _down(right: int, left: int, words: str, color: str) -> str:
    """A step back from one box to the one before it, below both."""
    low = _MIDDLE + _BOX[1] / 2
    middle = (left + right) / 2
    path = f"M{right - 16} {low:g}Q{middle:g} {low + 52:g} {left + 16} {low + 2:g}"
    return _arrow(path, color) + _text(middle, low + 46, words, color)


def _sent(unit: int, words: str, color: str) -> str:
    """An arrow from the output straight to a unit, above the boxes in between."""
    high = _MIDDLE - _BOX[1] / 2
    top = high - 28 * (_UNITS + 1 - unit) - 6
    path = f"M{_OUTPUT - 8 * unit} {high:g}C{_OUTPUT - 30} {top:g} {_x(unit) + 60} {top:g} "
    path += f"{_x(unit) + 6} {high - 2:g}"
    return _arrow(path, color) + _text(_x(unit) + 66, high - 12, words, color)


def draw(scheme: Scheme) -> str:
    """The drawing of a scheme."""
    color = NAMED[scheme.method]
    parts = _forward()
    parts.append(_down(_OUTPUT, _x(3), "e", color))
    for unit, words in zip((3, 2), scheme.chain, strict=False):
        parts.append(_down(_x(unit), _x(unit - 1), words, color))
    for unit, words in enumerate(scheme.direct, start=1):
        if words:
            parts.append(_sent(unit, f"{scheme.source} · {words}", color))
    if scheme.ahead:
        parts.append(_down(_x(2), _x(1), "exact, one unit", color))
        parts.append(_down(_x(3), _x(2), "exact, one unit", color))
    if scheme.own:
        low = _MIDDLE + _BOX[1] / 2
        for unit in (1, 2):
            parts.append(_arrow(f"M{_x(unit)} {low + 38:g}L{_x(unit)} {low + 3:g}", color))
            parts.append(_text(_x(unit), low + 56, f"own loss, {scheme.own}", color))
    top = -120 if any(scheme.direct) else -34
    height = 94 - top
    paper = f'<rect y="{top}" width="{WIDTH}" height="{height}" fill="#fff"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {top} {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}">{_heads(color)}{paper}{"".join(parts)}</svg>'
    )
