"""The section of RECORDS.md in which our methods stand beside PyTorch's."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks.page import Row, find, format_ms, markdown, setting
from benchmarks.trainees import BIOTORCH, LOW_RANK, MODES, OURS, RANK, SIDE, TORCH

# Ours, and what it is to be compared with.
PAIRS = (
    ("bp", TORCH, "bp"),
    *((mode, BIOTORCH, mode) for mode in MODES),
    ("svd_bp", TORCH, LOW_RANK),
    ("ssa direct", TORCH, LOW_RANK),
    ("ssa", TORCH, LOW_RANK),
    ("ssa", TORCH, "bp"),
)
# Times and sizes within this share of one another are even.
EVEN = 0.05


def _accuracy(row: Row) -> float:
    return statistics.mean(row["accuracies"])


def _percent(row: Row) -> str:
    if len(row["accuracies"]) == 1:
        return f"{100 * _accuracy(row):.2f} %"
    deviation = statistics.stdev(row["accuracies"])
    return f"{100 * _accuracy(row):.2f} ± {100 * deviation:.2f} %"


def process(row: Row) -> float | None:
    """Bytes of a process beyond its libraries and data."""
    return None if row["peak_bytes"] is None else row["peak_bytes"] - row["base_bytes"]


def _mib(size: float | None) -> str:
    return "-" if size is None else f"{size / 2**20:.0f}"


# Name, what is least in the best row, and how it is written.
Column = tuple[str, Callable[[Row], float | None], Callable[[Row], str]]
COLUMNS: tuple[Column, ...] = (
    ("test accuracy", lambda r: -_accuracy(r), _percent),
    ("CPU ms", lambda r: r["cpu_ms"], lambda r: format_ms({"median_ms": r["cpu_ms"]})),
    ("parameters", lambda r: r["params"], lambda r: f"{r['params'] / 1e3:.0f} k"),
    ("process MiB", process, lambda r: _mib(process(r))),
    ("steps MiB", lambda r: r["steps_bytes"], lambda r: _mib(r["steps_bytes"])),
)


def _contestants(rows: Sequence[Row]) -> str:
    """A line a contestant of one network; the best of each column in bold."""
    best = []
    for _, key, _ in COLUMNS:
        found = [value for r in rows if (value := key(r)) is not None]
        best.append(min(found, default=None))
    table = [
        [
            f"{r['library']}, {r['method']}",
            *(
                f"**{text(r)}**" if least is not None and key(r) == least else text(r)
                for (_, key, text), least in zip(COLUMNS, best, strict=True)
            ),
        ]
        for r in rows
    ]
    title = f"{rows[0]['model']}, {rows[0]['steps']} steps"
    return markdown([title, *(name for name, _, _ in COLUMNS)], table)


class Points(NamedTuple):
    """A difference in accuracy: its mean over the seeds, its standard error, and who wins."""

    mean: float
    error: float
    winner: str


def points(ours: Row, peer: Row) -> Points:
    """Ours less the peer's in per cent, seed by seed; the error is zero of one seed."""
    gains = [100 * (a - b) for a, b in zip(ours["accuracies"], peer["accuracies"], strict=True)]
    mean = statistics.mean(gains)
    if len(gains) == 1:
        return Points(mean, 0.0, "one seed")
    error = statistics.stdev(gains) / len(gains) ** 0.5
    alike = all(g > 0 for g in gains) or all(g < 0 for g in gains)
    if not alike or abs(mean) <= 2 * error:
        return Points(mean, error, "even")
    return Points(mean, error, OURS if mean > 0 else peer["library"])


def _ratio(ours: float | None, theirs: float | None, peer: str) -> str:
    """Ours over theirs, of which less is better, and who wins."""
    if ours is None or not theirs:
        return "-"
    ratio = ours / theirs
    winner = "even" if abs(ratio - 1) <= EVEN else OURS if ratio < 1 else peer
    return f"{ratio:.2f} ({winner})"


def _pairs(rows: Sequence[Row]) -> str:
    """A line for each of ours and its peer."""
    table = []
    for model in dict.fromkeys(r["model"] for r in rows):
        for method, library, theirs in PAIRS:
            ours = find(rows, model=model, library=OURS, method=method)
            peer = find(rows, model=model, library=library, method=theirs)
            if ours is None or peer is None:
                continue
            table.append(
                [
                    f"{model}, {method} and {library} {theirs}",
                    "{:+.2f} ± {:.2f} ({})".format(*points(ours, peer)),
                    _ratio(ours["cpu_ms"], peer["cpu_ms"], library),
                    _ratio(process(ours), process(peer), library),
                ]
            )
    header = ["network, ours and its peer", "points of accuracy", "CPU time", "process"]
    return markdown(header, table)


def _wins(rows: Sequence[Row]) -> str:
    """In words: whose is the best of each column."""
    told = []
    for model in dict.fromkeys(r["model"] for r in rows):
        of_model = [r for r in rows if r["model"] == model]
        parts = []
        for name, key, text in COLUMNS:
            known = [r for r in of_model if key(r) is not None]
            if not known or name == "parameters":
                continue
            first = min(known, key=lambda r: key(r) or 0.0)
            parts.append(f"{name} {first['library']}'s {first['method']} ({text(first)})")
        told.append(f"On `{model}` the best is, by {'; by '.join(parts)}.")
    return " ".join(told)


def peers(record: dict[str, Any]) -> str:
    """The section of `benchmarks.peers`."""
    rows = record["rows"]
    first = rows[0]
    seeds = len(first["accuracies"])
    models = dict.fromkeys(r["model"] for r in rows)
    return "\n\n".join(
        [
            "## Training beside PyTorch and biotorch",
            f"CIFAR-10 of {SIDE}x{SIDE} pixels, batch {first['batch']}, "
            f"{seeds} seed{'s' * (seeds != 1)}, one core, one thread. All get the same augmented "
            "batches and the same learning rates of Adam (warm-up, cosine; ours also clip the RMS "
            "of a gradient at 1, PyTorch's do not); those on dense layers start at the same "
            "weights, and so do those on thin ones. pytorch bp: written by hand, fused Adam, "
            f"channels last, not compiled. Low rank: layers W = A B at {RANK} of full rank, "
            "trained by backpropagation; svd_bp and ssa have as many parameters and the singular "
            "values. ssa direct: no unit ahead; ssa: the default, one unit ahead. "
            "biotorch: its layers, by `BioModule`, in the network of pytorch bp. Test accuracy: "
            "mean and deviation over seeds. CPU ms: of the processor, median of a step with its "
            "share of a refresh, compilation excluded; all took turns of ten steps (the record has "
            "the wall clock's too, which other work distorts). Process: largest resident size of a "
            "process that builds and takes three steps, less what its libraries, data and first "
            "batch take; programs of ours are traced and read from a cache. Steps: by how much it "
            "rises while they run; PyTorch's gradients stay between steps and are not in it. Bold: "
            "the best of a column.",
            setting(record, "python -m benchmarks.peers --json benchmarks/records/peers.json"),
            *(_contestants([r for r in rows if r["model"] == model]) for model in models),
            _wins(rows),
            "Ours beside the peer that does the same, or is nearest to it: difference in accuracy "
            "with its standard error, ratios of time and memory, and who wins. Accuracies are even "
            "unless all seeds agree and the difference is more than two errors; times and sizes "
            f"are within {EVEN:.0%}.",
            _pairs(rows),
        ]
    )
