"""What a measurement was made on."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any


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
    # Not every system lets a process be bound to some of its processors.
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cpus} CPUs"


def commit() -> str | None:
    """Commit of the source tree, with ``+`` for uncommitted changes; None outside of one."""
    folder = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", *args], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
