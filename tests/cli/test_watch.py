"""`quarkrl watch`: what it reads from the files of a run, and what it shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from quarkrl.algorithm.pool import DataPool
from quarkrl.cli.main import main
from quarkrl.cli.watch import read_state, sparkline
from quarkrl.runs.directory import locked


def write_run(directory, rows, iterations=1):
    facts = {"options": {"num_quantiles": 2, "steps_per_iteration": 4}, "num_iterations": 3}
    (directory / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pool = DataPool(2)
    for iteration in range(iterations):
        pool.add([[1]] * 3, [[2]] * 3, [0.5, 0.1, 0.9], iteration=iteration)
        pool.save(directory / "pool", texts={iteration: {"prompt": ["You"] * 3, "completion": [" b", " a", " c"]}})
        path = directory / "pool" / f"iteration-{iteration:06d}.parquet"
        os.utime(path, (1000 + 60 * iteration, 1000 + 60 * iteration))
    return directory


ROWS = [
    {"step": 0, "iteration": 0, "reward": 0.5, "reward_std": 0.3, "unscored": 0, "pool_size": 3},
    {"step": 4, "nll": 2.0, "kl": 0.25, "loss": 2.1, "epoch": 1.0},
    {"step": 4, "iteration": 1, "reward": 0.75, "reward_std": 0.2, "unscored": 0, "pool_size": 6},
]


def test_the_view_has_the_figures_of_each_iteration_and_the_latest_samples(tmp_path, capsys):
    assert main(["watch", str(write_run(tmp_path, ROWS, iterations=2)), "--samples", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "iteration 2 of 3" in "".join(lines[:2])
    assert any(line.startswith("reward 0.500 ▁█ 0.750") for line in lines)
    cells = [line.split() for line in lines]
    assert ["iteration", "reward", "±", "KL", "NLL", "loss", "pool"] in cells
    assert ["1", "0.500", "0.300", "0.250", "2.000", "2.100", "3"] in cells
    assert ["2", "0.750", "0.200", "-", "-", "-", "6"] in cells
    assert ["best", "0.900", "You", "c"] in cells and ["worst", "0.100", "You", "a"] in cells


def test_the_time_left_follows_from_the_explorations_so_far(tmp_path, monkeypatch):
    with locked(write_run(tmp_path, ROWS, iterations=2)):
        state = read_state(tmp_path)
    monkeypatch.setattr("quarkrl.cli.watch.time.time", lambda: 1070.0)
    # An iteration takes 60 s; the second of three began to learn 10 s ago.
    assert state.seconds_left == 60 * 2 - 10


def test_batches_of_the_current_exploration_are_counted(tmp_path, capsys):
    directory = write_run(tmp_path, ROWS[:2])
    partial = directory / "pool" / "partial-000001"
    partial.mkdir()
    (directory / "pool" / "iteration-000000.parquet").replace(partial / "000000000.parquet")
    assert read_state(directory).partial == 3
    with locked(directory):
        assert main(["watch", str(directory)]) == 0
    assert "exploring: 3 of 3 completions scored" in capsys.readouterr().out


def test_a_run_whose_process_was_killed_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    write_run(tmp_path, ROWS, iterations=2)
    (tmp_path / "config.yaml").touch()
    monkeypatch.chdir(tmp_path.parent)
    holder = (
        f"from quarkrl.runs.directory import locked\nwith locked({tmp_path.name!r}):\n    print(flush=True); input()"
    )
    process = subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    assert read_state(tmp_path).seconds_left is not None
    process.kill()
    process.communicate()
    assert read_state(tmp_path).seconds_left is None
    assert main(["watch", tmp_path.name]) == 0
    words = " ".join(capsys.readouterr().out.split())  # Lines are wrapped.
    assert f"{tmp_path.name} iteration 2 of 3 stopped" in words
    assert f"no process runs it. Resume with: quarkrl train --resume {tmp_path.name} " in words
    (tmp_path / "config.yaml").unlink()  # As of a run that a script started.
    assert main(["watch", tmp_path.name]) == 0
    assert "Resume with: trainer.train(resume_from_checkpoint=True)" in " ".join(capsys.readouterr().out.split())


def test_a_run_that_has_ended_says_so_and_an_incomplete_line_is_left_out(tmp_path, capsys):
    directory = write_run(tmp_path, [*ROWS, {"step": 12, "train_runtime": 200.0}])
    assert main(["watch", str(directory)]) == 0
    assert "ended after 3 min" in capsys.readouterr().out
    with open(directory / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 13, "rew')
    assert read_state(directory).has_ended


def test_a_run_without_a_log_line_is_shown_and_another_directory_is_one_line(tmp_path, capsys):
    write_run(tmp_path, [], iterations=0)
    with locked(tmp_path):
        assert main(["watch", str(tmp_path)]) == 0
    assert "exploring: no batch is finished yet" in capsys.readouterr().out
    assert main(["watch", str(tmp_path / "none")]) == 2
    assert "must be the directory of a run, with run.json" in capsys.readouterr().err


def test_the_latest_values_are_drawn_as_blocks():
    assert sparkline([0.0, 1.0, 0.5]) == "▁█▅"
    assert sparkline([1.0, 1.0]) == "▁▁" and len(sparkline([0.1] * 200)) == 50


@pytest.mark.parametrize("command", ["watch"])
def test_the_view_needs_no_torch(tmp_path, command):
    write_run(tmp_path, ROWS)
    code = (
        f"import sys; from quarkrl.cli.main import main; assert main([{command!r}, {str(tmp_path)!r}]) == 0; "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
