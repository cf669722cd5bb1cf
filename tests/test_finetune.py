"""The study of fine-tuning: what is tuned in each way, and what its sizes say."""

import json
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.studies import finetune, study
from experiments.studies.study import Settings
from experiments.studies.trials import Trial
from ssa_jax.data import Dataset
from ssa_jax.errors import ConfigError
from ssa_jax.models.feedforward import mlp
from ssa_jax.networks.models import split
from ssa_jax.runs.config import Config
from ssa_jax.training import costs

ROOT = Path(__file__).parent.parent
IMAGES = jax.random.normal(jax.random.key(0), (3, 4, 4, 1))


def test_classes_are_picked_and_numbered_anew():
    labels = np.array([3, 0, 5, 4, 3], np.int32)
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1)
    found = finetune.only_classes(
        Dataset(images, labels, images[:2], labels[:2], 10, 1, True), range(3, 6)
    )
    assert found.train_labels.tolist() == [0, 2, 1, 0]
    assert found.train_images.ravel().tolist() == [0, 2, 3, 4]
    assert (found.test_labels.tolist(), found.classes) == ([0], 3)


def network(form, classes=5):
    model = mlp((4, 4, 1), 10, rank=None, rngs=nnx.Rngs(0), hidden=(32, 32))
    return model, finetune.to_tune(nnx.clone(model), form, classes, seed=1)


@pytest.mark.parametrize("form", ["bp", "head", "lora_4", "ssa_25"])
def test_what_is_tuned_begins_as_it_was_trained_behind_a_new_classifier(form):
    before, after = network(form)
    hidden = [nnx.Sequential(*model.units[:-1])(IMAGES) for model in (before, after)]
    assert jnp.allclose(*hidden, atol=1e-6)
    assert after(IMAGES).shape == (3, 5)


@pytest.mark.parametrize(
    ("form", "beside"), [("head", 0), ("lora_4", 4 * (16 + 32) + 4 * (32 + 32))]
)
def test_what_rests_is_no_parameter_and_gets_no_gradient(form, beside):
    _, model = network(form)
    units, params, mstate, merge = split(model, IMAGES[:1])
    assert costs.parameters(params) == beside + 33 * 5
    assert len(units) == 3
    moved = merge(jax.tree.map(lambda x: x + 1, params), mstate)
    base = [u.map.base_module if beside else u.map for u in moved.units[:-1]]
    again = [u.map.base_module if beside else u.map for u in model.units[:-1]]
    for ours, theirs in zip(base, again, strict=True):
        assert jnp.array_equal(ours.kernel[...], theirs.kernel[...])


def test_a_network_that_is_not_trained_yet_is_asked_for(tmp_path):
    config = Config(workdir=str(tmp_path / "fashion_ssa_25-seed1"), seed=1)
    with pytest.raises(ConfigError, match=r"fashion_ssa_25-seed1 tunes what fashion_before-seed1"):
        finetune.given(Trial("fashion_ssa_25", config))


def test_what_is_stored_of_lora_is_the_dense_network(tmp_path):
    rows = [{"variant": "cifar_before", "params": 900}, {"variant": "cifar_ssa_25", "params": 300}]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    size = finetune.stored(tmp_path)
    assert [size(f"cifar_{f}", {"params": 7}) for f in ("lora_4", "head", "ssa_25", "bp")] == [
        900, 900, 7, 7
    ]  # fmt: skip


@pytest.mark.slow
def test_the_study_trains_before_and_tunes_after_in_every_way(tmp_path):
    tasks = {"digits": finetune.Task("digits", "digits", "digits again")}
    forms = ("before", "bp", "head", "lora_16", "ssa_25")
    whole = finetune.STUDY._replace(variants=finetune.variants_of(tasks))
    config = Config(epochs=2, train_size=640)
    only = [f"digits_{form}" for form in forms]
    rows = study.run_study(whole, Settings(config, 1, tmp_path / "study", only))
    found = {r["variant"].removeprefix("digits_"): r for r in rows}
    assert set(found) == set(forms)
    assert found["head"]["params"] == 513 * 10
    assert found["lora_16"]["params"] == 16 * (64 + 512) + 16 * (512 + 512) + 513 * 10
    assert min(found[f]["test_accuracy"] for f in ("bp", "ssa_25")) > 0.3
    assert all(np.isfinite(r["train_loss"]) for r in rows)


def test_the_table_of_fine_tuning_is_its_record():
    record = json.loads((ROOT / "results/finetune/record.json").read_text())
    page = (ROOT / "docs/research.md").read_text()
    assert record["command"] in page
    assert record["commit"] in page
    labels = finetune.STUDY.labels
    groups = {}
    for row in record["rows"]:
        groups.setdefault(row["variant"], []).append(row)
    dense = {v.partition("_")[0]: rows[0]["params"] for v, rows in groups.items() if "before" in v}
    for variant, rows in groups.items():
        accuracies = [100 * r["test_accuracy"] for r in rows]
        deviation = f" ± {statistics.stdev(accuracies):.2f}" if len(rows) > 1 else ""
        trained = statistics.mean(r["params"] for r in rows) / 1e3
        task, _, form = variant.partition("_")
        rests = form == "head" or form.startswith("lora")
        stored = dense[task] / 1e3 if rests else trained
        assert (
            f"| {labels[variant]} | {statistics.mean(accuracies):.2f}{deviation} % "
            f"| {trained:.0f} k | {stored:.0f} k | {len(rows)} |"
        ) in page


def test_rates_are_those_that_did_best_on_held_out_images():
    record = json.loads((ROOT / "results/finetune/record.json").read_text())
    tried = {}
    for r in record["rates"]:
        form = r["variant"].partition("_")[2].rstrip("_0123456789")
        tried.setdefault((form, r["rate"]), []).append(r["accuracy"])
    # A rate that one of both tasks was not tried at does not count.
    means = {key: statistics.mean(found) for key, found in tried.items() if len(found) == 2}
    for form, rate in finetune.RATES.items():
        assert rate == max((r for f, r in means if f == form), key=lambda r: means[form, r])
