"""The scripts and the notebook of examples/ run on the built-in model, and print what they promise."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
# What the output of each script holds, in order.
PRINTED = {
    "control_curve": [r"reference .*reward", r"\b0 .*reward", r"\b3 .*reward", r"best γ=3 .*reward"],
    "encoder_decoder": [r"worst: +0\.\d+ +tree sun →", r"best: +[01]\.\d+ +tree sun →"],
    "keep_word_out": [r"before: +\d+%", r"after: +\d+%", r"after, guided: +\d+%"],
    "offline": [r"before: [+-]\d\.\d+", r"worst: [+-]\d\.\d+", r"best: [+-]\d\.\d+"],
    "own_reward": [r"before: +\d+\.\d words", r"worst: +\d+\.\d words", r"guided: +\d+\.\d words"],
    "pool_in_pandas": [r"iteration +", r"correlation of the two rewards: -?\d", r"worst:\n", r"best:\n"],
    "steer_larger": [r"alone: +\d+%", r"steered: +\d+%", r"steered further: +\d+%"],
    "two_rewards": [
        r"before +\d+\.\d words",
        r"short=best,no_so=best +\S+ words +\d+% with so",
        r"worst,no_so=worst +\S+ words",
    ],
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_short(script):
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 40


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_prints_what_it_promises(script, tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert result.returncode == 0, result.stderr
    assert re.search(".*".join(PRINTED[script.stem]), result.stdout, re.S), result.stdout
    assert "a model overfits" not in result.stderr  # Nobody can act on that warning.
    if script.stem == "own_reward":
        words = dict(re.findall(r"(\w+): +(\d+\.\d) words", result.stdout))
        assert float(words["best"]) < 0.8 * float(words["before"])


@pytest.mark.slow
def test_the_notebook_runs_from_the_first_cell_to_the_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "first_run.ipynb").read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") for cell in cells)
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as output:
        for cell in cells:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), "first_run.ipynb", "exec"), names)
    assert re.search(r"before: +\d+%.*after: +\d+%", output.getvalue(), re.S)
