"""The records say what was measured, and the benchmarks write what the records read."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import unpadded

from benchmarks import (
    contestants,
    page,
    pair,
    peak,
    records,
    reference,
    roofline,
    stacked,
    step,
    torch_step,
    training_page,
)
from benchmarks.contestants import Entry
from benchmarks.networks import Case, network, random_batch
from experiments.measure import timing
from ssa_jax import factors, layers
from ssa_jax.reporting import environment
from ssa_jax.training import costs, train

ROOT = Path(__file__).parent.parent


def test_records_are_made_from_the_stored_results():
    made = records.pages()
    stored = {"RECORDS.md", *(f"docs/records/{f.name}" for f in ROOT.glob("docs/records/*.md"))}
    assert stored == set(made)
    for path, text in made.items():
        assert (ROOT / path).read_text() == text
        assert text.startswith("# ")


@pytest.mark.parametrize("file", sorted(records.STORED.glob("*.json")), ids=lambda f: f.stem)
def test_stored_results_say_where_they_come_from(file):
    record = json.loads(file.read_text())
    assert file.stem.removesuffix("_before") in records.SECTIONS
    assert record["hardware"]
    assert record["versions"]["jax"]
    # A result of uncommitted code could not be repeated.
    assert record["commit"]
    assert not record["commit"].endswith("+")


def test_the_results_state_the_stored_ratios():
    record = json.loads((records.STORED / "step.json").read_text())
    assert {r["batch"] for r in record["rows"]} == {128}

    def ratio(field, memory, model):
        of_model = [r for r in record["rows"] if r["model"] == model]
        ours = page.find(of_model, method="ssa", rank=training_page.RANK, memory=memory)
        theirs = page.find(of_model, method=contestants.REFERENCE)
        return f"{ours[field] / theirs[field]:.2f}"

    models = ("vgg13", "resnet32", "smallconv", "mlp")
    ms = [ratio("ms", "taped", m) for m in models]
    temp = [ratio("temp_bytes", "streamed", m) for m in models]
    assert (
        f"takes {ms[0]} of the time of backpropagation in Flax on `vgg13`, {ms[1]} on `resnet32`, "
        f"{ms[2]} on `smallconv` and {ms[3]} on the `mlp`; streamed, it takes "
        f"{temp[0]}, {temp[1]}, {temp[2]} and {temp[3]} of its temporary memory"
    ) in (ROOT / "docs" / "results.md").read_text()


def test_the_forms_that_layers_run_are_the_faster_ones_of_the_record():
    rows = json.loads((records.STORED / "pair.json").read_text())["rows"]
    for shape, fraction in itertools.product(pair.SHAPES, pair.RANKS):
        found = {"shape": str(shape), "rank": fraction, "pass": "local"}
        kernel, two = (
            page.find(rows, form=form, **found)["ms"] for form in ("merged", "two convolutions")
        )
        a, b = 3 * shape.c_in, 3 * shape.c_out
        r = factors.rank_of(fraction, b, a)
        weights = factors.Factors(
            *(jax.ShapeDtypeStruct(s, "float32") for s in ((b, r), (r,), (a, r)))
        )
        images = (pair.BATCH, shape.side, shape.side, shape.c_in)
        assert layers.kernel_pays(weights, images, (3, 3), (1, 1)) == (kernel < two), found


def test_environment_names_what_is_missing():
    found = environment.environment("no-such-package")
    assert found["versions"]["no-such-package"] == "not installed"
    assert "CPUs" in found["hardware"]


def test_contestants_take_turns_and_their_preparation_is_off_the_clock():
    calls = []

    def contestant(name):
        def prepare():
            calls.append(f"prepare {name}")

        def call():
            calls.append(name)

        return prepare, call

    times = timing.side_by_side([contestant("a"), contestant("b")], rounds=4)
    assert [t.rounds for t in times] == [4, 4]
    measured = [c for c in calls if not c.startswith("prepare")]
    assert measured[:2] == ["a", "b"]
    assert measured[2:] == ["a", "a", "b", "b"] * 4
    assert all(t.min_ms <= t.median_ms for t in times)


@pytest.mark.long
def test_stiefel_quick_writes_rows_with_errors_at_rounding(tmp_path):
    file = tmp_path / "rows.json"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.stiefel", "--quick", "--threads", "1",
         "--json", str(file)],
        cwd=ROOT, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    record = json.loads(file.read_text())
    ours = [r for r in record["rows"] if r["library"] == "ssa_jax"]
    assert {r["optimizer"] for r in ours} >= {"sgd", "momentum", "adam (matrix)", "muon"}
    assert all(r["error"] < 1e-6 and r["median_ms"] > 0 for r in ours)
    assert "| 96x16, sgd | 1 |" in unpadded(records.stiefel(record))


@pytest.mark.long
def test_inference_quick_writes_rows_beside_the_dense_network(tmp_path):
    file = tmp_path / "rows.json"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.inference", "--quick", "--notes", "A test.",
         "--json", str(file)],
        cwd=ROOT, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    record = json.loads(file.read_text())
    dense, *compact = (r for r in record["rows"] if r["batch"] == 1)
    assert dense["form"] == "dense"
    assert dense["ratio_to_dense"] == 1
    assert {r["form"] for r in compact} == {"factored", "auto"}
    for r in compact:
        assert r["macs"] < dense["macs"]
        assert r["bytes"] < dense["bytes"]
        assert r["ms"] > 0
    page = unpadded(records.inference(record))
    assert "| mlp, auto at 0.5 |" in page
    assert "A test." in page


@pytest.mark.long
def test_convolution_quick_writes_every_lowering_of_every_pass(tmp_path):
    file = tmp_path / "rows.json"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.convolution", "--quick", "--json", str(file)],
        cwd=ROOT, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    record = json.loads(file.read_text())
    passes = {r["pass"] for r in record["rows"]}
    assert passes == {"forward", "kernel gradient", "both"}
    for row in record["rows"]:
        assert row["ms"] > 0
        assert (row["ratio_to_lax"] == 1) or row["lowering"] != "lax"
    page = unpadded(records.convolution(record))
    assert "| 3x3, 8 to 8 on 2x2, forward |" in page
    assert "| depthwise, 3x3, 8 to 8 on 8x8, stride 2x2, both |" in page


def test_all_forms_of_a_factorised_convolution_are_one_function():
    keys = jax.random.split(jax.random.key(0), 3)
    w = factors.from_dense(jax.random.normal(keys[0], (3 * 6, 3 * 4)), 5)
    x, g = jax.random.normal(keys[1], (2, 5, 5, 4)), jax.random.normal(keys[2], (2, 5, 5, 6))
    base, *others = (pair.local(form)(w, x, g) for form in pair.FORMS.values())
    for other in others:
        for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("name", ["pair", "stacked"])
def test_forms_quick_writes_every_form_of_every_part(name, tmp_path):
    file = tmp_path / "rows.json"
    subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json", str(file)],
        cwd=ROOT, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    record = json.loads(file.read_text())
    part = {"pair": "pass", "stacked": "part"}[name]
    forms = {"pair": list(pair.FORMS), "stacked": ["in turn", "stacked"]}[name]
    for of_part in {r[part] for r in record["rows"]}:
        rows = [r for r in record["rows"] if r[part] == of_part]
        assert [r["form"] for r in rows] == forms
        assert all(r["ms"] > 0 for r in rows)
    page = unpadded(getattr(records, name)(record))
    ratio = record["rows"][-1]["ms"] / record["rows"][-len(forms)]["ms"]
    assert f"{ratio:.2f}" in page.splitlines()[-1]


@pytest.mark.slow
def test_a_stacked_update_is_the_update_of_each_unit():
    built = contestants.build(Case("mlp", 2, depth=3), stacked.ENTRY)
    params = stacked.alike(built.state.params[1:-1])
    chain, together = stacked.whole(), stacked.stack(params)
    gradients = jax.tree.map(jnp.sin, params)
    apart, _ = chain.update(gradients, chain.init(params), params)
    whole, _ = chain.update(stacked.stack(gradients), chain.init(together), together)
    for a, b in zip(jax.tree.leaves(stacked.stack(apart)), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7, rtol=1e-4)


@pytest.mark.long
@pytest.mark.skipif(not os.environ.get("TFDS_DATA_DIR"), reason="TFDS_DATA_DIR is not set")
def test_loader_quick_writes_every_reader_beside_the_plain_loop(tmp_path):
    file = tmp_path / "rows.json"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.loader", "--quick", "--json", str(file)],
        cwd=ROOT, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    record = json.loads(file.read_text())
    assert [(r["reader"], r["workers"]) for r in record["rows"]] == [
        ("plain", 0), ("ours", 0), ("ours", 1), ("ours", 2)
    ]  # fmt: skip
    assert record["rows"][0]["ratio_to_plain"] == 1
    assert all(r["images_per_second"] > 0 and r["first_batch_s"] > 0 for r in record["rows"])
    page = unpadded(records.loader(record))
    assert "| 64 pixels, ours, 1 worker |" in page
    assert "| 64 pixels, ours, no workers |" in page


def three_steps(step, state, batch):
    found = []
    for _ in range(3):
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"]))
    return state, found


def named_arrays(tree):
    """Arrays by their path without the wrappers of either side, as float32."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = [[str(getattr(k, "key", getattr(k, "idx", ""))) for k in path] for path, _ in flat]
    # Of ours a unit has its number and then whole paths.
    parts = [part for name in names for part in [[p for n in name for p in n.split("/")]]]
    return {
        tuple(n for n in name[name.index("units") + 1 :] if n not in ("", "value")): np.asarray(x)
        for name, (_, x) in zip(parts, flat, strict=True)
    }


FLAX, PLAIN = contestants.REFERENCES


@pytest.mark.parametrize(
    ("entry", "case"),
    [
        (FLAX, Case("mlp", 4, depth=1)),
        *(
            pytest.param(entry, case, marks=pytest.mark.long)
            for case in (Case("smallconv", 4), Case("conv_chain", 4, depth=2))
            for entry in (FLAX, PLAIN)
        ),
        pytest.param(PLAIN, Case("resnet32", 2), marks=pytest.mark.long),
    ],
    ids=lambda x: getattr(x, "model", None) or x.method,
)
def test_the_hand_written_reference_trains_the_network_that_our_bp_trains(entry, case):
    # The rate of the first step is zero, so the parameters after three tell of two updates.
    settings = contestants.chain_settings(4)
    batch = random_batch(case)
    state, losses = three_steps(*contestants.build_reference(case, entry, settings), batch)
    built = contestants.build(case, Entry("bp"), settings)
    start = named_arrays(built.state.params)
    ours, our_losses = three_steps(train.make_step(*built[:4]), built.state, batch)
    np.testing.assert_allclose(losses[0], our_losses[0], rtol=1e-5)
    np.testing.assert_allclose(losses, our_losses, rtol=1e-3)
    theirs, mine = named_arrays(state[0]), named_arrays(ours.params)
    assert theirs.keys() == mine.keys()
    for name, x in mine.items():
        moved = np.sqrt(np.mean((x - start[name]) ** 2))
        assert moved > 0
        # Sums in another order: Adam turns a gradient that is rounding into a step of its own, so
        # of thousands of entries one may differ by a step, and all others by rounding.
        off = np.abs(theirs[name] - x)
        assert np.mean(off > 1e-3 * moved) < 1e-3, name
        assert np.median(off) < 1e-5 * moved, name
        if entry == FLAX:
            np.testing.assert_allclose(theirs[name], x, atol=1e-5, rtol=1e-5, err_msg=str(name))


@pytest.mark.long
@pytest.mark.parametrize(
    "case", [Case("smallconv", 4), Case("resnet32", 4), Case("mlp", 4)], ids=lambda c: c.model
)
def test_the_step_in_pytorch_starts_at_the_same_loss_and_follows_it(case):
    pytest.importorskip("torch")
    batch = random_batch(case)
    rate = contestants.chain_settings().learning_rate
    step = torch_step.make_step(network(case, None), batch, rate)
    reference_step, state = reference.make_step(network(case, None), rate, clip=1e9)
    _, losses = three_steps(reference_step, state, batch)
    np.testing.assert_allclose([step(), step()], losses[:2], rtol=1e-3)


def test_depth_and_width_are_refused_where_a_model_has_its_own():
    with pytest.raises(ValueError, match="depth of its own; use mlp"):
        network(Case("vgg13", 1, depth=3), None)
    with pytest.raises(ValueError, match="width of its own; use mlp"):
        network(Case("vgg13", 1, width=2), None)


def test_chains_have_equal_hidden_units_at_every_depth():
    sizes = {}
    for depth in (3, 5):
        params = contestants.build(Case("mlp", 1, depth=depth), Entry("bp")).state.params
        sizes[depth] = [costs.parameters(p) for p in params]
        assert len(params) == depth + 1
        assert len(set(sizes[depth][1:-1])) == 1
    assert sizes[5] == [*sizes[3][:2], *sizes[3][1:2] * 2, *sizes[3][2:]]


def test_share_of_the_matrix_product_is_operations_over_what_the_time_allows():
    # 5e6 multiply-accumulates in 2 ms are 5 GFLOP/s.
    assert roofline.share(5_000_000, 2.0, matmul_gflops=20.0) == pytest.approx(0.25)


@pytest.mark.long
def test_largest_resident_size_grows_with_what_is_held_and_not_with_the_parent():
    before = peak.largest_resident()
    held = np.ones(before // 8)
    assert peak.largest_resident() > before
    del held
    base, most, steps = peak.in_process(Case("mlp", 1), Entry("bp"))
    assert most > base
    assert base < peak.largest_resident()
    assert steps < most - base


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system does not tell")
def test_what_a_call_takes_is_told_whether_it_keeps_it_or_not():
    size = 2**26

    def touch(kept):
        kept.append(np.ones(size, np.uint8))

    for _ in range(2):
        assert 0.9 * size < peak.beyond(lambda: touch([])) < 1.5 * size
    kept = []
    assert 0.9 * size < peak.beyond(lambda: touch(kept)) < 1.5 * size
    assert peak.beyond(lambda: None) < 0.1 * size


def row(method, ms, temp, rank=None, memory="taped", **fields):
    return {"model": "vgg13", "method": method, "rank": rank, "memory": memory, "batch": 128,
            "ms": ms, "temp_bytes": temp, **fields}  # fmt: skip


def test_goals_are_judged_by_the_rows_and_left_out_where_a_row_is_missing():
    rows = [
        row(contestants.REFERENCE, 100.0, 1000),
        row("bp", 104.0, 1000),
        row("dfa", 70.0, 900),
        row("ssa", 29.0, 500, rank=0.25),
        row("ssa", 15.0, 100, rank=0.125),
    ]
    parts = [
        {"model": "vgg13", "batch": 128, "part": part, "share": share}
        for part, share in (("stiefel", 0.08), ("refresh", 0.03), ("chain", 0.5))
    ]
    page = unpadded(training_page.goals({"rows": rows, "profile": parts}))
    assert "| time of bp over Flax BP, vgg13 | 1.03 | 1.040 | no |" in page
    assert "| time of dfa over Flax BP, vgg13 | 0.70 | 0.700 | yes |" in page
    assert "| time of ssa at 0.25 over Flax BP, vgg13 | 0.30 | 0.290 | yes |" in page
    assert "| memory of ssa at 0.25, taped, over Flax BP, vgg13 | 0.55 | 0.500 | yes |" in page
    assert "| Stiefel and refresh in a step of ssa at 0.25, vgg13 | 0.10 | 0.110 | no |" in page
    assert "PyTorch" not in page
    assert "streamed" not in page


def test_growth_with_depth_is_that_of_streamed_steps_between_the_ends():
    rows = [
        row(method, 1.0, temp, memory=memory, depth=depth)
        for method, memory, sizes in (
            ("bp", "taped", (10, 40, 90)), ("dfa", "streamed", (10, 90, 12)),
            ("ssa", "streamed", (10, 11, 13)), ("svd_bp", "streamed", (10, 14, 28)),
        )
        for depth, temp in zip((8, 16, 64), sizes, strict=True)
    ]  # fmt: skip
    page = unpadded(training_page.growth(rows))
    assert "resident" not in page
    assert "| memory at depth 64 over 8, vgg13, dfa, streamed | 1.20 | 1.200 | yes |" in page
    assert "| memory at depth 64 over 8, vgg13, ssa, streamed | 1.20 | 1.300 | no |" in page
    # A walk holds about as many units as the root of their number.
    assert "| memory at depth 64 over 8, vgg13, svd_bp, streamed | 3.39 | 2.800 | yes |" in page
    assert ", bp" not in page
    page = unpadded(training_page.growth([{**r, "steps_bytes": 3 * r["temp_bytes"]} for r in rows]))
    line = "resident memory of steps at depth 64 over 8, vgg13, ssa, streamed | 1.20 | 1.300 | no"
    assert line in page


FIELDS = ["model", "method", "rank", "memory", "batch", "ms", "compile_s", "temp_bytes",
          "base_bytes", "peak_bytes", "steps_bytes", "ratio_to_bp", "macs", "share"]  # fmt: skip


def quick_record(name, file, *flags):
    subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", *flags, "--json", str(file)],
        cwd=ROOT, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    record = json.loads(file.read_text())
    assert record["matmul_gflops"] > 0
    assert record["copy_gb_s"] > 0
    for row in record["rows"]:
        assert list(row)[: len(FIELDS)] == FIELDS
        assert row["ms"] > 0
        assert row["macs"] > 0
        assert (row["ratio_to_bp"] == 1) or row["method"] != contestants.REFERENCE
    return record


@pytest.mark.long
def test_step_quick_writes_every_contestant_and_the_parts_of_a_step(tmp_path):
    record = quick_record("step", tmp_path / "rows.json", "--notes", "A test.")
    kinds = {(r["method"], r["rank"], r["memory"]) for r in record["rows"]}
    assert kinds == {tuple(e) for e in step.entries("mlp", (0.25,))}
    for row in record["rows"]:
        assert row["peak_bytes"] > row["base_bytes"] > 0
        assert 0 <= row["steps_bytes"] < row["peak_bytes"] - row["base_bytes"]
    profile = {p["part"]: p for p in record["profile"]}
    assert profile["step"]["share"] == 1
    assert profile["chain"]["ms"] == pytest.approx(
        profile["adam"]["ms"] + profile["stiefel"]["ms"], abs=1e-3
    )
    page = unpadded(records.step(record))
    assert "| mlp, ssa at 0.25, streamed |" in page
    assert "A test." in page


def test_a_walk_among_the_contestants_goes_through_few_directions():
    built = contestants.build(Case("mlp", 4, depth=2), Entry(contestants.WALK, 0.5))
    for unit, passed in zip(built.state.params, built.state.feedback.passed, strict=True):
        for name, places in passed.items():
            assert len(places) == math.ceil(unit[name].rank / 4)


@pytest.mark.long
@pytest.mark.parametrize("name", ["depth", "scaling"])
def test_depth_and_scaling_quick_write_a_row_for_every_size(tmp_path, name):
    record = quick_record(name, tmp_path / "rows.json", "--no_peak")
    field = {"depth": "depth", "scaling": "width"}[name]
    assert len({r[field] for r in record["rows"]}) == 2
    page = unpadded(getattr(records, name)(record))
    assert "| mlp, ssa at 0.25" in page


@pytest.mark.long
def test_compiling_quick_writes_a_row_of_a_fresh_process(tmp_path):
    file = tmp_path / "compiling.json"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.compiling", "--quick", "--json", str(file)],
        cwd=ROOT, check=True, capture_output=True, timeout=300, env={**os.environ, "XLA_FLAGS": ""},
    )  # fmt: skip
    record = json.loads(file.read_text())
    (row,) = record["rows"]
    assert row["step_s"] > 0
    # Backpropagation through a perceptron decides nothing on the way.
    assert (row["loops"], row["conditionals"]) == (0, 0)
    assert "| mlp | digits | bp | none |" in unpadded(records.compiling(record))
