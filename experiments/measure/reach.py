"""The angles to the true gradient that every form of a direct signal has on given weights."""

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.measure import gates
from experiments.show import markdown
from experiments.show.runs import Row
from ssa_jax.errors import ConfigError
from ssa_jax.methods.ssa import SSAFeedback
from ssa_jax.runs import build, inputs
from ssa_jax.runs.build import Built
from ssa_jax.runs.config import Config
from ssa_jax.runs.given import PREFIX, Given
from ssa_jax.runs.trained import Trained
from ssa_jax.training import metrics, train
from ssa_jax.types import Batch, TrainState

HEADER = ("form", "gradients, mean", "input to output", "signals, mean", "input to output")
# Degrees: a cosine of 0.9.
NEAR = 25.842
# Batches that are probed, and examples of the regressions.
PROBES, EXAMPLES = 4, 2048
# Most bytes of the sums of a gated map.
LARGEST = 2**29


class Form(NamedTuple):
    """A form of direct SSA: its label and the settings in which it differs from the first."""

    label: str
    changes: dict[str, Any]


LAYERS = Form("each layer a unit", {})
LINEAR = Form("each layer a unit, nearest linear map", {"feedback": "regression"})
GATED = Form("each layer a unit, nearest gated map", {})
DEFAULT = Form("default, units of {}", {"unit_size": None, "feedback_lookahead": None})
FORMS = (
    LAYERS,
    LINEAR,
    GATED,
    Form("each layer a unit, one ahead", {"feedback_lookahead": 1}),
    *(Form(f"units of {size}", {"unit_size": size}) for size in (2, 4, 8)),
    DEFAULT,
)


def measure(run: Trained, examples: int | None = None) -> Iterator[Row]:
    """The angles of each form on the weights of a run, as soon as they are known.

    Composed paths are measured on the inputs that a run measures them on. The nearest linear map
    is the regression of the true signals on the error over `examples` training examples: in the
    mean square over those no signal that is linear in the error is nearer to the true one, see
    `methods.regression`; nor is one with gates from a unit's own output nearer than the gated map,
    see `gates.nearest`, which is left out where it would take more than `LARGEST` bytes. Angles are
    those of `metrics.Probe`, means over `PROBES` batches of the next training examples, without
    augmentation; forms whose hidden layers are all in one unit, which is backpropagation, are left
    out, and so is the default where it is another form.

    Args:
      run: of a named data set.
      examples: for the regression; None: `EXAMPLES`, or as many as there are.

    Yields:
      ``form``; ``angles`` and ``signal_angles`` in degrees of each hidden unit, next to the input
      first; ``units``, the hidden layers or blocks in each.

    Raises:
      ConfigError: fewer training examples than are needed.
    """
    examples, batches = _examples(run, examples), _batches(run)
    layers = None
    measured: list[Config] = []
    for form in FORMS:
        built = _built(run, form)
        hidden = len(built.units) - 1
        layers = hidden if layers is None else layers
        size, method, state = run.config.batch_size, built.method, built.state
        if form is GATED:
            if gates.size(built, batches(0, size)) > LARGEST:
                continue
            starts = range(0, examples, size)
            seen = (batches(i, min(size, examples - i)) for i in starts)
            method = gates.nearest(built, seen)
        elif (form is not LAYERS and hidden == 1) or built.config in measured:
            continue
        measured.append(built.config)
        if form is LINEAR:
            state = train.make_refresh(method)(_seeing(state, batches(0, examples)))
        probe = metrics.make_probe(built.units, method, built.weights)
        rows = [
            metrics.probe_row(probe(state, batches(examples + i * size, size)))
            for i in range(PROBES)
        ]
        angles = {name: _means([row[name] for row in rows]) for name in ("angles", "signal_angles")}
        of_each = built.config.unit_size or 1
        last = layers - (hidden - 1) * of_each
        label = form.label.format(of_each)
        yield {"form": label, **angles, "units": [of_each] * (hidden - 1) + [last]}


def _built(run: Trained, form: Form) -> Built:
    """The form on the weights of the run: direct SSA with tracked, full paths."""
    asked = dataclasses.asdict(
        Config(
            model=f"{PREFIX}:model",
            factorize=run.config.factorize if run.config.factorized else "off",
            unit_size=1,
            feedback_lookahead=0,
        )
    )
    kept = ("dataset", "loss", "batch_size", "label_smoothing", "precision", "seed", "rank_init")
    asked |= {name: getattr(run.config, name) for name in kept}
    return build.build(Config(**asked | form.changes), run.data, given=Given(model=run.model))


def _examples(run: Trained, examples: int | None) -> int:
    there, probed = run.data.train_size, PROBES * run.config.batch_size
    if there <= probed:
        raise ConfigError(
            f"{PROBES} batches of {run.config.batch_size} examples are probed, and the run has "
            f"{there} in all; what can be looked at is a run of smaller batches"
        )
    if examples is None:
        return min(EXAMPLES, there - probed)
    if there < examples + probed:
        raise ConfigError(
            f"{examples + probed} training examples are needed, and the run has {there}: "
            f"lower --examples, now {examples}, to {there - probed} at most"
        )
    return examples


def _batches(run: Trained) -> Callable[[int, int], Batch]:
    loader = inputs.make_loader(run.config, run.data)
    return lambda first, n: loader.fixed_batch(np.arange(first, first + n))


def _seeing(state: TrainState, batch: Batch) -> TrainState:
    """The state whose regressed paths are next measured on the batch."""
    feedback = state.feedback
    assert isinstance(feedback, SSAFeedback)
    seen = feedback._replace(examples=(batch.images, batch.labels))
    return state._replace(feedback=seen)


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    # The last unit has the error itself.
    return [round(statistics.fmean(unit), 2) for unit in list(zip(*rows, strict=True))[:-1]]


def table(rows: Sequence[Row]) -> str:
    """A line a form."""
    return markdown.table(HEADER, [_line(row) for row in rows])


def _line(row: Row) -> list[str]:
    line = [row["form"]]
    for name in ("angles", "signal_angles"):
        line += [f"{statistics.fmean(row[name]):.1f}°", " ".join(f"{a:.0f}" for a in row[name])]
    return line


def advice(rows: Sequence[Row]) -> str:
    """From where up a direct signal is near to the true one, in a sentence."""
    angles = next(row["angles"] for row in rows if row["form"] == LAYERS.label)
    layers = len(angles)
    near = sum(1 for _ in itertools.takewhile(lambda a: a <= NEAR, reversed(angles)))
    if near == layers:
        where = "of all hidden layers"
    elif near == 1:
        where = f"of hidden layer {layers}, next to the output,"
    elif near:
        where = f"of hidden layers {layers - near + 1} to {layers}, those next to the output,"
    else:
        where = "of no hidden layer next to the output"
    return f"Each layer a unit, the gradients {where} are within 26° (cosine 0.9) of the true ones."
