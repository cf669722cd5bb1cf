"""The sections of RECORDS.md on training steps, and the goals that they are measured by."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from benchmarks.contestants import REFERENCE, TORCH, WALKING
from benchmarks.page import Row, find, format_ms, markdown, setting

# The rank that the goals are about.
RANK = 0.25


class Goal(NamedTuple):
    """A bound on a number that one network's rows give; None where they do not have it.

    Attributes:
      text: what is bounded.
      bound: the largest value that meets it.
      value: (rows, parts of a step) -> the number.
      models: the networks that it is about; empty for all.
    """

    text: str
    bound: float
    value: Callable[[Sequence[Row], Sequence[Row]], float | None]
    models: tuple[str, ...] = ()


def _ratio(field: str, ours: Row, theirs: Row) -> Callable[..., float | None]:
    """A field of one row over that of another, each found by what it has."""

    def value(rows: Sequence[Row], parts: Sequence[Row]) -> float | None:
        del parts
        a, b = find(rows, **ours), find(rows, **theirs)
        if a is None or b is None or a[field] is None or not b[field]:
            return None
        return a[field] / b[field]

    return value


def _manifold_and_refresh(rows: Sequence[Row], parts: Sequence[Row]) -> float | None:
    del rows
    shares = [p["share"] for p in parts if p["part"] in ("stiefel", "refresh")]
    return sum(shares) if shares else None


def _ssa(memory: str = "taped") -> Row:
    return {"method": "ssa", "rank": RANK, "memory": memory}


_BP: Row = {"method": REFERENCE}
GOALS = (
    Goal("time of bp over Flax BP", 1.03, _ratio("ms", {"method": "bp"}, _BP)),
    Goal("time of dfa over Flax BP", 0.70, _ratio("ms", {"method": "dfa"}, _BP), ("vgg13",)),
    Goal(f"time of ssa at {RANK} over Flax BP", 0.30, _ratio("ms", _ssa(), _BP)),
    Goal(f"time of ssa at {RANK} over PyTorch BP", 1.0, _ratio("ms", _ssa(), {"method": TORCH})),
    Goal(f"memory of ssa at {RANK}, taped, over Flax BP", 0.55, _ratio("temp_bytes", _ssa(), _BP)),
    Goal(
        f"memory of ssa at {RANK}, streamed, over Flax BP", 0.25,
        _ratio("temp_bytes", _ssa("streamed"), _BP),
    ),
    Goal(f"Stiefel and refresh in a step of ssa at {RANK}", 0.10, _manifold_and_refresh),
)  # fmt: skip
_GROWTH = 1.2


def goals(record: dict[str, Any]) -> str:
    """Every goal on every network that it is about, at the first batch size."""
    cells = []
    first = [r for r in record["rows"] if r["batch"] == record["rows"][0]["batch"]]
    for goal in GOALS:
        for model in dict.fromkeys(r["model"] for r in first):
            parts = [
                p for p in record["profile"]
                if (p["model"], p["batch"]) == (model, first[0]["batch"])
            ]  # fmt: skip
            value = goal.value([r for r in first if r["model"] == model], parts)
            if value is not None and (not goal.models or model in goal.models):
                cells.append(_judged(f"{goal.text}, {model}", goal.bound, value))
    return markdown(["goal, network", "at most", "measured", "met"], cells)


def _judged(text: str, bound: float, value: float) -> list[str]:
    return [text, f"{bound:.2f}", f"{value:.3f}", "yes" if value <= bound else "no"]


def _name(row: Row) -> str:
    rank = "" if row["rank"] is None else f" at {row['rank']}"
    return f"{row['model']}, {row['method']}{rank}{_streamed(row)}"


def _streamed(row: Row) -> str:
    return ", streamed" if row["memory"] == "streamed" else ""


def _mib(*sizes: int | None) -> str:
    """The first size less the others."""
    first, *rest = sizes
    if first is None or None in rest:
        return "-"
    return f"{(first - sum(r for r in rest if r is not None)) / 2**20:.1f}"


def _steps(rows: Iterable[Row], *sizes: str) -> str:
    """A line for every row, with further fields after its name."""
    table = [
        [
            _name(r),
            *(str(r[field]) for field in sizes),
            format_ms({"median_ms": r["ms"]}),
            f"{r['ratio_to_bp']:.2f}",
            _mib(r["temp_bytes"]),
            _mib(r.get("steps_bytes")),
            _mib(r["peak_bytes"], r["base_bytes"]),
            "-" if r["compile_s"] is None else f"{r['compile_s']:.1f}",
            "-" if r["macs"] is None else f"{r['macs'] / 1e9:.3g} G",
            "-" if r["share"] is None else f"{r['share']:.2f}",
        ]
        for r in rows
    ]
    header = ["model, method", *sizes, "ms", "/ Flax BP", "temporary MiB", "steps MiB",
              "process MiB", "compile s", "MACs", "of matmul rate"]  # fmt: skip
    return markdown(header, table)


def _columns(record: dict[str, Any]) -> str:
    """What the columns of `_steps` say."""
    return (
        f"Milliseconds of a training step, median of {record['rounds']} rounds in which all of a "
        "network's took turns, feedback refreshes included by their share. Flax BP: written by "
        "hand in Flax NNX and optax on the same modules, with this project's convolutions, the "
        "basis of all ratios. Temporary: as the compiler plans it. Steps: by how much the resident "
        "size of a process rises while they run. Process: largest resident size "
        "of a process that builds, reads the compiled step and runs three of them, less what its "
        "libraries and batch take. Compilation: of the step, without a cache on disk."
    )


def _rates(record: dict[str, Any]) -> str:
    return (
        f"Measured on this machine: {record['matmul_gflops']:.0f} GFLOP/s of a float32 matrix "
        f"product, {record['copy_gb_s']:.1f} GB/s of a copy."
    )


def _command(name: str) -> str:
    return f"python -m benchmarks.{name} --json benchmarks/records/{name}.json"


def _profile(record: dict[str, Any]) -> str:
    """Parts as columns, networks as lines."""
    found: dict[tuple[str, int], dict[str, Row]] = {
        (p["model"], p["batch"]): {} for p in record["profile"]
    }
    for p in record["profile"]:
        found[p["model"], p["batch"]][p["part"]] = p
    names = list(dict.fromkeys(p["part"] for p in record["profile"] if p["part"] != "step"))
    table = [
        [
            f"{model}, batch {batch}",
            format_ms({"median_ms": parts["step"]["ms"]}),
            *(f"{100 * parts[name]['share']:.1f} %" for name in names),
        ]
        for (model, batch), parts in found.items()
    ]
    return markdown(["network", "step ms", *names], table)


def _arithmetic(rows: Sequence[Row]) -> str:
    """What of the goal for time the multiply-accumulates of ssa allow, network by network."""
    told = []
    for model in dict.fromkeys(r["model"] for r in rows):
        ours, theirs = (find(rows, model=model, **kind) for kind in (_ssa(), {"method": REFERENCE}))
        if ours and theirs and ours["macs"] and theirs["macs"]:
            told.append(f"{model} {ours['macs'] / theirs['macs']:.2f}")
    return (
        f"Multiply-accumulates of a step of ssa at rank {RANK}, taped, over those of Flax BP: "
        f"{', '.join(told)}. At an equal rate of arithmetic the ratio of the times is that number."
    )


def step(record: dict[str, Any]) -> str:
    """The section of `benchmarks.step`."""
    return "\n\n".join(
        [
            "## One training step",
            f"{_columns(record)} PyTorch BP: the same weights, fused Adam, channels last. XLA "
            "convolutions: Flax BP with XLA's own.",
            setting(record, _command("step")),
            _rates(record),
            _steps(record["rows"], "batch"),
            f"Parts of a step of ssa at rank {RANK}, taped, as programs of their own, by their "
            "share of the whole step; run apart they share less. adam and stiefel make up chain: "
            "plain clip and Adam, and what projections and retraction take beside them.",
            _profile(record),
            _arithmetic(record["rows"]),
            "A taped step keeps what the gradients of all units need, the inputs of their layers "
            "and of their activations, and so does backpropagation; a pair keeps the map between "
            "its two convolutions besides. Less takes a second forward pass: the streamed step, "
            "whose memory the largest unit sets where units are convolutions.",
            "Goals:",
            goals(record),
        ]
    )


def growth(rows: Sequence[Row]) -> str:
    """The memory of streamed steps at the largest depth over that at the least.

    As the compiler plans it and, where it was measured, by the resident size of a process. Where
    signals walk down through n units, about √n of them are held, else one.
    """
    low, high = (f({r["depth"] for r in rows}) for f in (min, max))
    of_segments = _GROWTH * math.sqrt(high / low)
    cells = []
    for field, kind in (("temp_bytes", "memory"), ("steps_bytes", "resident memory of steps")):
        for r in rows:
            if r["depth"] != low or not _streamed(r) or not r.get(field):
                continue
            same = {k: r[k] for k in ("model", "method", "rank", "memory", "batch")}
            deep = find(rows, **same, depth=high)
            if deep is not None and deep[field] is not None:
                text = f"{kind} at depth {high} over {low}, {_name(r)}"
                bound = of_segments if r["method"] in WALKING else _GROWTH
                cells.append(_judged(text, bound, deep[field] / r[field]))
    return markdown(["goal, network", "at most", "measured", "met"], cells)


def depth(record: dict[str, Any]) -> str:
    """The section of `benchmarks.depth`."""
    return "\n\n".join(
        [
            "## Training steps by depth",
            f"{_columns(record)} Depth: the number of equal hidden units.",
            setting(record, _command("depth")),
            _rates(record),
            _steps(record["rows"], "depth"),
            "Goals:",
            growth(record["rows"]),
        ]
    )


def scaling(record: dict[str, Any]) -> str:
    """The section of `benchmarks.scaling`."""
    return "\n\n".join(
        [
            "## Training steps by batch and width",
            f"{_columns(record)} Width: multiple of the usual widths.",
            setting(record, _command("scaling")),
            _rates(record),
            _steps(record["rows"], "batch", "width"),
        ]
    )
