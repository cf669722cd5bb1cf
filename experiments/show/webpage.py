"""Web pages in one file: tables that a click sorts, pictures within, nothing from elsewhere."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from experiments.show import markdown
from experiments.show.markdown import Table

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


class Picture(NamedTuple):
    """A PNG file, and what it shows for those who cannot see it."""

    file: Path
    text: str

    @property
    def data(self) -> str:
        """The file in base 64."""
        return base64.b64encode(self.file.read_bytes()).decode()


class Section(NamedTuple):
    """A part of a page, whose parts follow each other in this order; all of it is plain text."""

    title: str = ""
    text: str = ""
    table: Table | None = None
    note: str = ""
    pictures: Sequence[Picture] = ()


def page(title: str, sections: Sequence[Section]) -> str:
    """A page of sections; its table's columns sort by a click on their head."""
    shown = [s._replace(table=s.table and markdown.filled(s.table)) for s in sections]
    return _TEMPLATES.get_template("page.html.jinja").render(title=title, sections=shown)


def facts(title: str, values: Mapping[str, Any]) -> Section:
    """Names and their values as a table of two columns."""
    return Section(title, table=(("name", "value"), [(str(k), str(v)) for k, v in values.items()]))
