"""What MkDocs does beside its own: pages from files outside docs, pictures, equations.

README.md, RECORDS.md, CHANGELOG.md and others are pages without a copy, examples are pages of their
code, the notebook is one of its cells; pictures are drawn from stored results while the site is
built. Links between files work in the repository and on the site alike.
"""

import base64
import html
import json
import re
import sys
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

import latex2mathml.converter
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import figures  # noqa: E402
import studies  # noqa: E402

# Page -> the file that it is.
OUTSIDE = {
    "index.md": "README.md",
    "records.md": "RECORDS.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}
TOUR = ("tour.md", "examples/tour.ipynb")
_LINK = re.compile(r"(!?\[[^\]]*\])\(([^()\s]+)\)")
# A cell of more letters is text, which goes over several lines.
_LONG = 36
_FENCED = re.compile(r"(^```.*?^```)", re.M | re.S)


def on_config(config: Any) -> Any:
    """Puts the pages of a folder in the place of its name in the navigation."""

    def expanded(item: Any) -> Any:
        if isinstance(item, list):
            return [page for one in item for page in expanded(one)]
        if isinstance(item, dict):
            return [{title: _only(expanded(value)) for title, value in item.items()}]
        if item == "examples/":
            return list(examples())
        if item == "records/":
            return re.findall(r"\(docs/(records/.*?)\)", (ROOT / OUTSIDE["records.md"]).read_text())
        return [item]

    config.nav = expanded(config.nav)
    return config


def _only(pages: list[Any]) -> Any:
    return pages[0] if len(pages) == 1 and isinstance(pages[0], str) else pages


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages and pictures that are not in docs."""

    def add(path: str, content: str | bytes) -> None:
        files.append(File.generated(config, path, content=content))

    for path, source in OUTSIDE.items():
        add(path, (ROOT / source).read_text())
    for path, content in notebook(json.loads((ROOT / TOUR[1]).read_text())).items():
        add(path, content)
    for path, text in examples().items():
        add(path, text)
    for name, scheme in figures.SCHEMES.items():
        add(f"pictures/methods/{name}.svg", figures.draw(scheme))
    for path, content in studies.pages(ROOT).items():
        add(path, content)
    for path in sorted(ROOT.glob("results/*/*.png")):
        add(path.relative_to(ROOT).as_posix(), path.read_bytes())
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turns links as they are in the repository into those of the site."""
    del config, files
    here = page.file.src_uri
    source = OUTSIDE.get(here) or ("docs/" + here if here != TOUR[0] else TOUR[1])

    def prose(text: str) -> str:
        text = _LINK.sub(lambda match: _moved(match, source, here), text)
        # What would end a cell in the repository does not within code here.
        return re.sub(r"`[^`\n]+`", lambda match: match[0].replace("\\|", "|"), text)

    parts = _FENCED.split(markdown)
    parts[::2] = map(prose, parts[::2])
    return "".join(parts)


def _moved(match: re.Match[str], source: str, here: str) -> str:
    text, link = match.groups()
    if re.match(r"[a-z]+:|#", link):
        return match[0]
    path, _, anchor = link.partition("#")
    place = site_path(normpath(PurePosixPath(source).parent / path))
    if place is None:
        return text.lstrip("!")[1:-1]
    target = relpath(place, PurePosixPath(here).parent) + (f"#{anchor}" if anchor else "")
    return f"{text}({target})"


def site_path(path: str) -> str | None:
    """Where a file of the repository lies on the site; None of one that does not."""
    for page, source in (*OUTSIDE.items(), TOUR):
        if path == source:
            return page
    if path == "examples":
        return "examples/index.md"
    if path.startswith("examples/"):
        return path.removesuffix(".py") + ".md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return path if path.endswith((".png", ".svg")) else None


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Equations as MathML, which browsers show without a script; cells of text over lines."""
    del page, config, files

    def convert(match: re.Match[str]) -> str:
        display = match[1] == "div"
        tex = html.unescape(match[2]).strip()[2:-2]
        shown = latex2mathml.converter.convert(tex, display="block" if display else "inline")
        if "\\" in shown:
            raise PluginError(f"a command that is not known in the equation {tex}")
        return shown

    def cell(match: re.Match[str]) -> str:
        words = re.sub(r"<[^>]*>", "", match[2])
        return f'<td class="{"text" if len(words) > _LONG else "number"}"{match[1]}>{match[2]}</td>'

    content = re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', convert, content, flags=re.S)
    return re.sub(r"<td((?: style=[^>]*)?)>(.*?)</td>", cell, content, flags=re.S)


def notebook(cells: dict[str, Any]) -> dict[str, str | bytes]:
    """A notebook as a page: its words, its code, what that printed and drew."""
    parts, files = [], {}
    for k, cell in enumerate(cells["cells"]):
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                path = f"pictures/tour/{k}.png"
                files[path] = base64.b64decode(data["image/png"])
                parts.append(f"![What the code above draws]({'../docs/' + path})")
            elif words := "".join(output.get("text", data.get("text/plain", ""))):
                parts.append(f"```text\n{words.rstrip()}\n```")
    return {TOUR[0]: "\n\n".join(parts) + "\n", **files}


def examples() -> dict[str, str]:
    """A page for each worked example, with its code, and one that lists them."""
    pages, lines = {}, []
    for file in sorted((ROOT / "examples").glob("*.py")):
        code = file.read_text()
        about = code.split('"""')[1].strip().split("\n\n")[0].replace("\n", " ")
        pages[f"examples/{file.stem}.md"] = (
            f"# {file.name}\n\n`python -m examples.{file.stem}`\n\n```python\n{code}```\n"
        )
        lines.append(f"- [{file.name}]({file.stem}.md): {about}")
    head = "# Worked examples\n\nEach is a program; tests run all of them.\n\n"
    return {"examples/index.md": head + "\n".join(lines) + "\n", **pages}
