"""RECORDS.md and the pages in docs/records, from the stored results of the benchmarks.

python -m benchmarks.records
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_page
from benchmarks.aot_page import aot
from benchmarks.forms_page import pair, stacked
from benchmarks.page import Row, find, format_ms, markdown, setting
from benchmarks.peers_page import peers
from benchmarks.pipeline_page import pipeline, pipeline_tpu
from benchmarks.training_page import depth, scaling, step

STORED = Path(__file__).parent / "records"


def _polar(rows: Sequence[Row]) -> str:
    """The default retraction when a record was made."""
    return "series" if any(row["retraction"] == "series" for row in rows) else "newton_schulz"


def _optimizers(rows: Sequence[Row]) -> str:
    """Every optimiser with the default retraction beside its peers."""
    table = []
    for ours in rows:
        if (ours["library"], ours["retraction"]) != ("ssa_jax", _polar(rows)):
            continue
        same = {"case": ours["case"], "threads": ours["threads"]}
        # Their Adam has one second moment a matrix; an elementwise one is compared with it too.
        rule = "adam (matrix)" if ours["optimizer"].startswith("adam") else ours["optimizer"]
        qr = find(rows, library="geoopt", optimizer=rule, retraction="qr", **same)
        default = find(rows, library="geoopt", optimizer=rule, retraction="default", **same)
        jax_peer = find(rows, library="riemannax", optimizer=ours["optimizer"], **same)
        table.append(
            [
                f"{ours['case']}, {ours['optimizer']}",
                str(ours["threads"]),
                format_ms(ours),
                format_ms(qr),
                format_ms(default),
                format_ms(jax_peer),
                "-" if ours["of_geoopt_qr"] is None else f"{ours['of_geoopt_qr']:.2f}",
                f"{ours['error']:.1e}",
                "-" if qr is None else f"{qr['error']:.1e}",
            ]
        )
    header = ["case, rule", "threads", "ssa_jax", "geoopt QR", "geoopt default", "riemannax",
              "ssa_jax / geoopt QR", "error", "geoopt's error"]  # fmt: skip
    return markdown(header, table)


def _within(rows: Sequence[Row], share: float) -> str:
    """For how many rows a step takes at most a share of geoopt's, and for which it does not."""
    same_work = ("sgd", "momentum", "adam (matrix)")
    compared = [
        r for r in rows
        if (r["library"], r["retraction"]) == ("ssa_jax", _polar(rows))
        and r["optimizer"] in same_work and r["of_geoopt_qr"] is not None
    ]  # fmt: skip
    missed = [r for r in compared if r["of_geoopt_qr"] > share]
    names = ", ".join(
        f"{r['case']} {r['optimizer']} on {r['threads']} ({r['of_geoopt_qr']:.2f})" for r in missed
    )
    return (
        f"Of the rules that do the same work, {len(compared) - len(missed)} of {len(compared)} "
        f"rows take at most {share} of geoopt's time with QR. The others, with their threads: "
        f"{names or 'none'}."
    )


def _retractions(rows: Sequence[Row]) -> str:
    """Gradient descent with every retraction."""
    table = [
        [f"{r['case']}, {r['retraction']}", str(r["threads"]), format_ms(r),
         "-" if r["of_geoopt_qr"] is None else f"{r['of_geoopt_qr']:.2f}", f"{r['error']:.1e}"]
        for r in rows
        if (r["library"], r["optimizer"]) == ("ssa_jax", "sgd")
    ]  # fmt: skip
    return markdown(["case, retraction", "threads", "ms", "/ geoopt QR", "error"], table)


def stiefel(record: dict[str, Any]) -> str:
    """The section of `benchmarks.stiefel`."""
    rows = record["rows"]
    return "\n\n".join(
        [
            "## One Stiefel step",
            "Milliseconds of one optimiser step, median of up to 15 rounds in which all "
            "contestants took turns, compilation excluded. Error: max |XᵀX - I| after the step, in "
            'float64. "VGG-13": the U and V of its ten 3x3 convolutions at half of full rank; '
            '"stacked": those of a shape as one array. geoopt\'s Adam has one second moment a '
            'matrix, so only "adam (matrix)" does the same work. A dash: no such rule, or one that '
            "raised an error.",
            setting(record, "python -m benchmarks.stiefel --json benchmarks/records/stiefel.json"),
            _optimizers(rows),
            _within(rows, 0.5),
            "Gradient descent with every retraction:",
            _retractions(rows),
        ]
    )


def _inference_rows(rows: Sequence[Row]) -> str:
    """A line for each form of a model, its batch sizes side by side."""
    batches = sorted({r["batch"] for r in rows})
    dense = {r["model"]: r for r in rows if r["form"] == "dense"}
    table = []
    for one in rows:
        if one["batch"] != batches[0]:
            continue
        same = {k: one[k] for k in ("model", "form", "rank")}
        cells = [find(rows, **same, batch=batch) for batch in batches]
        whole = dense[one["model"]]
        rank = "" if one["rank"] is None else f" at {one['rank']}"
        table.append(
            [
                f"{one['model']}, {one['form']}{rank}",
                *(format_ms({"median_ms": r["ms"]}) if r else "-" for r in cells),
                *(f"{r['ratio_to_dense']:.2f}" if r else "-" for r in cells),
                f"{one['macs'] / 1e6:.2f} M ({one['macs'] / whole['macs']:.2f})",
                f"{one['bytes'] / 2**20:.2f} MiB ({one['bytes'] / whole['bytes']:.2f})",
                f"{one['compile_s']:.2f}",
            ]
        )
    header = ["model, form", *(f"ms at batch {b}" for b in batches),
              *(f"/ dense at {b}" for b in batches), "MACs (/ dense)", "size (/ dense)",
              "compile s"]  # fmt: skip
    return markdown(header, table)


def inference(record: dict[str, Any]) -> str:
    """The section of `benchmarks.inference`."""
    return "\n\n".join(
        [
            "## Inference, dense against compact",
            "Milliseconds of one batch of 32x32 colour images, median of "
            f"{min(r['rounds'] for r in record['rows'])} rounds in which all forms of a model took "
            "turns, compilation excluded. Rank: fraction of full rank in every factorised layer, "
            "the first convolution apart. Factored: two layers for each of those; auto: two where "
            "that takes fewer multiply-accumulates, else one. Batch norms are folded in all forms. "
            "The weights are untrained: these times do not depend on their values, what accuracy a "
            "rank keeps is another question. Compilation: of batch "
            f"{min(r['batch'] for r in record['rows'])}.",
            setting(
                record, "python -m benchmarks.inference --json benchmarks/records/inference.json"
            ),
            _inference_rows(record["rows"]),
        ]
    )


def _convolution_rows(rows: Sequence[Row]) -> str:
    """A line for each convolution and pass: XLA's own beside what is chosen."""
    table = []
    for one in rows:
        if one["lowering"] != "lax":
            continue
        same = {k: one[k] for k in ("shape", "pass")}
        chosen = find(rows, **same, lowering="chosen")
        assert chosen is not None
        temporary = ("-" if r["temp_bytes"] is None else f"{r['temp_bytes'] / 2**20:.1f}"
                     for r in (one, chosen))  # fmt: skip
        table.append(
            [
                f"{one['shape']}, {one['pass']}",
                *(format_ms({"median_ms": r["ms"]}) for r in (one, chosen)),
                f"{chosen['ratio_to_lax']:.2f}",
                *temporary,
            ]
        )
    header = ["convolution, pass", "XLA ms", "chosen ms", "/ XLA", "XLA MiB", "chosen MiB"]
    return markdown(header, table)


def convolution(record: dict[str, Any], kind: str = "") -> str:
    """The section of `benchmarks.convolution`, of depthwise ones too."""
    name = kind or "convolution"
    flag = f" --{kind}" if kind else ""
    return "\n\n".join(
        [
            f"## {f'{kind} convolutions'.strip().capitalize()}, XLA's own lowering against the "
            "chosen one",
            f"Milliseconds at batch {record['rows'][0]['batch']}, median of rounds in which all "
            "lowerings took turns, compilation excluded; MiB of temporary arrays. Both: the output "
            "and both gradients.",
            setting(
                record,
                f"python -m benchmarks.convolution{flag} --json benchmarks/records/{name}.json",
            ),
            _convolution_rows(record["rows"]),
        ]
    )


def comm(record: dict[str, Any]) -> str:
    """The section of `benchmarks.comm`."""
    table = [
        [
            f"{r['model']}, {r['method']}" + ("" if r["rank"] is None else f" at {r['rank']}"),
            str(r["devices"]),
            f"{r['all_reduce_bytes'] / 2**20:.3f}",
            f"{r['bytes_to_bp']:.3f}",
            str(r["all_reduces"]),
            str(r["all_reduced_arrays"]),
            f"{r['other_bytes'] / 2**20:.3f}",
            str(r["kernel_sums"]),
            format_ms({"median_ms": r["ms"]}),
            f"{r['ms_to_bp']:.2f}",
        ]
        for r in record["rows"]
    ]
    header = ["model, method", "devices", "summed MiB", "/ bp", "sums", "arrays", "other MiB",
              "kernels", "ms", "/ bp"]  # fmt: skip
    return "\n\n".join(
        [
            "## What devices send each other in a training step",
            f"Batch {record['rows'][0]['batch']} in all, its rows spread over the devices, the "
            "state whole on each. Summed: size of the arrays that are summed over the devices, of "
            "which a ring sends 2 (n - 1) / n times on each of n. Sums: all-reduce operations, as "
            "XLA combined the arrays. Other: results of all other collectives. Kernels: summed "
            "arrays of the shape of a dense kernel. Milliseconds: of host devices that share "
            "one processor, so they tell what cutting up costs, not what more hardware gains.",
            setting(record, "python -m benchmarks.comm --json benchmarks/records/comm.json"),
            markdown(header, table),
        ]
    )


def _loader_rows(rows: Sequence[Row]) -> str:
    """A line for each size and reader."""
    names = {"plain": "Pillow in a loop", "ours": "ours"}
    table = [
        [
            f"{r['size']} pixels, {names[r['reader']]}"
            + f", {r['workers'] or 'no'} worker{'s' * (r['workers'] != 1)}"
            * (r["reader"] == "ours"),
            f"{r['images_per_second']:.0f}",
            f"{r['ratio_to_plain']:.2f}",
            f"{r['first_batch_s']:.2f}",
        ]
        for r in rows
    ]
    return markdown(["size of the crop, reader", "images/s", "/ Pillow", "first batch s"], table)


def loader(record: dict[str, Any]) -> str:
    """The section of `benchmarks.loader`."""
    rows = record["rows"]
    return "\n\n".join(
        [
            "## Decoding and augmenting images",
            "Images a second of `imagenet_sample1k` (JPEG files of about 120x100 pixels), random "
            f"crops in batches of {rows[0]['batch']}, median of {rows[0]['rounds']} rounds in "
            "which all readers took turns. The rate is that of what comes after the first batch; "
            "workers are processes, and start before it.",
            setting(record, "python -m benchmarks.loader --json benchmarks/records/loader.json"),
            _loader_rows(rows),
        ]
    )


def compiling(record: dict[str, Any]) -> str:
    """The section of `benchmarks.compiling`, beside the record of the commit before."""
    before = json.loads((STORED / "compiling_before.json").read_text())
    fields = ("build_s", "step_s", "loops", "conditionals")
    rows = []
    for now in record["rows"]:
        case = {name: now[name] for name in ("model", "data", "method", "schedule")}
        then = find(before["rows"], **case)
        assert then is not None
        rows.append([*case.values(), *(f"{then[name]:g} -> {now[name]:g}" for name in fields)])
    header = ("model", "data", "method", "ranks", "state, s", "step, s", "loops", "conditionals")
    command = "python -m benchmarks.compiling --json benchmarks/records/compiling.json"
    return "\n\n".join(
        [
            "## Compiling a training step",
            "Seconds in a fresh process without a cache, median of three: to make the state, and "
            "to trace, lower and compile the step at batch 128, one unit ahead; loops and "
            f"conditionals of the compiled step. Each before (commit `{before['commit']}`) and "
            "after the truncation was measured outside of the step, retractions became one "
            "polynomial, Gram matrices one batched product, and the state one program.",
            setting(record, command),
            markdown(header, rows),
        ]
    )


SECTIONS = {
    "aot": aot,
    "aot_tpu": functools.partial(aot, name="aot_tpu", of="Programs for TPUs"),
    "aot_imagenet": functools.partial(
        aot, name="aot_imagenet", of="Programs of ImageNet's size for TPUs"
    ),
    "gpu": gpu_page.gpu,
    "compiling": compiling,
    "step": step,
    "depth": depth,
    "scaling": scaling,
    "peers": peers,
    "comm": comm,
    "pipeline": pipeline,
    "pipeline_tpu": pipeline_tpu,
    "stiefel": stiefel,
    "inference": inference,
    "convolution": convolution,
    "depthwise": functools.partial(convolution, kind="depthwise"),
    "pair": pair,
    "stacked": stacked,
    "loader": loader,
}


# What stands in the place of a section whose result is missed.
MISSING = {"gpu": gpu_page.MISSING}


ROOT = STORED.parent.parent
INDEX = "RECORDS.md"
FOLDER = "docs/records"
_ABOUT = """# Records

What steps, kernels and loaders take and need, measured beside what they compare with: a page a subject, with its command, hardware, versions and commit. `python -m benchmarks.records` makes this page and those from `benchmarks/records/`."""  # noqa: E501


def pages() -> dict[str, str]:
    """Path from the root -> text of the index and of a page for each result that is stored."""
    texts, lines = {}, []
    for name, section in SECTIONS.items():
        file = STORED / f"{name}.json"
        if file.exists():
            text = section(json.loads(file.read_text())).removeprefix("#")
        elif name in MISSING:
            text = MISSING[name].removeprefix("#")
        else:
            continue
        path = f"{FOLDER}/{name}.md"
        texts[path] = text + "\n"
        title = text.splitlines()[0].removeprefix("# ")
        lines.append(f"- [{title}]({path})")
    return {INDEX: "\n".join([_ABOUT, "", *lines]) + "\n", **texts}


def write(root: Path = ROOT) -> None:
    """Writes all pages, and takes away those of no section."""
    made = pages()
    for old in (root / FOLDER).glob("*.md"):
        if f"{FOLDER}/{old.name}" not in made:
            old.unlink()
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    for path, text in made.items():
        (root / path).write_text(text)


if __name__ == "__main__":
    write()
