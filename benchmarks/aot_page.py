"""The pages of `benchmarks.aot`."""

from typing import Any

from benchmarks.page import Row, markdown, setting

_HEADER = (
    "model, method", "target", "batch", "program", "kernels", "/ bp", "products", "loops",
    "conditionals", "collectives", "MiB a device", "compile s", "at best ms",
)  # fmt: skip


def _cells(r: Row) -> list[str]:
    """A line of the table; of a program that was refused what is known of it."""
    rank = "" if r["rank"] is None else f" at {r['rank']}"
    ahead = f", {r['lookahead']} ahead" if r["lookahead"] else ""
    # Older records tell neither the size of units nor whose the statistics are.
    ahead += f", units of {size}" if (size := r.get("unit_size", 1)) > 1 else ""
    falling = ", ranks falling" if r.get("schedule", "none") != "none" else ""
    memory = {"taped": "", "streamed": ", streamed"}[r["memory"]]
    memory += {"global": "", "device": ", statistics by device"}[r.get("statistics", "global")]
    held = "-" if r["bytes"] is None else f"{r['bytes'] / 2**20:.0f}"
    seconds = f"{r['trace_s'] + r['compile_s']:.1f}"
    first = [f"{r['model']}, {r['method']}{rank}{ahead}{falling}{memory}", r["target"],
             str(r["batch"]), r["program"]]  # fmt: skip
    if r.get("refused"):
        return [*first, *["-"] * 6, f"asks for {held}: does not fit", seconds, "-"]
    return [
        *first,
        str(r["kernels"]),
        f"{r['kernels_to_bp']:.2f}",
        str(r["products"]),
        str(r["loops"]),
        str(r["conditionals"]),
        f"{r['collectives']} of {r['collective_bytes'] / 2**20:.1f} MiB",
        held,
        seconds,
        f"{r['best_ms']:.3f}",
    ]


def aot(record: dict[str, Any], name: str = "aot", of: str = "Programs for accelerators") -> str:
    """The section of `benchmarks.aot`, of one of its records by name."""
    rows = record["rows"]

    def given(field: str) -> str:
        return " ".join(dict.fromkeys(str(r[field]) for r in rows))

    large = f"--imagenet --batch {given('batch')} " if name == "aot_imagenet" else ""
    command = (
        f"python -m benchmarks.aot {large}--target {given('target')} --models {given('model')} "
        f"--json benchmarks/records/{name}.json"
    )
    refused = (
        " A program that the compiler refuses for want of memory does not fit; it asks for that "
        "much besides its arguments and results."
    )
    return "\n\n".join(
        [
            f"## {of}, compiled without one",
            "Compiled on a CPU from a description of the device, products not tuned. Kernels: "
            "fusions, library calls and copies. Products: matrix products and convolutions of "
            "different shapes, each of which a GPU that tunes them compiles several times. At "
            "best: what the device's rates allow for its share of the products, or for reading "
            "and writing what it holds once, whichever is longer."
            + (refused if any(r.get("refused") for r in rows) else "")
            + " No step has run on a device.",
            setting(record, command),
            markdown(_HEADER, [_cells(r) for r in rows]),
        ]
    )
