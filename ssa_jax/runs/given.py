"""Objects in place of the names of a config."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Given(NamedTuple):
    """Objects in place of the names of a config.

    Attributes:
      model: an NNX or a Linen module, or a `networks.models.Functional`.
      method: (network, options) -> Method.
      optimizer: a whole optax optimiser.
      rank_schedule: (share of training, energy, final) -> `ranks.Target`.
      loss: a `Task`, or a function (outputs, targets) -> (batch,) or scalar.
      callbacks: called with the row of each epoch.
    """

    model: Any = None
    method: Any = None
    optimizer: Any = None
    rank_schedule: Any = None
    loss: Any = None
    callbacks: Sequence[Callable[[dict[str, Any]], None]] = ()


NOTHING = Given()
# Stands for a module in the names of objects that were given.
PREFIX = "given"


def _named(value: Any) -> str:
    name = getattr(value, "__qualname__", None) or type(value).__name__
    return f"{PREFIX}:{re.sub(r'[^0-9a-zA-Z]+', '_', name).strip('_') or 'object'}"


def name_given(callbacks: Sequence[Any], **asked: Any) -> tuple[dict[str, str], Given]:
    """Names for the config, and the objects that were not given by name."""
    names = {n: v if isinstance(v, str) else _named(v) for n, v in asked.items()}
    objects = {n: v for n, v in asked.items() if not isinstance(v, str)}
    # Those by name are found by the run.
    names["callbacks"] = ",".join(c for c in callbacks if isinstance(c, str))
    called = tuple(c for c in callbacks if not isinstance(c, str))
    return names, Given(**objects, callbacks=called)
