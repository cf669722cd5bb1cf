"""The package stands alone, and its documentation is true."""

import ast
import doctest
import importlib
import inspect
import os
import pathlib
import pkgutil
import subprocess
import sys

import optax
import pytest

from ssa_jax import transforms

TESTS = pathlib.Path(__file__).parent
MODULES = [m.name for m in pkgutil.iter_modules(transforms.__path__, f"{transforms.__name__}.")]
ALLOWED = {
    "numpy",
    "jax",
    "optax",
    "chex",
    "ssa_jax.factors",
    "ssa_jax.transforms",
}
# Functions of arrays and of masks, not transformations.
OTHERS = ("keep_largest", "label_paths", "restore_dropped")
FACTORIES = [
    name
    for name in transforms.__all__
    if inspect.isfunction(getattr(transforms, name)) and name not in OTHERS
]


def imported(module):
    """Dotted names that a module's source imports."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = node.module
            yield from (
                f"{package}.{a.name}" if package == "ssa_jax" else package for a in node.names
            )


@pytest.mark.parametrize("name", [*MODULES, "ssa_jax.transforms"])
def test_imports_nothing_of_ours_but_factors(name):
    for found in imported(importlib.import_module(name)):
        known = any(found == a or found.startswith(a + ".") for a in ALLOWED)
        assert known or found.partition(".")[0] in sys.stdlib_module_names, found


@pytest.mark.parametrize("name", MODULES)
def test_doctests_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    assert result.attempted > 0


@pytest.mark.parametrize("name", FACTORIES)
def test_every_factory_documents_itself(name):
    factory = getattr(transforms, name)
    for part in ("Args:", "Raises:", "References:", ">>> "):
        assert part in factory.__doc__, part
    if name not in ("add_alignment", "clip_by_rms"):
        assert "(..., " in factory.__doc__ or "mask: False at a `Factors`" in factory.__doc__
    kwargs = {"learning_rate": 0.1, "weight": 0.1, "target": 0.9, "threshold": 1.0,
              "inner": optax.sgd(0.1), "budget": 10}  # fmt: skip
    signature = inspect.signature(factory)
    given = {k: v for k, v in kwargs.items() if k in signature.parameters}
    assert isinstance(factory(**given), optax.GradientTransformationExtraArgs)


# The rest of the table adds minutes of compilation and no new kind of state.
QUICK = ["retract", "scale_by_riemannian_adam_column", "truncate_rank", "stiefel_muon", "ssa"]


@pytest.mark.slow
@pytest.mark.parametrize("names", [QUICK, pytest.param([], marks=pytest.mark.long)])
def test_one_step_on_eight_devices_equals_one_device(names):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    done = subprocess.run(
        [sys.executable, TESTS / "stiefel_on_devices.py", *names],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_inside_shard_map_every_device_moves_its_own():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    done = subprocess.run(
        [sys.executable, TESTS / "shard_map_on_devices.py"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
