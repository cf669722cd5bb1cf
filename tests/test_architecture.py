"""Imports run one way, as docs/design.md says."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ssa_jax"

# What each room of the package may import from the others.
ALLOWED = {
    "errors": set(),
    "types": set(),
    "plugins": {"errors"},
    "settings": {"errors", "plugins"},
    "factors": set(),
    "parallel": {"errors", "factors"},
    "layers": {"factors"},
    "models": {"layers", "networks"},
    "networks": {"factors", "layers"},
    "export": {"layers", "models", "training"},
    "methods": {"factors", "layers", "networks"},
    "transforms": {"factors"},
    "data": {"errors", "parallel", "types"},
    "stages": {"methods", "networks", "parallel", "training", "types"},
    "training": {"data", "factors", "methods", "networks", "parallel", "transforms", "types"},
    "runs": {
        "data",
        "errors",
        "factors",
        "methods",
        "models",
        "networks",
        "parallel",
        "plugins",
        "reporting",
        "settings",
        "stages",
        "training",
        "types",
    },
    "reporting": {"errors", "factors"},
    "__init__": set(),
}


def imports(file):
    """Dotted names of the modules a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module
            if node.module == "ssa_jax":
                yield from (f"ssa_jax.{alias.name}" for alias in node.names)


def part(file):
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=[str(f.relative_to(PACKAGE)) for f in FILES])
def test_imports_run_one_way(file):
    ours = {name.split(".")[1] for name in imports(file) if name.startswith("ssa_jax.")}
    assert ours - {part(file)} <= ALLOWED[part(file)]


def test_only_programs_see_flags():
    for file in FILES:
        names = {name.split(".")[0] for name in imports(file)}
        assert not names & {"absl", "experiments", "benchmarks"}, file
        if part(file) not in ("reporting", "runs"):
            assert not names & {"tqdm", "matplotlib"}, file


def test_one_place_knows_flax_split_and_merge():
    for file in FILES:
        text = file.read_text()
        if file != PACKAGE / "networks/models.py":
            assert "nnx.merge" not in text, file
            assert "nnx.split" not in text, file


def test_files_and_rooms_stay_small():
    for file in FILES:
        assert len(file.read_text().splitlines()) <= 260, file
    for room in {file.parent for file in FILES} - {PACKAGE}:
        assert len(list(room.glob("[!_]*.py"))) <= 15, room


EXPERIMENTS = ROOT / "experiments"
# What each room of experiments may import from the others; "" are the programs and what they share.
ROOMS = {
    "": {"", "measure", "show", "studies"},
    "studies": {"", "measure", "show"},
    "measure": {"show"},
    "show": {""},
}
# Of the programs' folder, what is no program and may be imported by studies and by their pages.
SHARED = {"flags", "folders"}
OF_EXPERIMENTS = sorted(EXPERIMENTS.rglob("*.py"))


def named(file):
    """Modules that a file imports, with the names that may be modules themselves."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("file", OF_EXPERIMENTS, ids=[f.stem for f in OF_EXPERIMENTS])
def test_programs_stand_on_studies_and_these_on_what_measures_and_shows(file):
    room = file.parent.relative_to(EXPERIMENTS).as_posix().removeprefix(".")
    for name in named(file):
        package, *parts = name.split(".")
        if package == "benchmarks":
            assert file.name in ("overhead.py", "overhead_page.py"), name
        if package != "experiments":
            continue
        other = parts[0] if parts[0] in ROOMS else ""
        assert other == room or other in ROOMS[room], name
        assert other or not room or parts[0] in SHARED, name


def test_no_room_of_experiments_is_crowded_and_no_file_long():
    for file in OF_EXPERIMENTS:
        assert len(file.read_text().splitlines()) <= 250, file
        modules = [f for f in file.parent.glob("*.py") if f.name != "__init__.py"]
        assert len(modules) <= 15, file.parent


def test_markdown_tables_and_pages_have_one_writer_each():
    for file in [*OF_EXPERIMENTS, *(ROOT / "benchmarks").glob("*.py")]:
        for library, writer in (("tabulate", "markdown.py"), ("jinja2", "webpage.py")):
            uses = library in {name.split(".")[0] for name in imports(file)}
            assert uses == (file == EXPERIMENTS / "show" / writer), file
        assert '" | ".join' not in file.read_text(), file
