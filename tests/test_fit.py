"""`fit`: any model, any loss, any data; what comes back is a run."""

import dataclasses
import importlib.machinery
import re
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from PIL import Image

import ssa_jax
from ssa_jax.data import Dataset
from ssa_jax.errors import ConfigError, DataError
from ssa_jax.methods import METHODS, Method
from ssa_jax.networks.factorize import LeftDense
from ssa_jax.reporting import callbacks, pictures, summary
from ssa_jax.runs import trained
from ssa_jax.runs.run import run as by_config
from ssa_jax.runs.workdir import WorkdirError
from ssa_jax.training import tasks
from ssa_jax.training.ranks import Target

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (64, 4, 4, 1), np.uint8)
Y = (X[:, :2].mean((1, 2, 3)) > X[:, 2:].mean((1, 2, 3))).astype(int)
RNGS = nnx.Rngs(0)
OPTIONS = {"epochs": 2, "batch_size": 8}


pytestmark = pytest.mark.usefixtures("other_peoples_code")


class Net(nnx.Module):
    """A perceptron with a batch norm and two cuts."""

    def __init__(self, outputs=2, inputs=16, width=16, seed=0):
        rngs = nnx.Rngs(seed)
        self.a = nnx.Linear(inputs, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.b = nnx.Linear(width, width, rngs=rngs)
        self.c = nnx.Linear(width, outputs, rngs=rngs)

    def __call__(self, x):
        x = ssa_jax.cut(nnx.relu(self.norm(self.a(x.reshape(len(x), -1)))))
        return self.c(ssa_jax.cut(nnx.relu(self.b(x))))


def leaves(model):
    return [np.asarray(x) for x in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))]


@pytest.fixture(scope="module")
def run():
    with jax.numpy_rank_promotion("allow"):
        return ssa_jax.fit(Net(), (X, Y), rank_schedule="hybrid", **OPTIONS)


def test_a_run_is_told_in_a_line(run):
    assert re.fullmatch(
        r"<Run: \w+, given:Net on given:\w+, [\d.]+ % after epoch \d+>", repr(run)
    ), repr(run)


def test_a_run_keeps_its_ranks_when_it_goes_on(run):
    with pytest.raises(ConfigError, match=r"^rank_init is not for a run, whose model keeps its"):
        ssa_jax.fit(run, (X, Y), rank_init=0.25, batch_size=8)


def plain(input_shape, outputs, *, rank, rngs):
    """A model from outside that leaves it to the run to put it on factors."""
    del rank, rngs
    return Net(outputs, int(np.prod(input_shape)))


def test_a_dense_model_from_outside_by_name_is_put_on_factors():
    named = ssa_jax.fit(f"{__name__}:plain", (X, Y), rank_schedule="hybrid", **OPTIONS)
    given = ssa_jax.fit(Net(), (X, Y), rank_schedule="hybrid", **OPTIONS)
    assert named.history[-1]["ranks"] == given.history[-1]["ranks"] != {}
    assert all(map(np.array_equal, leaves(named.model), leaves(given.model)))


def function(input_shape, outputs, *, rank, rngs):
    """A plain function from outside, dense."""
    del rank, rngs
    params = {"a": 0.1 * jnp.ones((int(np.prod(input_shape)), 8)), "b": jnp.ones((8, outputs))}
    return ssa_jax.Functional(
        lambda p, x: ssa_jax.cut(jnp.tanh(x.reshape(len(x), -1) @ p["a"])) @ p["b"], params
    )


def test_a_plain_function_by_name_that_stays_dense_is_told():
    with pytest.warns(LeftDense, match=r":function \(a plain function; `factors.from_dense`"):
        run = ssa_jax.fit(f"{__name__}:function", (X, Y), method="ssa", **OPTIONS)
    assert run.history[-1]["ranks"] == {}


def test_the_dense_size_of_a_model_on_factors_is_that_of_its_dense_layers(capsys):
    whole, run = Net(), ssa_jax.factorize(Net(), rank=0.25, lowest=0.0)
    for model in (whole, run):
        run = ssa_jax.fit(model, (X, Y), epochs=1, max_steps=1, batch_size=8, factorize="all")
    ssa_jax.fit(run, (X, Y), epochs=1, max_steps=1, batch_size=8)
    dense = 16 * 16 + 16 + 32 + 16 * 16 + 16 + 16 * 2 + 2
    assert capsys.readouterr().out.count(f"({dense} dense)") == 3


def test_a_budget_of_a_model_on_factors_is_of_its_dense_size():
    options = {"rank_schedule": "linear", "rank_budget": 0.7, "epochs": 4, "batch_size": 8}
    model = ssa_jax.factorize(Net(width=64), rank=0.75, lowest=0.0)
    run = ssa_jax.fit(model, (X, Y), **options)
    # Ranks are whole, so that a little less than was allowed may be left.
    dense = 16 * 64 + 64 + 128 + 64 * 64 + 64 + 64 * 2 + 2
    assert 0.6 < run.summary["params"] / dense <= 0.7


def test_a_run_that_was_dense_may_go_on_on_factors_of_a_rank():
    dense = ssa_jax.fit(Net(), (X, Y), method="bp", **OPTIONS)
    tuned = ssa_jax.fit(dense, (X, Y), rank_init=0.25, factorize="all", **OPTIONS)
    assert set(tuned.history[-1]["ranks"].values()) == {4}


def test_numbers_of_numpy_are_settings_too():
    run = ssa_jax.fit(
        Net(), (X, Y), epochs=1, batch_size=np.int64(8), learning_rate=np.float32(1e-3)
    )
    assert run.config.batch_size == 8


def test_the_front_door_lists_what_is_behind_it():
    assert {"fit", "load", "cut", "factorize"} <= set(dir(ssa_jax))


def test_a_run_has_its_history_and_a_model_that_predicts_what_it_was_measured_by(run):
    assert [row["epoch"] for row in run.history] == [1, 2]
    model = run.model
    mean, std = X.reshape(-1).mean(), X.reshape(-1).std()
    kept = run.built  # Its own split of the data: a tenth is held out.
    assert kept.steps_per_epoch == 58 // 8
    raw = run.predict(X)
    moments = run.data.moments
    assert abs(float(moments[0][0]) - mean) < 5
    assert abs(float(moments[1][0]) - std) < 5
    assert np.allclose(raw, model(jnp.asarray((X - moments[0]) / moments[1])), atol=1e-5)
    found = run.evaluate((X, Y))
    assert found["accuracy"] == pytest.approx(np.mean(raw.argmax(-1) == Y))
    losses = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(raw), jnp.asarray(Y))
    assert found["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    # One more or one fewer than a batch.
    assert np.allclose(run.predict(X[:1]), raw[:1], atol=1e-5)


def test_a_run_that_is_saved_and_loaded_is_the_run(run, tmp_path):
    run.save(tmp_path / "here")
    with pytest.raises(WorkdirError, match="exists; nothing was written"):
        run.save(tmp_path / "here")
    with pytest.raises(WorkdirError, match=r"object for its model .*load\(path, model="):
        ssa_jax.load(tmp_path / "here")
    again = ssa_jax.load(tmp_path / "here", model=Net(seed=5))
    assert np.array_equal(again.predict(X), run.predict(X))
    assert again.history == run.history
    with pytest.raises(WorkdirError, match=r"holds no run of ssa_jax\.fit"):
        ssa_jax.load(tmp_path)


def test_the_model_that_is_given_stays_as_it_is():
    model = Net()
    before = leaves(model)
    ssa_jax.fit(model, (X, Y), epochs=1, batch_size=8)
    assert all(np.array_equal(a, b) for a, b in zip(before, leaves(model), strict=True))
    model(jnp.ones((2, 16)))


def test_training_goes_on_from_a_run_with_its_normalisation(run):
    further = ssa_jax.fit(run, (X[:32] // 2, Y[:32]), learning_rate=1e-12, **OPTIONS)
    assert np.array_equal(further.data.moments[0], run.data.moments[0])
    for a, b in zip(leaves(further.model), leaves(run.model), strict=True):
        assert np.allclose(a, b, atol=1e-5)


def test_resume_is_bit_for_bit_the_uninterrupted_run(tmp_path):
    options = {**OPTIONS, "rank_schedule": "hybrid"}
    whole = ssa_jax.fit(Net(), (X, Y), workdir=tmp_path / "whole", **options)
    ssa_jax.fit(Net(), (X, Y), workdir=tmp_path / "part", max_steps=9, **options)
    part = ssa_jax.fit(Net(), (X, Y), workdir=tmp_path / "part", resume=True, **options)
    assert all(
        np.array_equal(a, b) for a, b in zip(leaves(whole.model), leaves(part.model), strict=True)
    )
    with pytest.raises(WorkdirError, match="dataset"):
        ssa_jax.fit(Net(), (X // 2, Y), workdir=tmp_path / "part", resume=True, **options)


@pytest.mark.parametrize("method", ["ssa", "bp", pytest.param("fa", marks=pytest.mark.slow)])
def test_mean_squared_error_falls(method):
    x = RNG.normal(size=(200, 16))
    y = np.tanh(x[:, :3])
    run = ssa_jax.fit(
        Net(outputs=3), (x, y), loss="mean_squared_error", method=method, epochs=8, batch_size=20,
        learning_rate=1e-2,
    )  # fmt: skip
    losses = [row["test_loss"] for row in run.history]
    assert losses[-1] < 0.7 * losses[0]
    assert "test_accuracy" not in run.history[-1]
    assert run.history[-1]["test_mean_absolute_error"] > 0
    assert run.summary["best_epoch"] == 1 + int(np.argmin(losses))


@pytest.mark.slow
def test_several_labels_and_a_loss_of_ones_own():
    labels = np.stack([Y, 1 - Y, X[:, 0, 0, 0] > 128], 1)
    run = ssa_jax.fit(Net(3), (X, labels), loss="binary_cross_entropy", **OPTIONS)
    assert 0 <= run.history[-1]["test_accuracy"] <= 1

    def absolute(outputs, targets):
        return jnp.abs(outputs - targets).mean()

    run = ssa_jax.fit(Net(3), (X, labels.astype(float)), loss=absolute, **OPTIONS)
    outputs = run.predict(X)
    assert run.evaluate((X, labels.astype(float)))["loss"] == pytest.approx(
        np.abs(outputs - labels).mean(), rel=1e-5
    )


@pytest.mark.slow
def test_any_optax_optimiser_has_its_own_rate():
    still = ssa_jax.fit(Net(), (X, Y), optimizer=optax.sgd(0.0), method="bp", **OPTIONS)
    assert all(
        np.allclose(a, b, atol=1e-6)
        for a, b in zip(leaves(Net()), leaves(still.model), strict=True)
    )
    moved = ssa_jax.fit(Net(), (X, Y), optimizer=optax.adamw(1e-2), method="bp", **OPTIONS)
    assert not np.allclose(leaves(moved.model)[1], leaves(Net())[1], atol=1e-3)
    assert moved.history[0]["learning_rate"] is None


def nothing(network, options):
    """A method whose hidden units do not learn."""
    return Method(
        init=lambda key, params, mstate: (),
        signals=lambda feedback, params, tape, error, batch: (
            *(jnp.zeros_like(h) for h in tape.outputs[:-1]), error
        ),
    )  # fmt: skip


def test_methods_from_outside_by_object_by_name_and_by_a_table_that_grows(monkeypatch):
    def hidden(method):
        run = ssa_jax.fit(Net(), (X, Y), method=method, rank_init=1.0, **OPTIONS)
        return np.asarray(run.model.a.kernel.get_value())

    dense = np.asarray(Net().a.kernel.get_value())
    assert np.array_equal(hidden(nothing), dense)
    assert np.array_equal(hidden(f"{__name__}:nothing"), dense)
    monkeypatch.setitem(METHODS, "nothing", nothing)
    assert np.array_equal(hidden("nothing"), dense)
    with pytest.raises(ConfigError, match=r"method must be one of bp, .*, got other"):
        hidden("other")
    with pytest.raises(ConfigError, match=r"method=no_such_package:x cannot be had"):
        hidden("no_such_package:x")


@pytest.mark.slow
def test_callbacks_see_every_epoch_and_csv_has_its_numbers():
    seen = []
    run = ssa_jax.fit(Net(), (X, Y), callbacks=["csv", seen.append], **OPTIONS)
    assert [row["epoch"] for row in seen] == [1, 2]
    header, *rows = (run.folder / "metrics.csv").read_text().splitlines()
    assert len(rows) == 2
    at = header.split(",").index("test_loss")
    assert float(rows[-1].split(",")[at]) == run.history[-1]["test_loss"]


def half(share, energy, final):
    """Half of the ranks from the first step on."""
    return Target(jnp.float32(0.5), jnp.float32(1), jnp.float32(0))


@pytest.mark.parametrize(
    "schedule", [half, pytest.param(f"{__name__}:half", marks=pytest.mark.slow)]
)
def test_a_rank_schedule_from_outside_cuts_as_it_says(schedule):
    run = ssa_jax.fit(Net(width=64), (X, Y), rank_schedule=schedule, rank_init=1.0, **OPTIONS)
    # A first layer that widens keeps its rank.
    assert run.summary["ranks"] == {"0/a/kernel": 16, "1/b/kernel": 32}


def tells(folder):
    """A callback by name: a line an epoch in a file of the run's folder."""
    return lambda row: (folder / "told").write_text(f"{row['epoch']}\n")


@pytest.mark.slow
def test_callbacks_are_named_by_a_setting_too():
    run = ssa_jax.fit(Net(), (X, Y), **{**OPTIONS, "callbacks": ()}, seed=1)
    assert not (run.folder / "told").exists()
    config = dataclasses.replace(
        run.config, model="mlp", dataset="digits", epochs=1, max_steps=2, method="bp",
        workdir=str(run.folder.parent / "named"), callbacks=f"csv, {__name__}:tells",
    )  # fmt: skip
    by_config(config)
    assert (run.folder.parent / "named/told").read_text() == "1\n"
    assert (run.folder.parent / "named/metrics.csv").exists()


class InLinen(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.Dense(16)(x.reshape(len(x), -1))
        x = ssa_jax.cut(linen.relu(linen.BatchNorm(use_running_average=not train)(x)))
        return linen.Dense(2)(ssa_jax.cut(linen.relu(linen.Dense(16)(x))))


def test_a_linen_model_is_trained_saved_and_loaded(tmp_path):
    run = ssa_jax.fit(InLinen(), (X, Y), rank_schedule="hybrid", **OPTIONS)
    assert run.summary["ranks"]
    run.save(tmp_path / "run")
    again = ssa_jax.load(tmp_path / "run", model=InLinen())
    assert np.array_equal(again.predict(X), run.predict(X))
    moments = run.data.moments
    assert np.allclose(
        run.model(jnp.asarray((X - moments[0]) / moments[1])), run.predict(X), atol=1e-5
    )


def test_a_plain_function_is_trained():
    params = {"a": jnp.ones((16, 8)) / 16, "b": jnp.ones((8, 2)) / 8}

    def apply(p, x):
        return ssa_jax.cut(jnp.tanh(x.reshape(len(x), -1) @ p["a"])) @ p["b"]

    run = ssa_jax.fit(ssa_jax.Functional(apply, params), (X, Y), method="dfa", **OPTIONS)
    assert not np.allclose(run.model.params["a"], params["a"])


def test_batches_are_taken_in_the_order_in_which_they_come():
    batches = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 64, 8)]
    by_list, by_generator = (
        ssa_jax.fit(Net(), source, test=(X, Y), epochs=2, **options)
        for source, options in (
            (batches, {}),
            ((b for _ in range(2) for b in batches), {"steps_per_epoch": 8}),
        )
    )
    assert by_list.config.batch_size == 8
    for a, b in zip(leaves(by_list.model), leaves(by_generator.model), strict=True):
        assert np.array_equal(a, b)
    with pytest.raises(DataError, match="needs steps_per_epoch"):
        ssa_jax.fit(Net(), iter(batches), test=(X, Y))
    with pytest.raises(DataError, match=r"ended after 0 of the 8"):
        ssa_jax.fit(Net(), iter(batches), test=(X, Y), epochs=2, steps_per_epoch=8)
    with pytest.raises(DataError, match="need examples to test on"):
        ssa_jax.fit(Net(), batches)
    with pytest.raises(DataError, match=r"batch 7 has a label 9, outside \[0, 2\)"):
        ssa_jax.fit(Net(), [*batches[:7], (X[:8], 0 * Y[:8] + 9)], test=(X, Y))


@pytest.mark.slow
def test_an_iterable_resumes_by_passing_over_what_was_done(tmp_path):
    batches = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 64, 8)]
    options = {"test": (X, Y), "epochs": 2}
    whole = ssa_jax.fit(Net(), batches, workdir=tmp_path / "a", **options)
    ssa_jax.fit(Net(), batches, workdir=tmp_path / "b", max_steps=11, **options)
    part = ssa_jax.fit(Net(), batches, workdir=tmp_path / "b", resume=True, **options)
    for a, b in zip(leaves(whole.model), leaves(part.model), strict=True):
        assert np.array_equal(a, b)


def test_a_folder_and_an_npz_are_the_arrays(tmp_path):
    for i, (image, label) in enumerate(zip(X, Y, strict=True)):
        folder = tmp_path / "images" / ("train" if i < 48 else "test") / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(folder / f"{i:02}.png")
    np.savez(tmp_path / "d.npz", x_train=X[:48], y_train=Y[:48], x_test=X[48:], y_test=Y[48:])
    from ssa_jax.data.files import from_folder, from_npz

    a, b = from_folder(tmp_path / "images"), from_npz(tmp_path / "d.npz")
    assert isinstance(a, Dataset)
    assert np.array_equal(np.sort(a.train_images.sum((1, 2, 3))), np.sort(X[:48].sum((1, 2, 3))))
    assert np.array_equal(b.test_images, X[48:])
    assert a.name.startswith("images_")
    assert from_folder(tmp_path / "images", size=2).image_shape == (2, 2, 1)
    run = ssa_jax.fit(Net(), tmp_path / "images", epochs=1, batch_size=8)
    assert run.config.dataset == f"given:{a.name}"
    (tmp_path / "images/train/class0/broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.png cannot be decoded"):
        from_folder(tmp_path / "images")
    np.savez(tmp_path / "e.npz", z=X)
    with pytest.raises(DataError, match="one of these is needed: x_train"):
        from_npz(tmp_path / "e.npz")


@pytest.mark.parametrize(
    ("data", "options", "error", "words"),
    [
        ((X, Y[:5]), {}, DataError, r"not as many of both"),
        ((X, Y * 0), {}, DataError, r"all labels are 0"),
        ((X, Y - 1), {}, DataError, r"has label -1, outside \[0, 1\)"),
        ((X * np.nan, Y), {}, DataError, r"example 0 has a value that is not finite"),
        ((X, Y + 0.5), {}, DataError, r"whole numbers; for a regression give its loss"),
        ((X, Y), {"batch_size": 65}, ConfigError, r"^batch_size must be at most 58"),
        ((X, Y), {"epochs": 0}, ConfigError, r"^epochs must be at least 1"),
        ((X, Y), {"loss": "cross"}, ConfigError, r"^loss must be one of cross_entropy"),
        ((X, Y), {"unit_size": "auto"}, ConfigError, r"^unit_size must be a whole number, got au"),
        ((X, Y), {"feedback_lookahead": 1.5}, ConfigError, r"lookahead must be a whole number, go"),
        ((X, Y), {"batch_size": True}, ConfigError, r"^batch_size must be a whole number, got Tr"),
        ((X, Y), {"learning_rate": "a"}, ConfigError, r"^learning_rate must be a number, got a"),
        ((X, Y), {"shard_params": 1}, ConfigError, r"^shard_params must be True or False, g"),
        (X, {}, DataError, r"targets are missing: give \(inputs, targets\)"),
        (
            (X, Y),
            {"model": ssa_jax.factorize(Net(), lowest=0.0), "rank_init": 0.3},
            ConfigError,
            r"^rank_init is not for a model on factors, which keeps its ranks",
        ),
        ((X, Y), {"learning_rates": 1}, TypeError, r"did you mean learning_rate\?"),
        ((X, Y), {"epoch": 3}, TypeError, r"fit has no setting epoch"),
        ((X, Y), {"dataset": "mnist"}, TypeError, r"no setting dataset; give the name as train"),
        ((X, Y), {"resume": True}, ConfigError, r"^resume needs the workdir of the run"),
        ((X, Y[:, None]), {}, DataError, r"must be labels \(n,\); give targets\[:, 0\]"),
        ((X, Y + 1), {}, ConfigError, r"gives 2 outputs, and the data have 3 classes, labels 0"),
        ((X, Y), {"outputs": 10}, ConfigError, r"gives 2 outputs, and the data have 10 classes"),
        (
            (X, np.ones((len(X), 3))),
            {"loss": "mean_squared_error"},
            ConfigError,
            r"gives 2 outputs for an example, and the data have 3 targets; mean_squared_error",
        ),
        ("digits", {"test": (X, Y)}, DataError, r"a name, a path or a Dataset has its own"),
        ("digits", {"crop": 2}, DataError, r"^crop is for arrays and files"),
        ("digits", {"flip": True}, DataError, r"^flip is for arrays and files"),
        ("digits", {"outputs": 3}, DataError, r"^outputs is for data that do not tell it"),
        ((X, Y), {"steps_per_epoch": 3}, DataError, r"^steps_per_epoch is for an iterable"),
        ([(X, Y)], {"size": 4, "steps_per_epoch": 1}, DataError, r"^size is for arrays and files"),
        ("no_such_data", {}, ConfigError, r"^dataset must be one of"),
        (
            (X, Y),
            {
                "model": nnx.Sequential(
                    lambda x: x.reshape(len(x), -1), nnx.Linear(16, 2, rngs=RNGS)
                ),
                "method": "bp",
            },
            ssa_jax.CutError,
            "has no cut",
        ),
        ((X, Y), {"model": 3}, TypeError, r"must be an nnx\.Module, a linen\.Module"),
    ],
)
def test_bad_input_is_told_in_one_line(data, options, error, words):
    options = dict(options)
    with pytest.raises(error, match=words) as caught:
        ssa_jax.fit(options.pop("model", None) or Net(), data, **{"batch_size": 8, **options})
    assert "\n" not in str(caught.value)
    assert "--" not in str(caught.value)


def test_a_folder_that_holds_a_run_is_told_without_flags(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(WorkdirError) as caught:
        ssa_jax.fit(Net(), (X, Y), workdir=tmp_path, **OPTIONS)
    assert "another workdir" in str(caught.value)
    assert "--" not in str(caught.value)
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"


def test_an_input_of_another_shape_is_refused_by_predict(run):
    with pytest.raises(ValueError, match=r"takes inputs \(n, 4, 4, 1\), got \(2, 5\)"):
        run.predict(np.ones((2, 5)))


@pytest.mark.parametrize("name", tasks.LOSSES)
def test_the_error_is_the_gradient_of_the_mean_loss(name):
    task = tasks.LOSSES[name]()
    outputs = jax.random.normal(jax.random.key(0), (5, 3))
    targets = {
        "cross_entropy": jnp.array([0, 1, 2, 2, 0]),
        "binary_cross_entropy": (outputs > 0.3).astype(int),
        "mean_squared_error": jnp.cos(outputs),
    }[name]
    value, error = tasks.output_error(task, outputs, targets)
    step = 1e-3 * jnp.cos(outputs)
    moved = tasks.mean_loss(task, outputs + step, targets)
    assert float(moved - value) == pytest.approx(float(jnp.vdot(error, step)), rel=0.02)
    encoded = task.encode(targets, outputs)
    assert encoded.shape == outputs.shape
    # Distributions and labels are the same targets.
    if task.classes:
        assert float(tasks.mean_loss(task, outputs, encoded)) == pytest.approx(float(value))


def test_a_scalar_loss_is_taken_example_by_example_and_another_shape_refused():
    outputs, targets = jnp.arange(6.0).reshape(3, 2), jnp.ones((3, 2))
    task = tasks.from_function(lambda y, t: jnp.square(y - t).mean())
    assert jnp.allclose(task.loss(outputs, targets), jnp.square(outputs - 1).mean(1))
    with pytest.raises(ValueError, match=r"got an array of shape \(3, 2\)"):
        tasks.from_function(lambda y, t: y - t).loss(outputs, targets)


def test_every_run_logs_to_a_wandb_run_of_its_own(tmp_path, monkeypatch):
    opened = []

    def init(**settings):
        rows = []
        opened.append((settings, rows))
        return types.SimpleNamespace(log=lambda row, step: rows.append((step, row)))

    module = types.ModuleType("wandb")
    module.init = init
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("a", "b"):
        write = callbacks.CALLBACKS["wandb"](tmp_path / name)
        write({"step": 3, "train_loss": 0.5, "angles": [1.0]})
    assert [settings["name"] for settings, _ in opened] == ["a", "b"]
    # By default wandb hands out the run that is open, whose steps may not go back.
    assert all(settings["reinit"] == "create_new" for settings, _ in opened)
    assert [rows for _, rows in opened] == [[(3, {"step": 3, "train_loss": 0.5})]] * 2


def test_targets_that_are_no_shares_of_classes_are_refused_with_the_loss_they_need():
    real = RNG.normal(size=(len(X), 2)).astype(np.float32)
    with pytest.raises(DataError, match=r"targets \(64, 2\) are shares .* mean_squared_error"):
        ssa_jax.fit(Net(), (X, real), **OPTIONS)
    batches = [(X[i : i + 8], real[i : i + 8]) for i in range(0, len(X), 8)]
    with pytest.raises(DataError, match=r"batch's targets \(8, 2\) are shares .* mean_squared"):
        ssa_jax.fit(Net(), batches, test=(X, real), epochs=1)
    shares = np.abs(real) / np.abs(real).sum(1, keepdims=True)
    assert ssa_jax.fit(Net(), (X, shares), **OPTIONS).history


def test_a_run_s_model_is_one_object_and_fine_tuning_goes_on_from_what_it_is():
    run = ssa_jax.fit(Net(), (X, Y), method="bp", **OPTIONS)
    assert run.model is run.model
    before = run.predict(X)
    head = next(n for n, layer in vars(run.model).items() if isinstance(layer, nnx.Linear)
                and layer.out_features == 2)  # fmt: skip
    inputs = getattr(run.model, head).in_features
    setattr(run.model, head, nnx.Linear(inputs, 3, rngs=nnx.Rngs(1)))
    tuned = ssa_jax.fit(run, (X, np.arange(len(X)) % 3), method="bp", **OPTIONS)
    assert tuned.predict(X).shape == (len(X), 3)
    assert np.array_equal(run.predict(X), before)


def test_a_plain_function_is_trained_dense_without_being_asked():
    params = {"a": 0.1 * jnp.ones((16, 8)), "b": 0.1 * jnp.ones((8, 2))}

    def apply(params, x):
        h = ssa_jax.cut(jnp.tanh(x.reshape(len(x), -1) @ params["a"]))
        return h @ params["b"]

    run = ssa_jax.fit(ssa_jax.Functional(apply, params), (X, Y), **OPTIONS)
    assert run.config.method == "ssa"
    assert not run.config.factorized
    assert run.predict(X).shape == (len(X), 2)


def test_evaluate_checks_what_it_is_given():
    run = ssa_jax.fit(Net(), (X, Y), method="bp", **OPTIONS)
    with pytest.raises(DataError, match=r"example 0 has label 5, outside \[0, 2\)"):
        run.evaluate((X, np.full(len(X), 5)))
    with pytest.raises(DataError, match="evaluate takes a pair"):
        run.evaluate("images")


def test_a_run_on_given_data_says_how_it_is_read(tmp_path):
    ssa_jax.fit("mlp", (X, Y), method="bp", workdir=tmp_path / "a", **OPTIONS)
    with pytest.raises(ConfigError, match="data that were given to fit; read it by load"):
        trained.restore(tmp_path / "a")
    (tmp_path / "a" / "data.json").unlink()
    with pytest.raises(
        WorkdirError, match=r"holds no run of ssa_jax\.fit, which leaves data\.json"
    ):
        ssa_jax.load(tmp_path / "a")


def test_the_line_of_an_epoch_names_the_ranks_of_many_layers_by_their_range():
    row = {
        "epoch": 1, "angles": [3.0, 0.0], "ranks": {f"layer{i}": i for i in range(4, 44)},
        "train_loss": 1.0, "test_accuracy": 0.5, "images_per_second": 9.0, "wall_s": 2.0,
    }  # fmt: skip
    assert "ranks 4 to 43  " in summary.line(row, 2)
    assert "  mean angle 3.0°  " in summary.line(row, 2)
    assert "ranks [4]  " in summary.line({**row, "ranks": {"a": 4}}, 2)


def test_pictures_of_many_layers_have_room_for_their_axes(tmp_path):
    rows = [
        {
            "epoch": e, "train_loss": 1.0, "test_loss": 1.0, "angles": [20.0] * 60,
            "signal_angles": [30.0] * 60, "ranks": {f"{i}/blocks/kernel": 8 + i for i in range(72)},
        }
        for e in (1, 2)
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = pictures.draw(rows, tmp_path)
    assert {f.name for f in files} >= {"angles.png", "ranks.png"}
