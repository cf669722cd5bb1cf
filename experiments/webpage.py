"""Web pages in one file: tables that a click sorts, pictures within, nothing from elsewhere."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Nothing is fetched, whatever a page's text may hold.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

# Characters from which on a cell may break its line.
_LONG = 60

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem;
  color: #1a1a1a; background: #fff; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid #ccc; padding: .3rem .6rem; text-align: left; vertical-align: top; }
th, td { white-space: nowrap; }
td.long { white-space: normal; min-width: 20rem; }
th { background: #f2f2f2; }
th button { font: inherit; font-weight: bold; border: 0; background: none; padding: 0;
  cursor: pointer; }
th[aria-sort=ascending] button::after { content: " \\25b2"; }
th[aria-sort=descending] button::after { content: " \\25bc"; }
img { max-width: 100%; }
"""

# A column is sorted by number where each of its cells begins with one; what is missing comes last.
_SCRIPT = """
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, body = head.closest("table").tBodies[0];
    const column = head.cellIndex, up = head.getAttribute("aria-sort") !== "ascending";
    const text = row => row.cells[column].textContent.trim();
    const missing = row => ["", "-"].includes(text(row));
    const number = row => parseFloat(text(row));
    const rows = [...body.rows], known = rows.filter(row => !missing(row));
    const numeric = known.every(row => !isNaN(number(row)));
    known.sort((a, b) => (up ? 1 : -1) *
      (numeric ? number(a) - number(b) : text(a).localeCompare(text(b))));
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...known, ...rows.filter(missing));
  });
}
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A page of parts, each made by a function of this module."""
    name = html.escape(title)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{name}</h1>\n"
        + "\n".join(parts)
        + f"\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def heading(text: str) -> str:
    """A heading within a page."""
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that sorts by the column whose head is clicked; again for the other way."""
    head = "".join(
        f'<th scope="col"><button type="button">{html.escape(title)}</button></th>'
        for title in header
    )
    lines = ("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return (
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody>\n</table></div>"
    )


def _cell(text: str) -> str:
    kind = ' class="long"' if len(text) > _LONG else ""
    return f"<td{kind}>{html.escape(text)}</td>"


def facts(values: Mapping[str, Any]) -> str:
    """Names and their values as a table of two columns."""
    return table(("name", "value"), [(str(k), str(v)) for k, v in values.items()])


def picture(file: Path, text: str) -> str:
    """A PNG file within the page, and what it shows for those who cannot see it."""
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<p><img src="data:image/png;base64,{data}" alt="{html.escape(text)}"></p>'
