"""The sections of RECORDS.md on pipelines, and the picture of their time lines.

python -m benchmarks.pipeline_page docs/images/pipeline.png
"""

import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.page import Row, markdown, setting
from benchmarks.schedules import LINES, Times, idle, local, span

SCHEDULES = ("GPipe", "1F1B", "ZB-H1", "ZB-H2", "walk", "direct", "streamed")
MIB = 2**20
_COMMAND = "python -m benchmarks.pipeline"
_MEASURED = ("memory", "micro-batches", "one stage", "two stages", "speed-up", "modelled")


def _of(rows: Sequence[Row], part: str) -> list[Row]:
    return [row for row in rows if row["part"] == part]


def _case(row: Row) -> list[str]:
    return [f"{row['model']}, {row['stages']} stages", str(row["micro_batches"])]


def _sent(rows: Sequence[Row]) -> str:
    fields = ("up", "outputs", "bp", "walk")
    held = ("state", "whole_state", "taped", "streamed", "1F1B", "GPipe")
    table = [
        [
            *_case(row),
            *(f"{row[name] / MIB:.2f}" for name in fields),
            *(f"{row[name] / MIB:.1f}" for name in held),
        ]
        for row in rows
    ]
    header = ["model", "micro-batches", "up", "outputs", "bp", "walk", "state", "whole state",
              "taped", "streamed", "1F1B", "GPipe"]  # fmt: skip
    return markdown(header, table)


def pipeline(record: dict[str, Any]) -> str:
    """The section of `benchmarks.pipeline`."""
    rows = record["rows"]
    model = [
        [*_case(row), *(f"{row[name]:.2f}" for name in SCHEDULES)] for row in _of(rows, "model")
    ]
    measured = [
        [
            row["memory"], str(row["micro_batches"]), f"{row['ms_of_one']:.4g}", f"{row['ms']:.4g}",
            f"{row['speed_up']:.2f}", f"{row['modelled']:.2f}",
        ]
        for row in _of(rows, "measured")
    ]  # fmt: skip
    return "\n\n".join(
        [
            "## Pipelines of local learning and of backpropagation",
            "![Time lines of four stages and eight micro-batches](../images/pipeline.png)",
            "Speed-up of a step over one device of backpropagation by the same micro-batches, from "
            "counted multiply-accumulates of the factorised network at rank 0.25: nothing else "
            "counts, and sending takes no time. Stages are contiguous and about equal. GPipe and "
            "1F1B are simulated; of ZB-H1 and ZB-H2 it is the bound that their authors give. Walk: "
            "a sequential signal through a quarter of the directions, by 1F1B. Direct: as "
            "`ssa_jax.parallel.pipeline` does it; streamed: with each forward pass made again for "
            "the gradient. Equal units: 64 of which F, B and W take the same, and the walk's B a "
            "quarter of it. mlp: fifteen hidden layers of 256, of which the first has 3072 inputs.",
            setting(record, f"{_COMMAND} --json benchmarks/records/pipeline.json"),
            markdown(["model", "micro-batches", *SCHEDULES], model),
            "MiB of a step of 2048 examples. Sent from stage to stage in all: up, by direct "
            "signals, with every boundary as wide as the widest; outputs, given to all stages; by "
            "backpropagation, activations up and signals down; by the walk, signals by their "
            "numbers in a quarter of the directions. Held by a device of the costliest stage: the "
            "state, of a direct method with random paths, beside that of the whole network; what is"
            " kept of forward passes, taped and streamed, beside 1F1B and GPipe.",
            _sent(_of(rows, "sent")),
            "Milliseconds of a step of 1024 examples of the mlp, the least of rounds in turn, "
            "on one host device and on two, a thread each; the speed-up, and what the model says. "
            "Two devices need both processors for themselves, which other programs share, and the "
            "model knows nothing of moving what is kept: where the speed-up is far below it, it "
            "tells of these.",
            markdown(_MEASURED, measured),
        ]
    )  # fmt: skip


def pipeline_tpu(record: dict[str, Any]) -> str:
    """The section of `benchmarks.pipeline` for a slice."""
    table = [
        [
            *_case(row), row["target"], str(row["kernels"]), str(row["loops"]),
            str(row["conditionals"]),
            f"{row['collectives']} of {row['collective_bytes'] / MIB:.2f} MiB",
            f"{row['bytes'] / MIB:.0f}", f"{row['trace_s'] + row['compile_s']:.1f}",
            f"{row['best_ms']:.3f}",
        ]
        for row in record["rows"]
    ]  # fmt: skip
    header = ["model", "micro-batches", "target", "kernels", "loops", "conditionals",
              "collectives", "MiB a device", "compile s", "at best ms"]  # fmt: skip
    targets = " ".join(dict.fromkeys(r["target"] for r in record["rows"]))
    command = (
        f"python -m benchmarks.pipeline --target {targets} "
        "--json benchmarks/records/pipeline_tpu.json"
    )
    return "\n\n".join(
        [
            "## Stages on TPUs, compiled without one",
            f"Steps of direct ssa at rank 0.25 with random paths over rows of stages, "
            f"{record['rows'][0]['memory']}; "
            f"{record['rows'][0]['batch']} examples in all, the rows share them. Collectives are "
            "counted once, though the loop over ticks repeats its own, one permutation and one sum "
            "of outputs, in each; the rest is the sum of gradients over the rows. At best: every "
            "tick as if the costliest stage worked in it. No step has run on a device.",
            setting(record, command),
            markdown(header, table),
        ]
    )


_COLOURS = {"F": "#4477aa", "B": "#ee6677", "W": "#228833", "BW": "#ccbb44"}
_NAMES = {"F": "forward", "B": "gradient of inputs", "W": "gradient of parameters", "BW": "both"}


def draw(file: str, stages: int = 4, micro_batches: int = 8) -> None:
    """Draws the time lines of equal stages, a forward pass and each gradient taking the same."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(LINES), 1, figsize=(9, 8), sharex=True, layout="constrained")
    for axis, (name, schedule) in zip(axes, LINES.items(), strict=True):
        # A local step needs no gradient of inputs; a streamed one passes forward again.
        direct = Times(1, 0, 2 if "streamed" in name else 1)
        times = direct if schedule is local else Times(1, 1, 1)
        line = schedule([times] * stages, micro_batches)
        for task in line:
            width = task.end - task.start
            axis.barh(task.stage, width, left=task.start, color=_COLOURS[task.kind],
                      edgecolor="white", linewidth=0.5)  # fmt: skip
            axis.text(task.start + width / 2, task.stage, str(task.micro_batch), ha="center",
                      va="center", fontsize=6, color="white")  # fmt: skip
        axis.set(
            yticks=range(stages),
            ylabel="stage",
            title=f"{name}: {span(line):g} passes long, {idle(line, stages):.0%} idle",
        )
        axis.invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in _COLOURS.values()]
    figure.legend(handles, [_NAMES[k] for k in _COLOURS], loc="outside lower center", ncols=4)
    axes[-1].set_xlabel("time, forward passes of a micro-batch on a stage")
    figure.savefig(file, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    draw(sys.argv[1])
