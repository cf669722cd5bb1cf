"""Events for TensorBoard: every number, the heat maps and spectra, also after a rollback."""

import importlib.util
import struct

import numpy as np
import pytest

from ssa_jax.errors import ConfigError
from ssa_jax.reporting import tensorboard
from ssa_jax.runs import run
from ssa_jax.runs.config import Config


def row(epoch, **more):
    return {
        "epoch": epoch, "train_loss": 2.0 - 0.1 * epoch, "test_accuracy": 0.1 * epoch,
        "angles": [30.0, 60.0 - epoch, 0.0], "subspace_angles": [5.0, 6.0, None],
        "local_task": [1.0, 2.0, 3.0], "ranks": {"0/kernel": 32 - epoch, "1/kernel": 8},
        **more,
    }  # fmt: skip


def spectra(epoch):
    return {"0/kernel": np.array([3.0, -2.0, 1.0, 0.0]) / epoch, "1/kernel": np.zeros(4)}


def events(folder):
    """(step, value) of every event of every file, from what TensorBoard itself reads."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def values(folder, kind):
    """Tag -> step -> value of a kind, without what a later event takes back."""
    found = {}
    for event in events(folder):
        if event.HasField("session_log"):
            for steps in found.values():
                for step in [s for s in steps if s >= event.step]:
                    del steps[step]
        for value in event.summary.value:
            if value.HasField(kind):
                found.setdefault(value.tag, {})[event.step] = getattr(value, kind)
    return found


def test_every_number_of_a_row_is_a_scalar():
    told = tensorboard.scalars(row(3, drift=1e-6))
    assert told["loss/train"] == pytest.approx(1.7)
    assert told["angles/unit_2"] == 57.0
    assert told["rank/unit_1/kernel"] == 29
    assert told["run/drift"] == 1e-6
    assert told["local_task/unit_3"] == 3.0
    # The unit without factors has no subspaces.
    assert "subspace_angles/unit_3" not in told
    assert "subspace_angles/unit_2" in told


def test_events_hold_scalars_maps_and_spectra(tmp_path):
    pytest.importorskip("tensorboardX")
    board = tensorboard.Board(tmp_path / "board")
    rows = [row(epoch) for epoch in (1, 2)]
    for i in (1, 2):
        board.write(rows[:i], spectra(i))
    board.close()
    losses = values(tmp_path / "board", "simple_value")["loss/train"]
    assert losses == pytest.approx({1: 1.9, 2: 1.8})
    histograms = values(tmp_path / "board", "histo")
    # Lengths, without what was truncated; nothing of a layer that has nothing left.
    assert list(histograms) == ["spectrum/unit_1/kernel"]
    spectrum = histograms["spectrum/unit_1/kernel"][2]
    assert (spectrum.num, spectrum.min, spectrum.max) == (3, 0.5, 1.5)
    pictures = values(tmp_path / "board", "image")
    assert set(pictures) == {"maps/angles", "maps/ranks"}
    assert set(pictures["maps/angles"]) == {1, 2}
    assert pictures["maps/ranks"][2].width > 500


def test_epochs_after_a_rollback_replace_those_before(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    monkeypatch.setattr(tensorboard, "_pictures", lambda rows: {})
    board = tensorboard.Board(tmp_path / "board")
    for epoch in (1, 2, 3):
        board.write([row(epoch)], {})
    board.write([row(2, train_loss=7.0)], {})
    board.close()
    assert values(tmp_path / "board", "simple_value")["loss/train"] == pytest.approx(
        {1: 1.9, 2: 7.0}
    )
    # A resumed run begins with another writer.
    board = tensorboard.Board(tmp_path / "board")
    board.write([row(2, train_loss=8.0)], {})
    board.close()
    assert values(tmp_path / "board", "simple_value")["loss/train"] == pytest.approx(
        {1: 1.9, 2: 8.0}
    )


def test_without_tensorboardx_the_flag_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboardX" else there(name)
    )
    config = Config(dataset="digits", model="mlp", tensorboard=True, workdir=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"needs tensorboardX: pip install 'ssa_jax\[tensorbo"):
        run.run(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_run_and_its_resumption_write_events(tmp_path):
    pytest.importorskip("tensorboardX")
    config = Config(
        dataset="digits", model="mlp", epochs=3, max_steps=11, batch_size=128, tensorboard=True,
        workdir=str(tmp_path / "run"),
    )  # fmt: skip
    run.run(config)
    run.run(Config(**{**vars(config), "max_steps": 0, "resume": True}))
    found = values(tmp_path / "run/tensorboard", "simple_value")
    assert set(found["accuracy/test"]) == {1, 2, 3}
    assert {"rank/unit_1/map", "angles/unit_1", "run/drift"} <= set(found)
    assert "spectrum/unit_1/map" in values(tmp_path / "run/tensorboard", "histo")
