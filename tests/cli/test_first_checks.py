"""Mistakes that show before torch and transformers are imported, and their remedies."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields

import pytest
from transformers import TrainingArguments

from quarkrl.cli.inputs import check_model
from quarkrl.cli.main import main
from quarkrl.cli.train_checks import inherited_options
from quarkrl.errors import UserError
from quarkrl.rewards.recorded import specs_of
from quarkrl.runs.directory import locked

TRAIN = ["train", "--model", "builtin", "--prompts", "builtin", "--output_dir", "new"]
REWARDS = "def few_e(completions, **_):\n    return [-text.count('e') for text in completions]\n"
MISTAKES = {
    "unknown option --kl_coeff. Did you mean '--kl_coef'?": [*TRAIN, "--kl_coeff", "1"],
    "logging_steps 'often': must be a number": [*TRAIN, "--logging_steps", "often"],
    "num_quantiles 1: must be at least 2": [*TRAIN, "--num_quantiles", "1"],
    "none.txt: no such file": [*TRAIN, "--prompts", "none.txt", "--reward", "vader"],
    "reward is missing. Set --reward to brevity, judge, perspective, profanity": TRAIN,
    "Did you mean 'profanity'?": [*TRAIN, "--reward", "profanty"],
    "Did you mean 'mine.py:few_e'?": [*TRAIN, "--reward", "few_e"],
    "mine.py has no 'few'. Did you mean 'few_e'?": [*TRAIN, "--reward", "mine.py:few"],
    "output_dir 'none': must be the directory of a run to resume, and there": [
        "train",
        "--resume",
        "--output_dir=none",
    ],
    "model './none': must be an existing directory or file, builtin, or": ["generate", "./none", "--prompt", "a"],
    "prompts is missing, and builtin is of no run. Set --prompts to": ["evaluate", "builtin", "--reward", "vader"],
    "reward is missing, and the model's quark.json names none. Set --reward to": [
        "evaluate",
        "builtin",
        "--prompts=builtin",
    ],
    "corpus.txt: no such file": ["evaluate", "builtin", "--prompts=builtin", "--reward=vader", "--corpus=corpus.txt"],
    "reward 'vadr': must be a known name": ["words", "builtin", "--prompts", "builtin", "--reward", "vadr"],
    "run 'none': must be the directory of a run": ["report", "none"],
    "file is missing. Write it behind quarkrl score (texts: ": ["score", "--reward", "vader"],
    "limit: must have a value. Write it behind --limit": ["score", "a.txt", "--reward", "vader", "--limit"],
    "'b.txt': must be the value of an option": ["score", "a.txt", "b.txt", "--reward", "vader"],
    "unknown option --prompt. Did you mean '--prompts'?": ["evaluate", "builtin", "--prompt", "a"],
}
PROGRAM = """
import json, sys
from quarkrl.cli.main import main
for arguments in json.load(sys.stdin):
    assert main(arguments) == 2, arguments
    slow = {"torch", "transformers", "datasets"} & set(sys.modules)
    assert not slow, (arguments, slow)
"""


def test_mistakes_show_before_torch_is_imported_and_leave_nothing(tmp_path):
    (tmp_path / "mine.py").write_text(REWARDS, encoding="utf-8")
    command = [sys.executable, "-c", PROGRAM]
    text = json.dumps(list(MISTAKES.values()))
    done = subprocess.run(command, cwd=tmp_path, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line, message in zip(done.stderr.splitlines(), MISTAKES, strict=True):
        assert line.startswith("error: ") and message in line
    assert {path.name for path in tmp_path.iterdir()} <= {"mine.py", "__pycache__"}


def test_the_inherited_options_are_those_of_training_arguments():
    assert inherited_options().keys() == {field.name for field in fields(TrainingArguments)}


def test_a_model_that_may_be_on_the_hub_is_not_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    for name in ("gpt2", "openai-community/gpt2", "builtin", "runs/mine"):
        check_model(name)
    with pytest.raises(UserError, match=r"model 'runs/mein': must be an existing .* Did you mean 'runs/mine'\?"):
        check_model("runs/mein")


@pytest.mark.parametrize(
    ("module", "form"), [("rewards_0123456789ab", "rewards.py:few_e"), ("package.rewards", "package.rewards:few_e")]
)
def test_a_recorded_function_is_named_as_the_option_names_it(module, form):
    with pytest.raises(UserError, match=rf"must be named again, .* Set --reward {form}\."):
        specs_of([{"name": "few_e", "module": module, "qualname": "few_e"}])


def test_presets_are_commands_to_paste(capsys):
    assert main(["presets"]) == 0
    assert "quarkrl train --config tiny-toxicity\n    Toxicity unlearning" in capsys.readouterr().out


def test_a_run_that_fails_before_its_first_sample_leaves_nothing(tmp_path):
    directory = tmp_path / "runs" / "new"
    with pytest.raises(UserError), locked(directory):
        (directory / "run.json").write_text("{}", encoding="utf-8")
        (directory / "pool").mkdir()
        raise UserError("no such label")
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UserError), locked(directory):
        (directory / "baseline.json").write_text("{}", encoding="utf-8")
        raise UserError("no such label")
    with pytest.raises(UserError), locked(directory):  # Of an earlier command: nothing is removed.
        raise UserError("no such label")
    assert (directory / "baseline.json").exists()
