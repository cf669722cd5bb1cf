"""What a measurement was made on."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from experiments.workdir import commit


def environment(*peers: str) -> dict[str, Any]:
    """Hardware, versions and commit, as a benchmark's JSON keeps them.

    Args:
      peers: packages that are measured beside ours; "not installed" is said, not hidden.
    """
    versions = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "optax", *peers):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {"hardware": hardware(), "versions": versions, "commit": commit()}


def hardware() -> str:
    """Processor, and how many of its CPUs this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = (x.partition(":")[2] for x in info.read_text().splitlines() if "model name" in x)
        name = next(models, name).strip()
    return f"{name}, {len(os.sched_getaffinity(0))} CPUs"
