"""Doctests in docstrings as code, without a section of their own."""

import re
from typing import Any

import griffe

# From a prompt to the next empty line.
_EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.M)


class Doctests(griffe.Extension):
    """Puts fences around the doctests of all docstrings."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called once an object is known."""
        if obj.docstring:
            obj.docstring.value = _EXAMPLE.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
