"""What a run asks of its rewards before it begins."""

from __future__ import annotations

import pytest
from helpers.tiny_models import make_home, tiny_tokenizer

from quarkrl.cli.main import main

WORDS = [*"abcdefgh"]
REWARDS = """
from pathlib import Path

LOG = Path(__file__).with_name("calls")

def score(completions):
    with LOG.open("a") as log:
        log.write(f"{len(completions)}\\n")
    return [float(len(text) > 5) for text in completions]

async def asks(completions):
    return score(completions)
"""


@pytest.fixture
def home(tmp_path):
    home = make_home(tmp_path, tiny_tokenizer(words=WORDS), WORDS, REWARDS)
    config = (home / "run.yaml").read_text(encoding="utf-8")
    (home / "run.yaml").write_text(config.replace("num_quantiles: 2\n", ""), encoding="utf-8")
    return home


def plan_of(home, capsys, reward, *options):
    """The plan of a run, and how many completions the reward has scored for it."""
    run = [
        "train",
        "--config",
        str(home / "run.yaml"),
        "--output_dir",
        str(home / "run"),
        "--dry_run",
        "--disable_tqdm",
        "false",
    ]
    assert main([*run, "--reward", f"{home / 'rewards.py'}:{reward}", *options]) == 0
    calls = home / "calls"
    return capsys.readouterr().err, sum(map(int, calls.read_text().split())) if calls.exists() else 0


def test_first_rewards_decide_the_number_of_quantiles(home, capsys):
    said, scored = plan_of(home, capsys, "score")
    assert scored == 256
    assert "so the run has 2 quantiles" in said


def test_an_async_reward_is_not_called_for_the_plan(home, capsys):
    """It asks a server, which may cost money."""
    said, scored = plan_of(home, capsys, "asks")
    assert scored == 0
    assert "first samples" not in said


def test_no_reward_is_called_for_a_plan_that_does_not_depend_on_it(home, capsys):
    _, scored = plan_of(home, capsys, "score", "--num_quantiles", "2", "--samples_per_prompt", "1")
    assert scored == 0
