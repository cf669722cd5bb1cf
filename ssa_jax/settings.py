"""Settings: fields of a dataclass with a help and limits."""

import dataclasses
from typing import Any

from ssa_jax.errors import ConfigError
from ssa_jax.plugins import is_reference

# The largest integer that a step counter, a seed or a size can be: those of JAX have 32 bits.
MOST = 2**31 - 1


def setting(default: Any, help: str, **limits: Any) -> Any:
    """A field with its help and limits: choices, low, high, or above (an open bound).

    Choices that are a table are read when they are checked; beside its names they may be
    ``package.module:name`` where the field is ``open``.

    An integer without a high goes to `MOST`. A field that is a path says so by ``path=True``. A
    default of None is within every limit: not given.
    """
    return dataclasses.field(default=default, metadata={"help": help, **limits})


def check(settings: Any) -> None:
    """Checks every field of a dataclass of settings against its limits.

    Raises:
      ConfigError: one line that names the flag, its value and what it may be.
    """
    for field in dataclasses.fields(settings):
        value, limits = getattr(settings, field.name), field.metadata
        if value is None and field.default is None:
            continue
        high = limits.get("high", MOST if isinstance(value, int) else None)
        wanted = None
        if "choices" in limits and value not in limits["choices"]:
            if not (limits.get("open") and is_reference(value)):
                wanted = "one of " + ", ".join(limits["choices"])
        elif "low" in limits and not value >= limits["low"]:
            wanted = f"at least {limits['low']}"
        elif "above" in limits and not value > limits["above"]:
            wanted = f"more than {limits['above']}"
        elif high is not None and not value <= high:
            wanted = f"at most {high}"
        elif isinstance(value, float) and value == float("inf"):
            wanted = "finite"
        if wanted:
            raise ConfigError(f"--{field.name} must be {wanted}, got {value}")


def check_seeds(seed: int, seeds: int) -> None:
    """Checks a number of runs at `seed`, `seed` + 1, ...

    Raises:
      ConfigError: none, or seeds beyond `MOST`.
    """
    if seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, got {seeds}")
    if seeds > MOST:
        raise ConfigError(f"--seeds must be at most {MOST}, got {seeds}")
    if seed + seeds - 1 > MOST:
        raise ConfigError(
            f"--seed must be at most {MOST - seeds + 1} with --seeds={seeds}, got {seed}"
        )
