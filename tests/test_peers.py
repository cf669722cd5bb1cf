"""Our methods beside PyTorch's: the same networks, batches and steps, and a page that says so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import unpadded

from benchmarks import page, peers, peers_page, records, torch_step, trainees
from benchmarks.trainees import BIOTORCH, LOW_RANK, OURS, TORCH, Entry, Setup, Trainee
from ssa_jax.data import make_loader
from ssa_jax.models import MODELS
from ssa_jax.runs.network import make_model

ROOT = Path(__file__).parent.parent
SETUP = Setup("mlp", 4, 4)


def row(library, method, accuracies, cpu, peak=300, steps=10, params=1000):
    return {
        "model": "mlp", "library": library, "method": method, "batch": 64, "steps": 400,
        "params": params, "accuracies": accuracies, "ms": 3 * cpu, "cpu_ms": cpu,
        "base_bytes": 100 * 2**20, "peak_bytes": peak and peak * 2**20,
        "steps_bytes": steps and steps * 2**20,
    }  # fmt: skip


RECORD = {
    "hardware": "a CPU", "versions": {"jax": "0"}, "commit": "0",
    "rows": [
        row(OURS, "bp", [0.50, 0.52, 0.51], 2.0, peak=200),
        row(OURS, "ssa", [0.53, 0.54, 0.56], 4.0, params=500),
        row(TORCH, "bp", [0.51, 0.51, 0.51], 1.98, peak=150),
        row(TORCH, LOW_RANK, [0.49, 0.51, 0.50], 1.0, steps=5, params=490),
        row(BIOTORCH, "dfa", [0.40, 0.40, 0.40], 3.0, peak=None, steps=None),
    ],
}  # fmt: skip


def test_the_page_says_who_wins_a_column_be_it_a_peer():
    text = unpadded(records.peers(RECORD))
    assert "| ssa_jax, ssa | **54.33 ± 1.53 %** | 4 |" in text
    assert "| pytorch, low rank | 50.00 ± 1.00 % | **1** | **0 k** | 200 | **5** |" in text
    assert "accuracy ssa_jax's ssa (54.33 ± 1.53 %); by CPU ms pytorch's low rank (1)" in text
    assert "process MiB pytorch's bp (50)" in text
    assert "| mlp, bp and pytorch bp | +0.00 ± 0.58 (even) | 1.01 (even) | 2.00 (pytorch) |" in text
    assert "| mlp, ssa and pytorch low rank | +4.33 ± 0.88 (ssa_jax) | 4.00 (pytorch) |" in text


def test_all_take_turns_on_the_same_batches_and_refresh_before_the_step_where_it_is_due():
    images = trainees.noise(64)
    loader = make_loader(images)
    seen = {"a": [], "b": []}

    def trainee(name, every):
        return Trainee(
            lambda batch: seen[name].append(np.asarray(batch.labels)), lambda: 0.0, 0, every,
            lambda: seen[name].append("refresh"),
        )  # fmt: skip

    clocks = [(peers.Clock(), peers.Clock()) for _ in range(2)]
    both = [(Entry(OURS, "a"), trainee("a", 5)), (Entry(OURS, "b"), trainee("b", 0))]
    peers.train(Setup("mlp", 8, 20), loader, both, clocks)
    assert [i for i, x in enumerate(seen["a"]) if isinstance(x, str)] == [0, 6, 12, 18]
    batches = [x for x in seen["a"] if not isinstance(x, str)]
    np.testing.assert_array_equal(batches, seen["b"])
    assert len({tuple(b) for b in batches}) > 10
    # The first call of each kind compiles, and is not kept.
    assert [len(c.times) for c in clocks[0]] == [19, 3]
    assert clocks[1][1].medians() == (0.0, 0.0)


@pytest.mark.parametrize("model", ["mlp", "smallconv"])
def test_thin_layers_in_pytorch_are_the_map_of_our_factors(model):
    pytest.importorskip("torch")
    ours = MODELS[model]((16, 16, 3), 10, rank=0.25, rngs=nnx.Rngs(0))
    theirs = torch_step.module(ours).eval()
    batch = next(trainees.batches(SETUP, make_loader(trainees.noise(64))))
    ours.eval()
    inputs, _ = trainees.to_torch(batch)
    expected = np.asarray(jax.jit(lambda x: ours(x))(batch.images))
    np.testing.assert_allclose(theirs(inputs).detach().numpy(), expected, atol=2e-5)


def network(mode, model):
    images = trainees.noise(64)
    config = trainees.config_of(Setup(model, 4, 4), Entry(OURS, "bp"), images)
    made = torch_step.module(make_model(config, images, factorized=False))
    return trainees.bio_module(made, mode)


@pytest.mark.parametrize("model", ["mlp", "smallconv"])
def test_dfa_of_biotorch_sends_the_error_by_its_fixed_weights(model):
    torch = pytest.importorskip("torch")
    pytest.importorskip("biotorch")
    made = network("dfa", model)
    batch = next(trainees.batches(SETUP, make_loader(trainees.noise(64))))
    inputs, labels = trainees.to_torch(batch)
    loss_of = torch.nn.functional.cross_entropy
    outputs = made(inputs, labels, loss_of)
    loss_of(outputs, labels).backward()
    hidden, last = made.module[-2], made.module[-1]
    below = inputs
    for unit in made.module[:-2]:
        below = unit(below)
    h = hidden(below)
    error = (torch.softmax(outputs, 1) - torch.nn.functional.one_hot(labels, 10)) / len(labels)
    (layer,) = (x for x in hidden.modules() if isinstance(x, torch.nn.Linear))
    (above,) = (x for x in last.modules() if isinstance(x, torch.nn.Linear))
    (expected,) = torch.autograd.grad(h, layer.weight, error.detach() @ above.weight_backward)
    torch.testing.assert_close(layer.weight.grad, expected)


@pytest.mark.parametrize("mode", trainees.MODES)
def test_biotorch_starts_at_our_weights(mode):
    pytest.importorskip("biotorch")
    torch = pytest.importorskip("torch")
    made, plain = network(mode, "mlp"), network("backpropagation", "mlp")
    inputs = torch.ones(2, 3, 16, 16)
    torch.testing.assert_close(made.eval()(inputs), plain.eval()(inputs))


def test_the_results_state_the_stored_figures():
    rows = json.loads((records.STORED / "peers.json").read_text())["rows"]
    text = (ROOT / "docs/results.md").read_text().split("## Beside PyTorch and biotorch")[1]

    def pair(model, method, library, theirs):
        of_model = [r for r in rows if r["model"] == model]
        return (
            page.find(of_model, library=OURS, method=method),
            page.find(of_model, library=library, method=theirs),
        )

    def points(method, library, theirs):
        both = (peers_page.points(*pair(m, method, library, theirs)) for m in peers.MODELS)
        return [(f"{p.mean:+.2f} ± {p.error:.2f}", p.winner) for p in both]

    def times(method, library, theirs):
        both = (pair(m, method, library, theirs) for m in peers.MODELS)
        return [ours["cpu_ms"] / peer["cpu_ms"] for ours, peer in both]

    (mlp, first), (conv, second) = points("bp", TORCH, "bp")
    assert first == second == "even"
    assert f"({mlp} and {conv} points)" in text
    for mode in ("fa", "frsf"):
        assert [winner for _, winner in points(mode, BIOTORCH, mode)] == ["even"] * 2
    for mode in ("dfa", "brsf"):
        (mlp, first), (conv, second) = points(mode, BIOTORCH, mode)
        assert first == second == BIOTORCH
        assert f"by {mlp[1:]} and {conv[1:]}" in text
    (_, first), (conv, second) = points("usf", BIOTORCH, "usf")
    assert (first, second) == ("even", OURS)
    assert f"better by {conv[1:]} on `smallconv`" in text
    (mlp, first), (conv, second) = points("ssa", TORCH, LOW_RANK)
    assert (first, second) == ("even", OURS)
    assert f"on `mlp` ({mlp}), and better on `smallconv` ({conv})" in text
    mlp, winner = points("ssa direct", TORCH, LOW_RANK)[0]
    assert winner == TORCH
    assert f"it is {mlp[1:]} points worse on `mlp`" in text
    assert [winner for _, winner in points("ssa", TORCH, "bp")] == ["even"] * 2
    best = [
        max((r for r in rows if r["model"] == m), key=lambda r: sum(r["accuracies"]))["method"]
        for m in peers.MODELS
    ]
    assert best == ["svd_bp"] * 2

    of_dense = zip(
        times("bp", TORCH, "bp"), *(times(m, BIOTORCH, m) for m in trainees.MODES), strict=True
    )
    low, high = zip(*((min(r), max(r)) for r in of_dense), strict=True)
    assert f"take {low[0]:.2f} to {high[0]:.2f} of the peer's processor time" in text
    assert f"on `smallconv` {low[1]:.2f} to {high[1]:.2f} of it" in text
    a, b = times("ssa", TORCH, LOW_RANK)
    assert f"`ssa` takes {a:.2f} and {b:.2f} times that of W = A B" in text
    a, b = times("ssa", TORCH, "bp")
    assert f"and {a:.2f} and {b:.2f} times that of dense backpropagation" in text
    process = {
        (m, method): peers_page.process(ours) / peers_page.process(peer)
        for m in peers.MODELS
        for method, *theirs in peers_page.PAIRS
        for ours, peer in [pair(m, method, *theirs)]
        if theirs != [TORCH, "bp"] or method == "bp"
    }
    assert f"{process['mlp', 'ssa']:.2f} and {process['smallconv', 'ssa']:.2f} times what" in text
    assert [k for k, ratio in process.items() if ratio < 0.95] == [("mlp", "usf")]
    sizes = [ours["params"] / peer["params"] for ours, peer in
             (pair(m, "ssa", TORCH, "bp") for m in peers.MODELS)]  # fmt: skip
    assert f"({100 * sizes[0]:.0f} and {100 * sizes[1]:.0f} % of the dense network's)" in text


@pytest.mark.slow
def test_peers_quick_writes_a_row_for_every_contestant(tmp_path):
    file = tmp_path / "rows.json"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", "--quick", "--json", str(file)],
        cwd=ROOT, check=True, capture_output=True, timeout=300, env={**os.environ, "XLA_FLAGS": ""},
    )  # fmt: skip
    record = json.loads(file.read_text())
    found = [Entry(r["library"], r["method"]) for r in record["rows"]]
    assert found == trainees.entries()
    assert all(r["cpu_ms"] > 0 and 0 < r["accuracies"][0] < 1 for r in record["rows"])
    assert "| ssa_jax, ssa |" in unpadded(records.peers(record))
