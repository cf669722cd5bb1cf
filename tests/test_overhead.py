"""What the study of overhead shows of its rows, and what it refuses."""

import json

import jax.numpy as jnp
import pytest

from experiments.show import overhead_page
from experiments.studies import overhead
from ssa_jax.factors import Factors
from ssa_jax.runs.workdir import WorkdirError

BASE = {"model": "mlp", "method": "flax bp", "rank": None, "memory": "taped", "ms": 2.0,
        "ratio_to_bp": 1.0, "macs": 100, "temp_bytes": 2**20, "peak_bytes": None,
        "params_ratio": 1.0}  # fmt: skip
SSA = {**BASE, "method": "ssa", "rank": 0.25, "ms": 3.0, "ratio_to_bp": 1.5, "macs": 40,
       "temp_bytes": 2**19, "params_ratio": 0.3, "manifold_share": 0.125,
       "svd_ms": 30.0, "svd_steps": 10.0}  # fmt: skip


def test_promise_and_measurement_stand_beside_each_other(tmp_path):
    (tmp_path / "mlp.json").write_text(json.dumps({"rows": [BASE, SSA]}))
    overhead.open_folder(tmp_path / "new", 8)
    (tmp_path / "study.json").write_text((tmp_path / "new/study.json").read_text())
    rows = overhead_page.write(tmp_path)
    header, (_, line) = overhead_page.table(rows)
    shown = dict(zip(header, line, strict=True))
    assert shown["step"] == "ssa at 0.25, taped"
    assert (shown["MACs of bp"], shown["time of bp"], shown["temporary of bp"]) == (
        "0.40", "1.50", "0.50"
    )  # fmt: skip
    assert (shown["projection and retraction"], shown["SVD in steps"]) == ("12.5 %", "10.0")
    assert (shown["peak"], shown["refresh"]) == ("-", "-")
    (panel,) = overhead_page.panels(rows)
    assert panel.names == ["ssa at 0.25, taped"]
    assert [bar.values for bar in panel.bars] == [[[0.4]], [[1.5]], [[0.5]]]
    assert "ssa at 0.25, taped" in (tmp_path / "index.html").read_text()


def test_a_folder_of_other_things_or_another_batch_size_is_refused(tmp_path):
    overhead.open_folder(tmp_path / "study", 8)
    overhead.open_folder(tmp_path / "study", 8)
    with pytest.raises(WorkdirError, match="at batch size 16; give another --folder"):
        overhead.open_folder(tmp_path / "study", 16)
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(WorkdirError, match="holds other things"):
        overhead.open_folder(tmp_path, 8)
    with pytest.raises(WorkdirError, match="cannot write to /dev/null/x"):
        overhead.open_folder(overhead.Path("/dev/null/x"), 8)


def test_the_svd_is_timed_for_every_factor():
    params = ({"kernel": Factors(jnp.zeros((6, 2)), jnp.zeros(2), jnp.zeros((5, 2)))}, {})
    assert overhead.svd_ms(params, rounds=1) > 0
