"""The section of RECORDS.md on `benchmarks.gpu`.

`gpu.json` of such a run is stored as benchmarks/records/gpu.json; one of a CPU is refused.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.page import Row, find, format_ms, markdown, setting

HEAD = "## On a GPU"
COMMAND = "python -m benchmarks.gpu"
MISSING = f"{HEAD}\n\nNone is stored. `{COMMAND}` makes one; see [scale](../scale.md)."


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.0f}"


def _steps(rows: Sequence[Row]) -> str:
    """A line for each contestant of each network, precision and batch."""
    table = []
    for r in rows:
        same = {name: r[name] for name in ("model", "precision", "batch")}
        bp = find(rows, **same, contestant="bp")
        peers = [p["ms"] for name in ("torch", "torch, compiled")
                 if (p := find(rows, **same, contestant=name))]  # fmt: skip
        table.append(
            [
                f"{r['model']}, {r['precision']}, {r['batch']}: {r['contestant']}",
                format_ms({"median_ms": r["ms"]}),
                f"{r['ms'] / bp['ms']:.2f}" if bp else "-",
                f"{r['ms'] / min(peers):.2f}" if peers else "-",
                format_ms({"median_ms": r["refresh_ms"]}) if r["every"] else "-",
                f"{r.get('trace_s', 0.0) + r['compile_s']:.1f}",
                _mib(r.get("temp_bytes")),
                _mib(r["peak_bytes"]),
            ]
        )
    header = ["network, precision, batch: method", "ms", "/ bp", "/ PyTorch", "refresh ms",
              "compile s", "temporary MiB", "peak MiB"]  # fmt: skip
    return markdown(header, table)


def _trained(rows: Sequence[Row]) -> str:
    """A line for each training, at its last epoch."""
    last = {(r["model"], r["contestant"]): r for r in rows if r["what"] == "epoch"}
    table = [
        [
            f"{model}, {contestant}",
            f"{r['epoch']} of {r['epochs']}",
            f"{100 * r['test_accuracy']:.2f} %",
            f"{r['images_per_second']:.0f}",
            f"{r['compile_s']:.0f}",
            f"{r['wall_s']:.0f}",
        ]
        for (model, contestant), r in last.items()
    ]
    header = ["network, method", "epochs", "test accuracy", "images/s", "compile s", "seconds"]
    return markdown(header, table)


def _without(rows: Sequence[Row]) -> str:
    """What has no figure, and why."""
    lines = [
        f"- {r['item']}" + (f", {r['contestant']}" if "contestant" in r else "")
        + f": {r.get('why') or r['error']}"
        for r in rows if r["what"] in ("left out", "error")
    ]  # fmt: skip
    return "Without a figure:\n\n" + ("\n".join(lines) or "- nothing")


def gpu(record: dict[str, Any]) -> str:
    """The section of `benchmarks.gpu`.

    Raises:
      ValueError: the record was not made on a GPU.
    """
    if record["platform"] != "gpu":
        raise ValueError(f"a record of {record['platform']} is none of a GPU")
    rows = record["rows"]
    steps = [r for r in rows if r["what"] == "step"]
    trained = [r for r in rows if r["what"] == "epoch"]
    parts = [
        HEAD,
        "Milliseconds of a step and its share of a refresh of the feedback, median of rounds in "
        "which all contestants of a network took turns, each a process of its own, compilation "
        "excluded. Factors at rank 0.25. Float32 products are TF32's. Direct: no unit ahead, each "
        "layer or block a unit; default: the last two hidden layers or blocks one unit and all "
        "below another, or, of eight and fewer, one unit ahead; walk: sequential, through a "
        "quarter of each layer's directions. Compile: tracing and compiling, all contestants side "
        "by side; of PyTorch its first step. Peak: most of the device's memory in use.",
        setting(record, COMMAND),
        _steps(steps),
    ]
    if trained:
        parts += [
            f"Trained on {trained[0]['train_size']} images of CIFAR-10 at batch "
            f"{trained[0]['batch']}, seed 0, {trained[0]['beside']} runs side by side, so that "
            "seconds and images a second are those of a shared device.",
            _trained(rows),
        ]
    return "\n\n".join([*parts, _without(rows)])
