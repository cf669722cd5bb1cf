"""Colours of all pictures: one table, by which a method looks the same in each of them."""

from collections import Counter
from collections.abc import Sequence

# By the first word of a label, with what the labels of methods and of rank schedules begin with.
# Hues that differ with any colour vision, after Okabe and Ito (2008); SSA has the strongest.
NAMED = {
    "ssa": "#d55e00",
    "bp": "#1a1a1a",
    "svd_bp": "#7b3294",
    "dfa": "#0072b2",
    "fa": "#56b4e9",
    "usf": "#009e73",
    "frsf": "#66c5ab",
    "brsf": "#00563f",
    "kp": "#a6761d",
    "drtp": "#cc79a7",
    "grape": "#882255",
    "local": "#e69f00",
    "auglocal": "#b8a800",
    "uniform": "#1a1a1a",
    "hybrid": "#0072b2",
    "adaptive": "#d55e00",
}
# Of what is no method, in turn; after Tol (2021).
OTHERS = ("#4477aa", "#ccbb44", "#228833", "#aa3377", "#66ccee", "#332288", "#888888")
# Curves of one name: as it is, then mixed with black (0) or with white (255) by a share.
_SHADES = ((0, 0.0), (0, 0.45), (255, 0.45), (255, 0.7))


def of(labels: Sequence[str], others: Sequence[str] = OTHERS) -> list[str]:
    """A colour for each label: that of its first word, the next shade where that comes again.

    What is no method takes the others in turn.
    """
    seen: Counter[str] = Counter()
    colors = []
    for label in labels:
        name = label.replace(",", " ").split(" ")[0]
        name = name if name in NAMED else ""
        k = seen[name]
        seen[name] += 1
        colors.append(_shade(NAMED[name], k) if name else others[k % len(others)])
    return colors


def _shade(color: str, k: int) -> str:
    to, share = _SHADES[k % len(_SHADES)]
    parts = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part + share * (to - part)):02x}" for part in parts)
