"""How do the memory and the time of a training step grow with depth?

    python -m benchmarks.depth [--quick] [--json FILE] [--models mlp] [--depths 8 16] [--no_peak]

Chains of equal hidden units: dense ones of 256 features ("mlp"), and 3x3 convolutions with norm
of 32 channels on 16x16 maps ("conv_chain"); batch 128, factors at rank 0.25. Where signals walk
down, in backpropagation on factors and through a quarter of each layer's directions, a streamed
step of n units holds about sqrt(n) of them. The fields are those of `training.measure`, and
``depth``, the number of hidden units.
"""

from benchmarks import training
from benchmarks.contestants import REFERENCE, WALK, Entry
from benchmarks.networks import Case

NAMES = ("mlp", "conv_chain")
DEPTHS = (8, 16, 32, 64)
BATCH = 128
ENTRIES = (
    Entry(REFERENCE), Entry("bp"), Entry("dfa"), Entry("dfa", None, "streamed"),
    Entry("ssa", 0.25), Entry("ssa", 0.25, "streamed"),
    Entry("svd_bp", 0.25, "streamed"), Entry(WALK, 0.25, "streamed"),
)  # fmt: skip


def main() -> None:
    """Measures the chains one after the other and prints the table."""
    parser = training.parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=NAMES, help="only these")
    parser.add_argument("--depths", nargs="+", type=int, help="numbers of hidden units")
    args = parser.parse_args()
    record = training.Record(args)
    for name in args.models or (NAMES[:1] if args.quick else NAMES):
        for depth in args.depths or ([2, 4] if args.quick else DEPTHS):
            rows = training.measure(
                Case(name, 8 if args.quick else BATCH, depth=depth), ENTRIES,
                record.content["matmul_gflops"], quick=args.quick, peaks=not args.no_peak,
            )  # fmt: skip
            record.add([{**row, "depth": depth} for row in rows])
    record.print()


if __name__ == "__main__":
    main()
