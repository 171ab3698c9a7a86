"""`quarkrl samples`: which samples are printed, in which order, and mistakes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from quarkrl.algorithm.pool import DataPool
from quarkrl.cli.main import main

TEXTS = {0.1: " you fool", 0.3: " you\nidiot", 0.6: " sir", 0.9: " my dear friend"}
CHAT = '[{"role": "user", "content": "Hi!"}]'


@pytest.fixture
def run(tmp_path):
    """A run of two iterations, with K = 2: quantile 1 starts at 0.6."""
    (tmp_path / "run.json").write_text(json.dumps({"options": {"num_quantiles": 2}}), encoding="utf-8")
    pool = DataPool(2)
    for iteration, rewards in enumerate([[0.9, 0.1], [0.3, 0.6]]):
        pool.add([[1]] * 2, [[2]] * 2, rewards, iteration=iteration)
        columns = {"prompt": ["Hello", CHAT], "completion": [TEXTS[reward] for reward in rewards]}
        pool.save(tmp_path / "pool", texts={iteration: columns})
    return str(tmp_path)


def rewards_of(capsys, *arguments: str) -> list[float]:
    assert main(["samples", *arguments, "--json"]) == 0
    return [json.loads(line)["reward"] for line in capsys.readouterr().out.splitlines()]


def test_a_sample_is_a_line_with_reward_quantile_iteration_and_text(run, capsys):
    assert main(["samples", run]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "reward\tQ\titeration\tprompt and completion",
        "0.100\t0\t1\tHi! → you fool",
        "0.300\t0\t2\tHello you↵idiot",
        "0.600\t1\t2\tHi! → sir",
        "0.900\t1\t1\tHello my dear friend",
    ]
    assert err == "4 of 4 matching samples; the pool has 4\n"


def test_samples_are_selected_by_iteration_quantile_and_text(run, capsys):
    assert rewards_of(capsys, run, "--iteration", "-1") == [0.3, 0.6]
    assert rewards_of(capsys, run, "--quantile", "best") == [0.6, 0.9]
    assert rewards_of(capsys, run, "--quantile", "0", "--iteration", "1") == [0.1]
    assert rewards_of(capsys, run, "--grep", "FOOL|idiot") == [0.1, 0.3]
    assert rewards_of(capsys, run, "--grep", r"you(?= fool)") == [0.1]  # RE2 has no look-ahead.


def test_samples_are_sorted_and_limited(run, capsys):
    assert rewards_of(capsys, run, "--limit", "2") == [0.1, 0.9]  # Spread from worst to best.
    assert rewards_of(capsys, run, "--sort", "reward", "--limit", "2") == [0.9, 0.6]
    assert rewards_of(capsys, run, "--sort", "reward", "--reverse", "--limit", "1") == [0.1]
    assert rewards_of(capsys, run, "--sort", "length", "--limit", "1") == [0.9]
    assert rewards_of(capsys, run, "--sort", "iteration", "--limit", "2") == [0.3, 0.6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--iteration", "7"], "iteration 7: must be from 1 to 2, or -1 for the last."),
        (["--quantile", "top"], "quantile 'top': must be best, worst, or one with samples: 0, "),
        (["--quantile", "9"], "quantile '9': must be best, worst, or one with samples: 0, "),
        (["--grep", "("], "grep '(': must be a regular expression"),
        (["--sort", "rewards"], "sort 'rewards': must be spread, reward, length or iteration. Did you mean 'reward'?"),
    ],
)
def test_a_mistake_is_one_line(run, capsys, arguments, message):
    assert main(["samples", run, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_directory_that_is_no_run_is_one_line(tmp_path, capsys):
    assert main(["samples", str(tmp_path)]) == 2
    assert "must be the directory of a run, with run.json" in capsys.readouterr().err


def test_the_samples_of_a_run_are_read_without_torch(run):
    code = (
        "import sys; from quarkrl.cli.main import main; "
        f"assert main(['samples', {run!r}]) == 0; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
