"""How much faster and smaller is a network of low rank when it is used?

    python -m benchmarks.inference [--quick] [--json FILE] [--models mlp vgg13] [--notes TEXT]

For every model the dense network and its compact ones, at an eighth, a quarter and half of full
rank, each in factored and in auto form (see `ssa_jax.export.to_inference`), at batch 1 and 128.
All forms of a model are timed side by side in one process; compilation is excluded and told
apart, so run without a compilation cache. The weights are untrained.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from experiments.measure.timing import latencies
from experiments.show import markdown
from ssa_jax import export
from ssa_jax.export import InferenceModel
from ssa_jax.models import MODELS
from ssa_jax.reporting.environment import environment
from ssa_jax.training import costs

Row = dict[str, Any]

INPUT_SHAPE = (32, 32, 3)
CLASSES = 10
NAMES = ("mlp", "smallconv", "vgg13", "resnet32")
RANKS = (0.5, 0.25, 0.125)
FORMS = ("factored", "auto")
BATCHES = (1, 128)
Key = tuple[str, float | None]
DENSE: Key = ("dense", None)


def contestants(name: str, ranks: tuple[float, ...]) -> dict[Key, InferenceModel]:
    """Inference models of one architecture by form and rank."""

    def initial(rank: float | None) -> nnx.Module:
        return MODELS[name](INPUT_SHAPE, CLASSES, rank=rank, rngs=nnx.Rngs(0))

    found: dict[Key, InferenceModel] = {DENSE: export.to_inference(initial(None), INPUT_SHAPE)}
    for rank in ranks:
        model = initial(rank)
        found |= {(form, rank): export.to_inference(model, INPUT_SHAPE, form) for form in FORMS}
    return found


def measure(name: str, quick: bool) -> list[Row]:
    """The rows of one model."""
    models = contestants(name, RANKS[:1] if quick else RANKS)
    image = jax.ShapeDtypeStruct((1, *INPUT_SHAPE), "float32")
    rows = []
    for batch in (1, 8) if quick else BATCHES:
        calls = {str(key): model for key, model in models.items()}
        times = latencies(calls, INPUT_SHAPE, batch, rounds=3 if quick else 15)
        for (form, rank), model in models.items():
            t = times[str((form, rank))]
            rows.append(
                {
                    "model": name,
                    "form": form,
                    "rank": rank,
                    "batch": batch,
                    "ms": round(t.ms, 4),
                    "min_ms": round(t.min_ms, 4),
                    "rounds": t.rounds,
                    "ratio_to_dense": round(t.ms / times[str(DENSE)].ms, 3),
                    "params": costs.parameters(nnx.state(model, nnx.Param)),
                    "macs": costs.macs(model, image),
                    "bytes": export.weight_bytes(model),
                    "compile_s": round(t.compile_s, 3),
                }
            )
    return rows


def main() -> None:
    """Measures the models one after the other and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one small model, to see that it runs")
    parser.add_argument("--json", help="write versions and rows to this file")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), help="only these")
    parser.add_argument("--notes", help="what else the record should say, such as other load")
    args = parser.parse_args()
    rows: list[Row] = []
    for name in args.models or (NAMES[:1] if args.quick else NAMES):
        rows += measure(name, args.quick)
        if args.json:
            notes = {"notes": args.notes} if args.notes else {}
            record = {**environment("safetensors"), **notes, "rows": rows}
            Path(args.json).write_text(json.dumps(record, indent=1) + "\n")
    print(markdown.of_records(rows))


if __name__ == "__main__":
    main()
