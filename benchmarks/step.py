"""How long does a training step take, and how much memory, against backpropagation?

    python -m benchmarks.step [--quick] [--json FILE] [--models vgg13] [--batches 128] [--no_peak]

For every model and batch size, all in turn in one process: backpropagation hand-written in Flax
and optax, with this project's convolutions and with XLA's own; in PyTorch, where that is
installed; our bp and dfa; ssa taped and streamed, at three ranks. Adam with default settings;
random images of CIFAR's shape. Then the parts of the ssa step at rank 0.25. See
`training.measure` and `parts.profile` for the fields. The plain reference keeps the models' own
max pooling, which is faster than XLA's.
"""

from benchmarks import parts, training
from benchmarks.contestants import REFERENCES, Entry, peers
from benchmarks.networks import Case
from ssa_jax.models import MODELS

NAMES = ("mlp", "smallconv", "vgg13", "resnet32")
RANKS = (0.5, 0.25, 0.125)
BATCH = 128


def entries(model: str, ranks: tuple[float, ...]) -> list[Entry]:
    """Everything that is compared. Without convolutions both references are one program."""
    references = REFERENCES[:1] if model == "mlp" else REFERENCES
    ours = [Entry("ssa", rank, memory) for rank in ranks for memory in ("taped", "streamed")]
    return [*references, *peers(), Entry("bp"), Entry("dfa"), *ours]


def main() -> None:
    """Measures the models one after the other and prints the tables."""
    parser = training.parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), help="only these")
    parser.add_argument("--batches", nargs="+", type=int, help="batch sizes")
    args = parser.parse_args()
    record = training.Record(args)
    for name in args.models or (NAMES[:1] if args.quick else NAMES):
        for batch in args.batches or ([8] if args.quick else [BATCH]):
            case = Case(name, batch)
            rows = training.measure(
                case, entries(name, RANKS[1:2] if args.quick else RANKS),
                record.content["matmul_gflops"], quick=args.quick, peaks=not args.no_peak,
            )  # fmt: skip
            record.add(rows)
            profile = parts.profile(case, training.ROUNDS[args.quick])
            record.add([{**part, "batch": batch} for part in profile], "profile")
    record.print()
    record.print("profile")


if __name__ == "__main__":
    main()
