"""Trackers of `transformers.Trainer`, run for real: they receive the figures of a run, and tables of completions."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys

import pytest
from helpers.runs import small_trainer

from quarkrl.cli.main import main
from quarkrl.cli.train_options import parse_train


@pytest.mark.slow
def test_tensorboard_receives_the_figures_of_a_run(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    small_trainer(tmp_path / "run", report_to=["tensorboard"]).train()
    (directory,) = {path.parent for path in (tmp_path / "events").rglob("events.*")}
    events = EventAccumulator(str(directory))
    events.Reload()
    assert {"train/reward", "train/kl", "train/loss"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("train/reward")) == 2  # One per iteration.


@pytest.mark.slow
def test_trackio_receives_the_figures_and_the_completions_of_a_run(tmp_path):
    pytest.importorskip("trackio")
    options = "--prompts_per_iteration 40 --num_iterations 1 --steps_per_iteration 2 --logging_steps 1 --project quark"
    command = [sys.executable, "-m", "quarkrl", "train", "--config", "tiny-toxicity", *options.split()]
    command += ["--report_to", "trackio", "--trackio_static_space_id", "false", "--output_dir", str(tmp_path / "run")]
    subprocess.run(command, check=True, env={**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")})
    (database,) = (tmp_path / "trackio").glob("quark*.db")
    with sqlite3.connect(database) as connection:
        rows = " ".join(str(row) for row in connection.execute("SELECT metrics FROM metrics"))
    assert "train/reward" in rows and "completions" in rows


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        ("wandbb", "report_to wandbb: must be"),
        ("comet_ml", "report_to comet_ml: must be installed. Run `pip install comet_ml`."),
    ],
)
def test_a_tracker_that_is_unknown_or_not_installed_is_one_line(tmp_path, capsys, tracker, message):
    arguments = ("--model", "builtin", "--prompts", "builtin", "--reward", "brevity", "--output_dir", str(tmp_path))
    assert main(["train", *arguments, "--report_to", tracker]) == 2
    assert message in capsys.readouterr().err


def test_several_trackers_are_listed_behind_one_option(tmp_path):
    required = ["--model", "builtin", "--prompts", "builtin", "--reward", "brevity", "--output_dir", str(tmp_path)]
    (tmp_path / "run.yaml").write_text("report_to: [tensorboard, trackio]\n", encoding="utf-8")
    for arguments in (["--report_to", "tensorboard", "trackio"], ["--config", str(tmp_path / "run.yaml")]):
        assert parse_train([*required, *arguments]).config.report_to == ["tensorboard", "trackio"]
    assert parse_train([*required, "--report_to", "tensorboard"]).config.report_to == ["tensorboard"]
    assert parse_train(required).config.report_to == []
