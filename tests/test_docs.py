"""What pages show runs: their Python, their commands' flags, the notebook, the site's parts."""

import dataclasses
import importlib.util
import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import first

import ssa_jax
from ssa_jax.methods import METHODS
from ssa_jax.runs.config import Config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# The one of exports is run in test_examples.py, which looks at what it writes.
WITH_PYTHON = [p for p in PAGES if "```python\n" in p.read_text() and p.stem != "export"]


def blocks(page, language="python"):
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


class Net(nnx.Module):
    """The one of the README, by which pages mean a model of the reader's own."""

    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(64, 64, rngs=rngs), nnx.Linear(64, 64, rngs=rngs)
        self.c = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        x = ssa_jax.cut(nnx.relu(self.a(x.reshape(len(x), -1))))
        return self.c(ssa_jax.cut(nnx.relu(self.b(x))))


def given():
    """What a page takes for granted: a model and data of the reader's own."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (300, 8, 8), np.uint8), rng.integers(0, 10, 300)
    grads = {"q": jnp.ones((64, 16)), "bias": jnp.ones(16)}
    x, y = images[:20], labels[:20]
    return {"Net": Net, "nnx": nnx, "images": images, "labels": labels, "x": x, "y": y,
            "grads": grads}  # fmt: skip


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * ("fit(" in "".join(blocks(p))))
     for p in WITH_PYTHON],
)  # fmt: skip
def test_python_on_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = given()
    for block in blocks(page):
        exec(compile(block, page.name, "exec"), names)


def test_pages_with_python_are_found():
    assert {"README", "library", "methods", "ranks", "transforms"} <= {p.stem for p in WITH_PYTHON}


def commands():
    """Every `python -m` of a program of this project on a page, with its flags."""
    for page in PAGES:
        text = re.sub(r"\\\n|\$\(.*?\)", " ", page.read_text())
        for module, rest in re.findall(r"python -m ((?:experiments|benchmarks)[\w.]*)(.*)", text):
            flags = re.findall(r"--(\w+)", re.split(r"[`#|;&]", rest)[0])
            yield pytest.param(module, flags, id=f"{page.stem}-{module}")


SOURCES = "".join(
    f.read_text() for folder in ("ssa_jax/runs", "experiments", "benchmarks")
    for f in sorted((ROOT / folder).rglob("*.py"))
)  # fmt: skip


def test_commands_on_pages_name_programs_and_flags_that_there_are():
    shown = list(commands())
    assert len(shown) > 30
    for module, flags in (case.values for case in shown):
        assert importlib.util.find_spec(module.rstrip(".")), module
        for flag in flags:
            known = rf'"(?:--)?{flag}"|^    {flag}: [\w |]+ = setting\('
            assert re.search(known, SOURCES, re.M), f"{module} --{flag}"


def test_every_flag_of_a_run_is_told():
    page = (ROOT / "docs/running.md").read_text()
    fields = [f.name for f in dataclasses.fields(Config)]
    assert [name for name in fields if not re.search(rf"--{name}\b", page)] == []


def cells(kind):
    notebook = json.loads((ROOT / "examples/tour.ipynb").read_text())
    return [c for c in notebook["cells"] if c["cell_type"] == kind]


def test_the_notebook_is_stored_with_its_pictures():
    for cell in cells("code"):
        drawn = [o for o in cell["outputs"] if "image/png" in o.get("data", {})]
        assert len(drawn) == ("plt.show()" in "".join(cell["source"]))
        assert not any(o["output_type"] == "error" for o in cell["outputs"])


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_it_says(monkeypatch):
    import matplotlib

    with matplotlib.rc_context({"backend": "agg"}):
        names = {}
        for cell in cells("code"):
            exec("".join(cell["source"]), names)
    angles = {name: run.history[-1]["angles"][0] for name, run in names["runs"].items()}
    assert angles["bp"] < 1 < angles["ssa, 1 ahead"] < angles["ssa direct"] < angles["dfa"]
    taped, streamed = (names["needed"][f"ssa, {mode}"] for mode in ("taped", "streamed"))
    assert max(streamed) < 1.1 * min(streamed)
    assert taped[-1] > 2 * taped[0]
    assert names["kept"][-1] < 88


@pytest.fixture
def site(monkeypatch):
    """The module that fits files to the site."""
    for needed in ("mkdocs", "latex2mathml"):
        pytest.importorskip(needed)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/site/hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    return hooks


def test_links_lead_to_the_same_files_on_the_site(site):
    found = [
        site.site_path(path)
        for path in ("README.md", "docs/records/step.md", "examples/regression.py",
                     "results/a/b.png", "results/a")
    ]  # fmt: skip
    assert found == ["index.md", "records/step.md", "examples/regression.md", "results/a/b.png",
                     None]  # fmt: skip
    page = type("Page", (), {"file": type("File", (), {"src_uri": "api/fit.md"})})
    told = "[a](../library.md#x) and [`b`](../../results/c.json), `d \\| e`\n```\n[f](../g.py)\n```"
    moved = site.on_page_markdown(told, page, None, None)
    assert moved == "[a](../library.md#x) and `b`, `d | e`\n```\n[f](../g.py)\n```"


def test_equations_become_mathml_and_cells_keep_their_numbers_together(site):
    html = '<div class="arithmatex">\\[x_1 &lt; 2\\]</div><td>1 %</td><td>' + "word " * 20 + "</td>"
    shown = site.on_page_content(html, None, None, None)
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in shown
    assert "&lt;" in shown or "&#x0003C;" in shown
    assert '<td class="number">1 %</td><td class="text">' in shown


def drawings():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs/site/figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    return figures


def test_every_method_has_its_equation_and_its_drawing():
    page = (ROOT / "docs/methods.md").read_text()
    sections = page.split("\n## ")[1:]
    for method in METHODS:
        (section,) = (s for s in sections if f"`{method}`" in s.splitlines()[0])
        assert "$$" in section
        assert "](pictures/methods/" in section
    figures = drawings()
    shown = set(re.findall(r"pictures/methods/(\w+)\.svg", page))
    assert shown == set(figures.SCHEMES)


@pytest.mark.parametrize("name", first(list(drawings().SCHEMES), 2))
def test_a_drawing_is_svg_with_its_labels(name):
    figures = drawings()
    scheme = figures.SCHEMES[name]
    words = [t.text for t in ET.fromstring(figures.draw(scheme)).iter() if t.tag.endswith("text")]
    assert {"x", "unit 1", "unit 3", "error e"} <= set(words)
    assert set(scheme.chain) <= set(words)


def test_one_version_is_told_everywhere():
    version = ssa_jax.__version__
    changes = (ROOT / "CHANGELOG.md").read_text()
    unreleased, newest = re.findall(r"^## \[(.*?)\](.*)$", changes, re.M)[:2]
    assert unreleased == ("Unreleased", "")
    assert newest[0] == version
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {version}\n" in citation
    assert f'\ndate-released: "{newest[1].removeprefix(" - ")}"\n' in citation
