"""How `quarkrl train` ends: the table before/after, its files, and what a resumed run does again."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers.eight_letters import TOKENIZER
from helpers.tiny_models import make_home

from quarkrl.cli.before_after import evaluation_options
from quarkrl.cli.main import main
from quarkrl.cli.run_prompts import load_run_prompts
from quarkrl.cli.train_options import HELD_OUT, RunOptions, parse_train
from quarkrl.training.config import QuarkConfig

LETTERS = "abcdefgh"
PROMPTS = [f"{first} {second}" for first in LETTERS for second in LETTERS[:4]]  # 32
REWARD = """
calls = []

def few_a(completions, **_):
    calls.append(len(completions))
    return [-float(text.split().count("a")) for text in completions]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("home")
    options = {"reward": f"{directory}/rewards.py:few_a", "on_collapse": "warn", "num_iterations": 1}
    return make_home(directory, TOKENIZER, PROMPTS, REWARD, held_out=HELD_OUT, num_quantiles=2, **options)


@pytest.fixture(scope="module")
def run(home) -> tuple[Path, str]:
    assert main(["train", "--config", f"{home}/run.yaml", "--output_dir", f"{home}/run"]) == 0
    return home / "run"


def results_of(run: Path, name: str = "results") -> dict:
    return json.loads((run / f"{name}.json").read_text(encoding="utf-8"))


def test_a_run_leaves_its_figures_and_completions(run):
    results = results_of(run)
    assert [row["name"] for row in results["results"]] == ["reference", "best", "worst"]
    assert results["protocol"]["verdict"].startswith(("better", "worse", "no clear change"))
    table = pq.read_table(run / "results.parquet")
    assert len(table) == 3 * 6 * results["protocol"]["samples_per_prompt"]  # One in five of 32 prompts is held out.
    before = results_of(run, "baseline")["results"]
    assert before == results["results"][:1]


def test_held_out_prompts_are_not_trained_on(run, home):
    trained = {tuple(ids) for ids in pq.read_table(run / "pool" / "iteration-000000.parquet")["prompt_ids"].to_pylist()}
    held_out = {*pq.read_table(run / "results.parquet")["prompt"].to_pylist()}
    assert len(trained) == 26 and len(held_out) == 6
    assert not trained & {tuple(TOKENIZER(prompt)["input_ids"]) for prompt in held_out}


def test_a_run_that_is_resumed_measures_nothing_twice(run, capsys):
    times = {name: (run / name).stat().st_mtime_ns for name in ("baseline.json", "results.json")}
    capsys.readouterr()
    assert main(["train", "--resume", "--output_dir", str(run)]) == 0
    assert times == {name: (run / name).stat().st_mtime_ns for name in times}
    out = capsys.readouterr().out
    assert results_of(run)["protocol"]["verdict"] in out.replace("\n", " ")
    assert out.split()[:5] == ["before", "best", "quantile", "worst", "quantile"]


def test_evaluate_takes_the_held_out_prompts_of_the_run(run, home, capsys, tmp_path):
    command = ["evaluate", str(run), "--reward", f"{home}/rewards.py:few_a", "--samples", "1"]
    assert main([*command, "--output", str(tmp_path / "figures.json")]) == 0
    assert "prompts: 6 held-out prompts of the run. Set --prompts for others." in capsys.readouterr().err
    prompts = {*pq.read_table(tmp_path / "figures.parquet")["prompt"].to_pylist()}
    assert prompts == {*pq.read_table(run / "results.parquet")["prompt"].to_pylist()}


def test_figures_of_a_run_that_has_not_begun_are_measured_again(run, home):
    """They may be of another model."""
    (home / "again").mkdir()
    for name in ("baseline.json", "baseline.parquet"):
        (home / "again" / name).write_bytes((run / name).read_bytes())
    edited = results_of(home / "again", "baseline")
    edited["results"][0]["figures"]["reward"] = 5.0
    (home / "again" / "baseline.json").write_text(json.dumps(edited), encoding="utf-8")
    assert main(["train", "--config", f"{home}/run.yaml", "--output_dir", f"{home}/again"]) == 0
    first, second = (results_of(path)["results"][0]["figures"]["reward"] for path in (run, home / "again"))
    assert first == second


def test_a_run_from_before_the_option_resumes_with_all_of_its_prompts(tmp_path):
    (tmp_path / "config.yaml").write_text("model: builtin\nprompts: p.txt\nreward: [profanity]\n", encoding="utf-8")
    assert parse_train(["--resume", "--output_dir", str(tmp_path)]).run.held_out == 0
    assert parse_train(["--config", "tiny-toxicity", "--output_dir", str(tmp_path)]).run.held_out == HELD_OUT


def test_held_out_prompts_come_from_eval_prompts_or_the_builtin_ones(home):
    prompts = f"{home}/prompts.txt"
    loaded = load_run_prompts(RunOptions(prompts=prompts, eval_prompts=prompts, held_out=5), False)
    assert (len(loaded.training), len(loaded.evaluated), len(loaded.measured)) == (32, 32, 5)
    loaded = load_run_prompts(RunOptions(prompts="builtin", held_out=64), False)
    assert (len(loaded.training), loaded.evaluated, len(loaded.measured)) == (20000, None, 64)
    loaded = load_run_prompts(RunOptions(prompts=prompts, held_out=0), False)
    assert (len(loaded.training), loaded.measured) == (32, None)


def test_an_evaluation_is_cheap_against_its_run(tmp_path):
    config = QuarkConfig(output_dir=str(tmp_path))
    samples = [evaluation_options(config, explored, 64).samples for explored in (100, 20_000, 130_000)]
    assert samples == [2, 5, 8]
    assert evaluation_options(config, 100, 64, samples=25).samples == 25
