"""`report_to`: each tracker gets every logged metric and the plots of the card."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from tests.support.tiny import Rows

PICTURES = ("training", "gradient_cosines")


@pytest.fixture
def trained(make_trainer, sources, tmp_path, monkeypatch) -> Any:
    """`trained(tracker)` trains a few steps with a tracker, and draws the same plots into `out`."""
    monkeypatch.chdir(tmp_path)
    # Other settings of the tracker in the environment are removed.
    for name in ("TENSORBOARD_LOGGING_DIR", "WANDB_PROJECT", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(name, raising=False)

    def trained(tracker: str, **config: Any) -> Any:
        steps = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "gradient_cosine_steps": 2}
        held_out = {"text": Rows(8, 0), "law": Rows(8, 5)}
        trainer = make_trainer(sources, report_to=tracker, trainer_kwargs={"eval_dataset": held_out}, **steps | config)
        trainer.train()
        return trainer

    return trained


def metrics(trainer: Any) -> dict[str, float]:
    """The last value of each metric under the names of transformers' integrations, without totals of the run."""
    last = {name: value for entry in trainer.state.log_history[:-1] for name, value in entry.items() if name != "step"}
    expected = {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in last.items()
    }
    ours = ("train/path_cosine", "train/inner_lr", "train/loss/code", "train/cosine/text/code", "eval/ood_loss")
    assert expected.keys() >= set(ours)
    return expected


def test_tensorboard_has_all_metrics_and_plots(trained, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = trained("tensorboard")
    events = EventAccumulator(str(next((tmp_path / "out").rglob("events*")).parent)).Reload()
    last = {tag: events.Scalars(tag)[-1] for tag in events.Tags()["scalars"]}
    expected = metrics(trainer)
    assert {tag: last[tag].value for tag in expected} == pytest.approx(expected)
    cosines = [entry["path_cosine"] for entry in trainer.state.log_history if "path_cosine" in entry]
    assert [scalar.value for scalar in events.Scalars("train/path_cosine")] == pytest.approx(cosines)
    trainer.write_card(tmp_path / "card")
    for name in PICTURES:
        (image,) = events.Images(f"plots/{name}")
        assert image.step == 4
        (tmp_path / "sent.png").write_bytes(image.encoded_image_string)
        sent, drawn = (imread(path)[..., :3] for path in (tmp_path / "sent.png", tmp_path / "card" / f"{name}.png"))
        assert np.array_equal(sent, drawn), name


@pytest.mark.slow
def test_wandb_has_all_metrics_and_plots(trained, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    try:
        trainer = trained("wandb")
        expected = metrics(trainer)
        summary = {name: wandb.run.summary.get(name) for name in expected}
        folder = Path(wandb.run.dir)
    finally:
        wandb.finish()
    assert summary == pytest.approx(expected)
    trainer.write_card(tmp_path / "card")
    for name in PICTURES:
        (sent,) = folder.glob(f"media/images/plots/{name}_*.png")
        assert sent.read_bytes() == (tmp_path / "card" / f"{name}.png").read_bytes()


@pytest.mark.slow
def test_trackio_has_all_metrics_and_plots(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # read at import
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage
    from trackio.utils import TRACKIO_DIR

    trainer = trained("trackio", project="tracked", run_name=tmp_path.name)
    logs = SQLiteStorage.get_logs("tracked", tmp_path.name)
    last = {name: value for entry in logs for name, value in entry.items()}
    expected = metrics(trainer)
    assert {name: last[name] for name in expected} == pytest.approx(expected)
    trainer.write_card(tmp_path / "card")
    for name in PICTURES:
        sent = Path(TRACKIO_DIR, "media", last[f"plots/{name}"]["file_path"])
        assert sent.read_bytes() == (tmp_path / "card" / f"{name}.png").read_bytes()


def test_a_tracker_that_fails_costs_no_run(trained, monkeypatch, caplog):
    pytest.importorskip("tensorboard")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_image", fail)
    with caplog.at_level(logging.WARNING):
        assert trained("tensorboard").state.global_step == 4
    assert "could not be sent to the experiment tracker: the disk is full" in caplog.text


def test_nothing_is_drawn_without_a_tracker(trained, monkeypatch):
    monkeypatch.setattr("hf_nexus.plots.run.plot_run", lambda *_: pytest.fail("drawn without a tracker"))
    trained("none")
