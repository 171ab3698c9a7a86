"""The presets: all of them can be read, and the tiny ones reach their purpose with half or two thirds of their run."""

import json
import os

import pytest

from quarkrl.cli.main import main
from quarkrl.cli.train_options import parse_train, preset_names

ITERATIONS = "4"  # Of six or eight. docs/results-builtin.md has the figures of whole runs.
REPETITION = ["--reward", "repetition", "--greedy"]
# Preset → measurements: their options, and by how much the best token must be better than reference and worst token.
TINY = {
    "tiny-sentiment-positive": [(["--reward", "vader"], 0.1)],
    "tiny-sentiment-negative": [(["--reward", "vader-negative"], 0.1)],
    "tiny-repetition": [
        ([*REPETITION, "--min_new_tokens", "64", "--max_new_tokens", "64"], 0.05),
        ([*REPETITION, "--min_new_tokens", "96", "--max_new_tokens", "96", "--guidance_scales", "1", "2"], 0.03),
    ],
}


def rewards_of(final, *measure):
    """The mean reward of each row of an evaluation."""
    results = final.parent / "results.json"
    command = ["evaluate", str(final), "--prompts", "builtin", "--limit", "100", "--samples", "5"]
    assert main([*command, *measure, "--output", str(results)]) == 0
    return {row["name"]: row["figures"]["reward"] for row in json.loads(results.read_text())["results"]}


def test_every_preset_is_read_and_names_what_it_needs():
    assert {"toxicity", "sentiment-positive", "sentiment-negative", "repetition"} <= set(preset_names())
    for name in preset_names():
        run, config, *_ = parse_train(["--config", name])
        assert run.model and run.prompts and run.reward and run.defaults == "paper", name
        assert config.output_dir == os.path.abspath(f"runs/{name}")


def test_every_task_has_a_tiny_twin():
    names = set(preset_names())
    # The built-in model does not read chats.
    assert {f"tiny-{name}" for name in names if not name.startswith(("tiny-", "chat-"))} <= names


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("preset", TINY)
def test_a_tiny_preset_steers_both_ways(preset, tmp_path):
    command = ["train", "--config", preset, "--output_dir", str(tmp_path), "--disable_tqdm", "true"]
    assert main([*command, "--num_iterations", ITERATIONS]) == 0
    for measure, gain in TINY[preset]:
        rows = rewards_of(tmp_path / "final", *measure)
        assert rows["best"] > rows["reference"] + gain, (measure, rows)
        assert rows["worst"] < rows["best"] - gain, (measure, rows)
        # Guidance goes further, at twice the length of the training too.
        assert rows.get("best γ=2", 1) > max(rows["reference"], rows["worst"]) + 0.05, (measure, rows)
