"""Settings: fields of a dataclass with a help and limits."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from ssa_jax.errors import ConfigError
from ssa_jax.plugins import is_reference

# What a value of a field's type is, and in words.
_KINDS = {
    int: (int, "a whole number"),
    float: (int | float, "a number"),
    bool: (bool, "True or False"),
}

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
        wanted = _other_kind(field.type, value) or _beyond(value, limits)
        if wanted:
            raise ConfigError(f"--{field.name} must be {wanted}, got {value}")


def _beyond(value: Any, limits: Mapping[str, Any]) -> str | None:
    """What a value may be, in words, where it is not within its limits."""
    high = limits.get("high", MOST if isinstance(value, int) else None)
    if "choices" in limits and value not in limits["choices"]:
        named = limits.get("open") and is_reference(value)
        return None if named else "one of " + ", ".join(limits["choices"])
    if "low" in limits and not value >= limits["low"]:
        return f"at least {limits['low']}"
    if "above" in limits and not value > limits["above"]:
        return f"more than {limits['above']}"
    if high is not None and not value <= high:
        return f"at most {high}"
    return "finite" if isinstance(value, float) and value == float("inf") else None


def _other_kind(of: Any, value: Any) -> str | None:
    """What a value of a numeric field's type would be, in words, where it is none."""
    for kind in typing.get_args(of) or (of,):
        if kind in _KINDS:
            numeric, words = _KINDS[kind]
            fits = isinstance(value, numeric) and (kind is bool) == isinstance(value, bool)
            return None if fits else words
    return None


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
