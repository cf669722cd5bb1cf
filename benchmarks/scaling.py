"""How does the time of a training step grow with batch and width?

    python -m benchmarks.scaling [--quick] [--json FILE] [--models mlp] [--no_peak]

smallconv and mlp at batch 32, 128 and 512, at their usual widths and twice those; ssa at rank
0.25, taped. The fields are those of `training.measure`, and ``width``.
"""

import itertools

from benchmarks import training
from benchmarks.contestants import REFERENCE, Entry
from benchmarks.networks import Case

NAMES = ("smallconv", "mlp")
BATCHES = (32, 128, 512)
WIDTHS = (1, 2)
ENTRIES = (Entry(REFERENCE), Entry("bp"), Entry("dfa"), Entry("ssa", 0.25))


def main() -> None:
    """Measures every combination and prints the table."""
    parser = training.parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=NAMES, help="only these")
    args = parser.parse_args()
    record = training.Record(args)
    batches = (4,) if args.quick else BATCHES
    names = args.models or (NAMES[1:] if args.quick else NAMES)
    for name, width, batch in itertools.product(names, WIDTHS, batches):
        rows = training.measure(
            Case(name, batch, width=width), ENTRIES, record.content["matmul_gflops"],
            quick=args.quick, peaks=not args.no_peak,
        )  # fmt: skip
        record.add([{**row, "width": width} for row in rows])
    record.print()


if __name__ == "__main__":
    main()
