"""What local learning on factors costs in truth, beside what its multiply-accumulates promise.

    python -m experiments.studies.overhead
    python -m experiments.studies.overhead --quick

For every network one training step of each contestant, measured side by side: backpropagation
written by hand in Flax, which is the reference, this project's, direct feedback alignment, and SSA
at three ranks, taped and streamed. The promise is the step's multiply-accumulates over the
reference's, and the parameters over the dense network's; the measurements are time, temporary
arrays as the compiler plans them and, but for `--quick`, the peak of a process of its own. Of SSA
also what else a step pays for: the projections and retraction of the factors, its share of a
refresh of the feedback, and the SVD that makes the factors, which runs once and not in the step.

Images are random, of CIFAR's shape: a step takes as long on them as on real ones. The folder holds
study.json, a file for each network that is measured (one that is there is kept), results.jsonl,
table.md, overhead.png and index.html. `benchmarks` does the measuring.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags as absl_flags

from benchmarks import contestants, networks, parts, roofline, training
from benchmarks.contestants import Entry
from benchmarks.networks import Case
from experiments import flags, folders
from experiments.measure.timing import contestant, side_by_side
from experiments.show import overhead_page
from experiments.show.runs import Row
from experiments.studies import study
from ssa_jax import factors
from ssa_jax.models import MODELS
from ssa_jax.networks.models import split
from ssa_jax.parallel import compiling
from ssa_jax.runs.workdir import WorkdirError, read_json, write_json
from ssa_jax.settings import MOST
from ssa_jax.training import costs

NAME = overhead_page.NAME
MODELS_COMPARED, QUICK_MODELS = ("mlp", "smallconv", "vgg13", "resnet32"), ("mlp",)
RANKS, QUICK_RANKS = (0.5, 0.25, 0.125), (0.25,)
BATCH, QUICK_BATCH = 128, 32


def entries(ranks: Sequence[float]) -> list[Entry]:
    """What is compared; SSA's taped form at a rank before the streamed one."""
    ours = [Entry("ssa", rank, memory) for rank in ranks for memory in ("taped", "streamed")]
    return [contestants.REFERENCES[0], Entry("bp"), Entry("dfa"), *ours]


def measure(case: Case, ranks: Sequence[float], *, quick: bool) -> list[Row]:
    """The rows of a network: those of `training.measure`, with the parts of taped SSA steps."""
    compiling.use_cache(compiling.OFF)
    rate = roofline.rates(quick)["matmul_gflops"]
    rows = training.measure(case, entries(ranks), rate, quick=quick, peaks=not quick)
    dense = costs.parameters(_shapes(case, None))
    for row in rows:
        row["params_ratio"] = costs.parameters(_shapes(case, row["rank"])) / dense
        if row["method"] == "ssa" and row["memory"] == "taped":
            row |= _parts(case, row["rank"], row["ms"], training.ROUNDS[quick])
    return rows


def _shapes(case: Case, rank: float | None) -> Any:
    image = jax.ShapeDtypeStruct((1, *case.input_shape), "float32")
    return jax.eval_shape(lambda: split(networks.network(case, rank), image).params)


def _parts(case: Case, rank: float, ms: float, rounds: int) -> Row:
    """What of a taped SSA step goes to the manifold and to the feedback, and the SVD's time."""
    shares = {p["part"]: p["share"] for p in parts.profile(case, rounds, Entry("ssa", rank))}
    svd = svd_ms(_shapes(case, rank), rounds)
    return {
        "manifold_share": shares["stiefel"],
        "refresh_share": shares["refresh"],
        "svd_ms": svd,
        "svd_steps": svd / ms,
    }


def svd_ms(params: Any, rounds: int) -> float:
    """Milliseconds of the truncated SVDs that make all factors of a tree, from matrices at hand."""
    made = factors.leaves(params)
    keys = list(jax.random.split(jax.random.key(0), len(made)))
    matrices = [
        jax.random.normal(key, (f.u.shape[0], f.v.shape[0]))
        for key, f in zip(keys, made, strict=True)
    ]

    @jax.jit
    def every(matrices: list[jax.Array]) -> list[factors.Factors]:
        triples = zip(matrices, made, keys, strict=True)
        return [factors.from_dense(w, f.u.shape[1], key) for w, f, key in triples]

    (timing,) = side_by_side([contestant(every, matrices)], rounds, budget_s=60.0)
    return timing.median_ms


def open_folder(folder: Path, batch_size: int) -> None:
    """Makes the study's folder, or sees that it holds nothing but this study.

    Raises:
      WorkdirError: it cannot be written, or holds other things or another batch size.
    """
    record = study.open_folder(folder, NAME, {"batch_size": batch_size})
    if record["batch_size"] != batch_size:
        raise WorkdirError(
            f"{folder} holds this study at batch size {record['batch_size']}, not at batch size "
            f"{batch_size}; give another --folder"
        )


def main() -> None:
    """Measures what the flags ask for and is not there yet, and shows it."""
    values = absl_flags.FLAGS
    quick = values.quick
    models = flags.chosen("models", MODELS, QUICK_MODELS if quick else MODELS_COMPARED)
    batch_size = values.batch_size or (QUICK_BATCH if quick else BATCH)
    folder = Path(values.folder or folders.new(NAME))
    open_folder(folder, batch_size)
    for model in models:
        file = overhead_page.file_of(folder, model)
        if read_json(file):
            print(f"{model}: kept", flush=True)
            continue
        print(f"{model}:", flush=True)
        rows = measure(Case(model, batch_size), QUICK_RANKS if quick else RANKS, quick=quick)
        write_json(file, {"rows": rows})
    overhead_page.write(folder)


if __name__ == "__main__":
    absl_flags.DEFINE_list("models", [], f"Networks; default: {','.join(MODELS_COMPARED)}.")
    absl_flags.DEFINE_integer(
        "batch_size",
        None,
        f"Examples in a step; default: {BATCH}.",
        lower_bound=1,
        upper_bound=MOST,
    )
    flags.define_path("folder", "Where results go; default: a new one under runs/.")
    absl_flags.DEFINE_boolean("quick", False, "A short look: one network, one rank, few rounds.")
    flags.run_program(main)
