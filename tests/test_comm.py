"""What devices send each other is counted from the compiled program, and is factors for SSA."""

import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from helpers import apart, unpadded

from benchmarks import comm, records
from benchmarks.contestants import Entry
from benchmarks.networks import Case, network
from ssa_jax.parallel.collectives import Collective

ROOT = Path(__file__).parent.parent
HALF = {"model": "mlp", "method": "ssa", "rank": 0.5, "batch": 8, "devices": 2}
ROW = {
    **HALF, "all_reduces": 3, "all_reduced_arrays": 9, "all_reduce_bytes": 2**20,
    "other_bytes": 0, "kernel_sums": 0, "ms": 1.0, "bytes_to_bp": 0.5, "ms_to_bp": 1.25,
}  # fmt: skip


def test_a_kernel_is_known_in_every_arrangement_of_its_axes():
    case = Case("smallconv", 8)
    shapes = comm.kernel_shapes(case, Entry("ssa", 0.25))
    # The classifier is dense in both.
    assert (512, 10) in comm.kernel_shapes(case, Entry("bp")) - shapes
    sent = [
        Collective("all-reduce", (("f32", (3, 3, 32, 64)), ("f32", (64,)), ("f32", (192, 96)))),
        Collective("all-gather", (("f32", (3, 3, 32, 64)),)),
        Collective("all-reduce", (("f32", (96, 48)),)),
    ]
    assert {(3, 3, 32, 64), (96, 192)} <= shapes
    assert comm.kernel_sums(sent, shapes) == 2


def test_the_section_has_a_line_for_every_row():
    record = {"versions": {}, "hardware": "x", "commit": "c", "rows": [ROW, ROW]}
    text = unpadded(records.comm(record))
    assert text.count("| mlp, ssa at 0.5 | 2 | 1.000 | 0.500 | 3 | 9 | 0.000 | 0 |") == 2


@pytest.mark.long
def test_factors_are_summed_and_no_kernels(tmp_path):
    """The sums of a step are those of the gradients of what is trained, and a few numbers."""
    file = tmp_path / "comm.json"
    command = [sys.executable, "-m", "benchmarks.comm", "--quick", "--json", str(file),
               "--models", "smallconv"]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    rows = json.loads(file.read_text())["rows"]
    assert [r["method"] for r in rows] == ["bp", "dfa", "ssa", "ssa", "ssa"]
    for row in rows:
        case = Case(row["model"], 8)
        _, params, _ = apart(network(case, row["rank"]), case.input_shape)
        trained = 4 * sum(x.size for x in jax.tree.leaves(params))
        # The images on which paths are measured are kept everywhere, all of so small a batch.
        images = 4 * case.batch * math.prod(case.input_shape) if row["method"] == "ssa" else 0
        sent = row["all_reduce_bytes"] + row["other_bytes"] - images
        # Without s, whose gradient is made of that of V diag(s); with the statistics of batches.
        assert 0.98 * trained < sent < 1.02 * trained, row
        assert (row["kernel_sums"] == 0) == (row["method"] == "ssa"), row
