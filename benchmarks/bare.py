"""Runs the library where only jax, Flax, optax, chex and Orbax are installed.

A borrowed machine may have no more than these, and nothing may be installed there. What the
library imports beyond them is needed for streamed data, for image files and for a progress bar,
none of which training on arrays in memory calls.
"""

import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

_UNUSED = ("grain", "PIL")
_BAR = ("tqdm", "tqdm.auto")


class _Absent(ModuleType):
    """Has every name, so that it can be imported from; whoever calls one hears what is missing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise ImportError(f"{self.__name__} is not installed here")


class _Bar:
    """A progress bar that shows nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, *_: Any) -> None:
        """Does nothing."""

    def set_postfix(self, *_: Any, **__: Any) -> None:
        """Does nothing."""


def stand_in() -> list[str]:
    """Puts something in the place of what is missing; its names. To be called before other imports.

    NumPy's threads are bound as well, which has no effect once it is imported.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    missing = [name for name in (*_UNUSED, _BAR[0]) if importlib.util.find_spec(name) is None]
    for name in missing:
        if name in _BAR:
            for part in _BAR:
                bar = ModuleType(part)
                bar.tqdm = _Bar  # type: ignore[attr-defined]
                sys.modules[part] = bar
        else:
            sys.modules[name] = _Absent(name)
    return missing
