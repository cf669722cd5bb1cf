"""Local learning on low-rank manifolds with JAX and Flax."""

import importlib
from typing import Any

__version__ = "1.0.0"

# Read when they are asked for: `import ssa_jax.transforms` needs neither Flax nor data libraries.
_FROM = {
    "cut": "ssa_jax.networks.cut",
    "CutError": "ssa_jax.networks.cut",
    "factorize": "ssa_jax.networks.factorize",
    "Functional": "ssa_jax.networks.models",
    "fit": "ssa_jax.runs.fit",
    "load": "ssa_jax.runs.fit",
    "Run": "ssa_jax.runs.fitted",
    "Task": "ssa_jax.training.tasks",
}

__all__ = ["__version__", *sorted(_FROM)]


def __getattr__(name: str) -> Any:
    if name in _FROM:
        return getattr(importlib.import_module(_FROM[name]), name)
    raise AttributeError(f"module 'ssa_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
