"""The failures that the paper names, found in the rows of a run: what shows each, and its remedy.

- *alignment failing*: training accuracy no longer rises, well below what it could be, while local
  gradients stand at large angles to the true ones (feedback alignment's plateau below BP);
- *orthogonality lost*: U or V has left the Stiefel manifold, so W = U diag(s) Vᵀ is no SVD;
- *sudden drop at a rank step*: truncation raised the loss, or an epoch of truncation cost accuracy.

A config is here whatever has the fields of `runs.config.Config` that are read.
"""

import itertools
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]

# Mean angle, in degrees, of the hidden units whose gradients are not exact, above which a local
# gradient hardly helps: its cosine is below a half; and the most that rounding makes of an exact
# one.
WIDE_ANGLE, EXACT_ANGLE = 60.0, 1.0
# Accuracy gained in the last third of the epochs, over what was left to gain.
LEAST_GAIN = 0.05
# A third of fewer epochs shows no trend, and from here on accuracy may rest.
LEAST_EPOCHS, SATURATED = 6, 0.95
# |XᵀX - I| that is a loss of orthogonality where a run sets no bound of its own.
DRIFT = 1e-2
# Of one truncation, in nats; of an epoch with truncations, in test accuracy.
LOSS_JUMP, ACCURACY_DROP = 0.3, 0.1


class Finding(NamedTuple):
    """A failure.

    Attributes:
      name: of its signature.
      epoch: where it shows, or shows most.
      value: the number that shows it.
      shown: that number in words.
      flag: what to turn.
    """

    name: str
    epoch: int
    value: float
    shown: str
    flag: str

    def __str__(self) -> str:
        return f"{self.name} (epoch {self.epoch}): {self.shown}; try {self.flag}"


def diagnose(rows: Sequence[Row], config: Any) -> list[Finding]:
    """The failures in the rows of metrics.jsonl, one of a kind at most; empty for a healthy run."""
    findings = (_plateau(rows, config), _drift(rows, config), _rank_step(rows, config))
    return [f for f in findings if f is not None]


def tell(findings: Iterable[Finding], before: Iterable[Finding] = ()) -> list[Finding]:
    """Prints a line a finding that was not told before; returns all."""
    findings, before = list(findings), list(before)
    for finding in findings:
        if finding not in before:
            print(f"diagnosis: {finding}", flush=True)
    return findings


def _plateau(rows: Sequence[Row], config: Any) -> Finding | None:
    third = len(rows) // 3
    if len(rows) < LEAST_EPOCHS or "train_accuracy" not in rows[-1]:
        return None
    before, after = (rows[i]["train_accuracy"] for i in (-third - 1, -1))
    hidden = (a for row in rows[-third:] for a in row["angles"][:-1] if a is not None)
    inexact = [a for a in hidden if a > EXACT_ANGLE]
    angle = statistics.fmean(inexact) if inexact else 0.0
    stagnates = after < SATURATED and after - before < LEAST_GAIN * (1 - before)
    if angle <= WIDE_ANGLE or not stagnates:
        return None
    return Finding(
        "alignment failing",
        rows[-1]["epoch"],
        angle,
        f"local gradients that are not exact are {angle:.0f}° off the true ones, and "
        f"training accuracy went from {100 * before:.1f} % to {100 * after:.1f} % in the last "
        f"{third} epochs",
        _alignment_flag(config),
    )


def _alignment_flag(config: Any) -> str:
    if config.method != "ssa":
        return "--method=ssa"
    if config.feedback == "random":
        return "--feedback=composed"
    if config.feedback_update != "tracked":
        return "--feedback_update=tracked"
    if config.feedback == "sequential":
        return "--feedback_every=1"
    if (size := config.unit_size or 1) > 1:
        return f"--unit_size={2 * size}"
    return f"--feedback_lookahead={(config.feedback_lookahead or 0) + 1}"


def _drift(rows: Sequence[Row], config: Any) -> Finding | None:
    bound = config.drift_bound or DRIFT
    # Not "at most": a drift that is no number is lost too.
    lost = next((row for row in rows if not row["drift"] <= bound), None)
    if lost is None:
        return None
    if config.retraction == "none":
        flag = "--retraction=series"
    elif config.retract_every > 1:
        flag = "--retract_every=1"
    else:
        flag = f"--retraction=qr or a lower --learning_rate than {config.learning_rate:g}"
    shown = f"the largest |XᵀX - I| over U and V is {lost['drift']:.1e}, above {bound:g}"
    return Finding("orthogonality lost", lost["epoch"], lost["drift"], shown, flag)


def _rank_step(rows: Sequence[Row], config: Any) -> Finding | None:
    """The largest jump of the loss, or the largest drop of accuracy where no jump is large."""
    name, flag = "sudden drop at a rank step", _rank_flag(config)
    cuts = [row for row in rows if "truncations" in row]
    worst = max(cuts, key=_jump, default=None)
    if worst and _jump(worst) > LOSS_JUMP:
        shown = (
            f"a truncation raised the loss of its batch from {worst['loss_before_truncation']:.2f} "
            f"to {worst['loss_after_truncation']:.2f}"
        )
        return Finding(name, worst["epoch"], _jump(worst), shown, flag)
    pairs = [pair for pair in itertools.pairwise(rows) if "truncations" in pair[1]]
    drop, before, after = max(
        ((a["test_accuracy"] - b["test_accuracy"], a, b) for a, b in pairs if _ACCURACY in a),
        key=lambda drop: drop[0],
        default=(0.0, {}, {}),
    )
    if drop <= ACCURACY_DROP:
        return None
    shown = (
        f"test accuracy fell from {100 * before['test_accuracy']:.1f} % to "
        f"{100 * after['test_accuracy']:.1f} % in an epoch with {after['truncations']} truncations"
    )
    return Finding(name, after["epoch"], drop, shown, flag)


# Of losses without one only jumps of the loss are judged.
_ACCURACY = "test_accuracy"


def _jump(row: Row) -> float:
    return row["loss_after_truncation"] - row["loss_before_truncation"]


def _rank_flag(config: Any) -> str:
    if config.rank_schedule == "linear":
        return f"more --epochs than {config.epochs}, for a slower fall"
    if config.rank_budget:
        return f"a larger --rank_budget than {config.rank_budget:g}"
    if config.rank_schedule == "stable_rank":
        return f"a higher --rank_floor than {config.rank_floor:g}"
    return f"a higher --energy than {config.energy:g}, or more and smaller cuts by --rank_cuts"
