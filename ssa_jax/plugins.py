"""Things by name: those of a table, or of another package as ``package.module:name``."""

import importlib
from collections.abc import Mapping
from typing import Any

from ssa_jax.errors import ConfigError


def is_reference(name: str) -> bool:
    """Whether a name is of the form ``package.module:name``."""
    module, _, attribute = name.partition(":")
    return bool(module) and all(part.isidentifier() for part in (attribute, *module.split(".")))


def find(what: str, name: str, known: Mapping[str, Any]) -> Any:
    """What a name stands for.

    Args:
      what: the setting that has the name, for errors.
      name: a key of `known`, or ``package.module:name``.
      known: by name.

    Raises:
      ConfigError: neither, or the module or its name cannot be had.
    """
    if name in known:
        return known[name]
    if not is_reference(name):
        raise ConfigError(
            f"--{what} must be one of {', '.join(known)}, or package.module:name, got {name}"
        )
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise ConfigError(f"--{what}={name} cannot be had: {e}") from e
