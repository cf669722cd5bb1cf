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


def test_one_program_of_experiments_measures_with_the_benchmarks():
    for file in sorted((ROOT / "experiments").glob("*.py")):
        uses = any(name.split(".")[0] == "benchmarks" for name in imports(file))
        assert uses == (file.name in ("overhead.py", "overhead_page.py")), file
