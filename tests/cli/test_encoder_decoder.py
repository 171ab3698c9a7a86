"""The command with an encoder–decoder model: train, generate, evaluate."""

from __future__ import annotations

import json

import pytest
from helpers.tiny_models import make_home, tiny_encoder_decoder

from quarkrl.cli.main import main

REWARDS = """
def short(completions):
    return [-float(len(text.split())) for text in completions]
"""


@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_a_run_from_the_command_is_generated_from_and_measured(architecture, tmp_path, monkeypatch, capsys):
    model, tokenizer = tiny_encoder_decoder(architecture)
    home = make_home(tmp_path, tokenizer, ["a b", "c d", "e f g", "h"], REWARDS, model)
    config = (home / "run.yaml").read_text(encoding="utf-8")
    (home / "run.yaml").write_text(config.replace("num_quantiles: 2\n", ""), encoding="utf-8")  # By the first rewards.
    monkeypatch.chdir(home)
    train = ["train", "--config", "run.yaml", "--reward", "rewards.py:short", "--output_dir", "run"]
    assert main([*train, "--held_out", "2", "--samples_per_prompt", "4"]) == 0
    capsys.readouterr()
    assert main(["samples", "run"]) == 0  # A completion answers its prompt, and does not continue it.
    texts = [line.split("\t")[-1] for line in capsys.readouterr().out.splitlines()[1:]]
    assert texts and all(text.split(" → ")[0] in ("a b", "c d", "e f g", "h") for text in texts)
    assert main(["watch", "run", "--once"]) == 0
    assert " → " in capsys.readouterr().out
    assert main(["generate", "run/final", "--prompt", "a b", "--max_new_tokens", "4", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["prompt"] == "a b" and len(answer["completions"]) == 1
    measure = ["--prompts", "prompts.txt", "--reward", "rewards.py:short", "--samples", "2", "--max_new_tokens", "4"]
    assert main(["evaluate", "run/final", *measure, "--output", "results.json"]) == 0
    rows = json.loads((home / "results.json").read_text(encoding="utf-8"))["results"]
    assert {row["name"] for row in rows} >= {"reference", "best"}
    assert all(row["figures"]["perplexity"] > 1 for row in rows)
