"""The worked examples run, and reach what they promise."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from ssa_jax import transforms
from ssa_jax.factors import linalg

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def run(name, *arguments):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(*arguments)


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


@pytest.mark.slow
@pytest.mark.usefixtures("other_peoples_code")
@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("cnn_on_arrays", 0.9), ("linen_model", 0.9), ("vision_transformer", 0.8),
        ("outside_method", 0.8),
    ],
)  # fmt: skip
def test_models_and_methods_of_ones_own_learn_the_digits(name, least):
    assert run(name).history[-1]["test_accuracy"] > least


@pytest.mark.slow
@pytest.mark.usefixtures("other_peoples_code")
def test_regression_learns_what_is_smooth():
    # The mean absolute error of guessing the mean is 0.8.
    assert run("regression").history[-1]["test_loss"] < 0.2


@pytest.mark.slow
@pytest.mark.usefixtures("other_peoples_code")
def test_a_saved_run_goes_on_with_other_classes(tmp_path):
    assert run("fine_tuning", tmp_path / "run").history[-1]["test_accuracy"] > 0.9


@pytest.mark.slow
@pytest.mark.usefixtures("other_peoples_code")
def test_a_folder_of_images_is_trained_on(tmp_path):
    for i in range(60):
        for label, shade in enumerate((40, 200)):
            (tmp_path / str(label)).mkdir(exist_ok=True)
            image = np.random.default_rng(i).integers(shade, shade + 40, (36, 40, 3), np.uint8)
            Image.fromarray(image).save(tmp_path / str(label) / f"{i}.png")
    found = run("image_folder", tmp_path)
    assert found.history[-1]["test_accuracy"] == 1
    assert found.data.image_shape == (32, 32, 3)


@pytest.mark.slow
def test_a_model_and_data_from_outside_are_named_by_flags(tmp_path):
    names = [f"--{kind}=examples.outside_model:{name}"
             for kind, name in (("model", "wide"), ("dataset", "halves"))]  # fmt: skip
    subprocess.run(
        [sys.executable, "-m", "experiments.cifar", *names, "--epochs=3",
         f"--workdir={tmp_path / 'run'}"],
        cwd=EXAMPLES.parent, check=True, capture_output=True, timeout=200,
    )  # fmt: skip
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["test_accuracy"] > 0.8
    assert summary["model"] == "examples.outside_model:wide"
