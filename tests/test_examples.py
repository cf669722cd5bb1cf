"""The worked examples run, and reach what they promise."""

import importlib.util
import pathlib

import jax.numpy as jnp
import pytest
from flax import nnx

from ssa_jax import transforms
from ssa_jax.factors import linalg

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def run(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main()


def test_orthogonal_rnn_remembers():
    result = run("orthogonal_rnn")
    assert result["accuracy"] > 0.95
    assert max(result["drift"], result["error"]) < 1e-6
    assert result["largest_stretch"] == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_nnx_network_learns_on_falling_rank():
    result = run("flax_nnx_mlp")
    assert result["accuracy"] > 0.9
    assert result["rank"] == 8
    assert result["drift"] < 1e-6


def test_nnx_optimizer_takes_a_chain_with_a_mask():
    model = nnx.Linear(5, 3, kernel_init=nnx.initializers.orthogonal(), rngs=nnx.Rngs(0))
    mask = transforms.label_paths(lambda path, x: "kernel" in path)
    optimizer = nnx.Optimizer(model, transforms.stiefel_adam(0.1, mask=mask), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 5)))))(model))

    before = model.kernel.get_value()
    for _ in range(3):
        step(model, optimizer)
    after = model.kernel.get_value()
    assert linalg.orthogonality_error(after) < 1e-6
    assert jnp.max(jnp.abs(after - before)) > 0.1


def test_linen_autoencoder_finds_the_principal_components():
    result = run("flax_linen_autoencoder")
    assert abs(result["excess_loss"]) < 1e-4
    assert result["largest_angle"] < 1
    assert result["drift"] < 1e-6


@pytest.mark.slow
def test_the_guide_to_exports_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (EXAMPLES.parent / "docs" / "export.md").read_text()
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    assert len(blocks) == 2
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert names["chosen"].units[1].map.kernel.get_value().rank == 24
    assert (tmp_path / "smallconv-export" / "model.json").exists()
