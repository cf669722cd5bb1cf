"""Imports run one way, as docs/design.md says."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ssa_jax"

# What each module or folder of the package may import from the package.
ALLOWED = {
    "linalg": set(),
    "mesh": {"factors"},
    "factors": {"linalg"},
    "lowering": {"linalg"},
    "layers": {"factors", "linalg", "lowering"},
    "models": {"layers", "lowering", "models"},
    "factorize": {"factors", "layers", "lowering"},
    "export": {"costs", "layers", "lowering", "models", "export"},
    "units": set(),
    "forward": {"units"},
    "twins": {"factors", "linalg"},
    "feedback": {"factors", "units", "forward"},
    "losses": {"factors", "linalg"},
    "methods": {"factors", "feedback", "forward", "lowering", "twins", "units", "methods"},
    "transforms": {"factors", "linalg", "transforms"},
    "ranks": {"factors", "linalg", "mesh"},
    "optim": {"factors", "ranks", "transforms"},
    "unitwise": {"forward", "transforms"},
    "passes": {"forward", "losses", "methods", "units"},
    "train": {
        "factors",
        "forward",
        "losses",
        "mesh",
        "methods",
        "passes",
        "transforms",
        "units",
        "unitwise",
    },
    "metrics": {"factors", "linalg", "forward", "losses", "methods", "passes", "train", "units"},
    "data": {"mesh", "train"},
    "images": set(),
    "streams": {"data", "images", "mesh", "train"},
    "dispatch": {"train"},
    "replicas": {"data", "dispatch", "train"},
    "record": {"mesh", "train"},
    "checkpoint": {"mesh", "ranks", "record", "train"},
    "costs": {"forward", "losses", "methods", "passes", "units"},
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
    assert ours <= ALLOWED[part(file)]


def test_only_programs_see_flags():
    for file in FILES:
        names = {name.split(".")[0] for name in imports(file)}
        assert not names & {"absl", "experiments", "benchmarks", "tqdm", "matplotlib"}, file


def test_one_place_knows_flax_split_and_merge():
    for file in FILES:
        text = file.read_text()
        if file.name != "units.py":
            assert "nnx.merge" not in text, file
            assert "nnx.split" not in text, file


def test_one_program_of_experiments_measures_with_the_benchmarks():
    for file in sorted((ROOT / "experiments").glob("*.py")):
        uses = any(name.split(".")[0] == "benchmarks" for name in imports(file))
        assert uses == (file.name in ("overhead.py", "overhead_page.py")), file
