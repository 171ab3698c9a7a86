"""The presets: all of them can be read, and the tiny ones reach their purpose with half or two thirds of their run."""

import json
import os

import pytest

from quarkrl.cli.main import main
from quarkrl.cli.train_options import parse_train, preset_names

ITERATIONS = "4"  # Of six or eight. docs/results.md has the figures of whole runs.
# Preset → how to measure it, and by how much the best token must be better than reference and worst token.
TINY = {
    "tiny-sentiment-positive": (["--reward", "vader"], 0.1),
    "tiny-sentiment-negative": (["--reward", "vader-negative"], 0.1),
    "tiny-repetition": (
        ["--reward", "repetition", "--greedy", "--min_new_tokens", "64", "--max_new_tokens", "64"],
        0.05,
    ),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a preset's run, made when it is first asked for."""
    runs = tmp_path_factory.mktemp("runs")

    def run(preset):
        if not (runs / preset / "final").exists():
            command = ["train", "--config", preset, "--output_dir", str(runs / preset), "--disable_tqdm", "true"]
            assert main([*command, "--num_iterations", ITERATIONS]) == 0
        return runs / preset / "final"

    return run


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
@pytest.mark.parametrize("preset", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in TINY])
def test_a_tiny_preset_steers_both_ways(preset, finished):
    measure, gain = TINY[preset]
    rows = rewards_of(finished(preset), *measure)
    assert rows["best"] > rows["reference"] + gain, rows
    assert rows["worst"] < rows["best"] - gain, rows


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.xdist_group("tiny-repetition")
def test_the_repetition_twin_holds_at_twice_its_length_and_guided(finished):
    greedy = ["--reward", "repetition", "--greedy", "--min_new_tokens", "96", "--max_new_tokens", "96"]
    rows = rewards_of(finished("tiny-repetition"), *greedy, "--guidance_scales", "1", "2")
    assert rows["best"] > max(rows["reference"], rows["worst"]) + 0.03, rows
    assert rows["best γ=2"] > max(rows["reference"], rows["worst"]) + 0.05, rows
