"""The presets: all of them can be read, and the tiny ones do what they are for, run whole."""

import json

import pytest

from quarkrl.cli import main
from quarkrl.options import parse_train, preset_names

# Preset → how to measure it, and the row that must be better than the reference by so much.
TINY = {
    "tiny-sentiment-positive": (["--reward", "vader"], 0.1),
    "tiny-sentiment-negative": (["--reward", "vader-negative"], 0.1),
    "tiny-repetition": (
        ["--reward", "repetition", "--greedy", "--min_new_tokens", "64", "--max_new_tokens", "64"],
        0.01,
    ),
}


def test_every_preset_is_read_and_names_what_it_needs():
    assert {"toxicity", "sentiment-positive", "sentiment-negative", "repetition"} <= set(preset_names())
    for name in preset_names():
        run, config, _ = parse_train(["--config", name])
        assert run.model and run.prompts and run.reward, name
        assert config.output_dir == f"runs/{name}"


def test_every_task_has_a_tiny_twin():
    names = set(preset_names())
    assert {f"tiny-{name}" for name in names if not name.startswith("tiny-")} <= names


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "preset",
    [
        "tiny-sentiment-positive",
        "tiny-sentiment-negative",
        # Strict, so that the mending of the preset shows.
        pytest.param(
            "tiny-repetition",
            marks=pytest.mark.xfail(strict=True, reason="best 0.519, worst 0.522: the preset is at fault"),
        ),
    ],
)
def test_a_tiny_preset_steers_both_ways(preset, tmp_path, capsys):
    measure, gain = TINY[preset]
    run, results = tmp_path / "run", tmp_path / "results.json"
    assert main(["train", "--config", preset, "--output_dir", str(run), "--disable_tqdm", "true"]) == 0
    command = ["evaluate", str(run / "final"), "--prompts", "builtin", "--limit", "100", "--samples", "5"]
    assert main([*command, *measure, "--output", str(results)]) == 0
    rows = {row["name"]: row["figures"]["reward"] for row in json.loads(results.read_text())["results"]}
    assert rows["best"] > rows["reference"] + gain, rows
    assert rows["worst"] < rows["best"] - gain, rows
