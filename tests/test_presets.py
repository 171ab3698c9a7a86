"""The presets: all of them can be read, and the tiny ones do what they are for, run whole."""

import json

import pytest

from quarkrl.cli import main
from quarkrl.options import parse_train, preset_names

GREEDY = ["--greedy", "--min_new_tokens", "96", "--max_new_tokens", "96", "--guidance_scales", "4"]
# Preset → how to measure it, and the row that must be better than reference and worst token by so much.
TINY = {
    "tiny-sentiment-positive": (["--reward", "vader"], "best", 0.1),
    "tiny-sentiment-negative": (["--reward", "vader-negative"], "best", 0.1),
    "tiny-repetition": (["--reward", "repetition", *GREEDY], "best γ=4", 0.05),
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
@pytest.mark.parametrize("preset", TINY)
def test_a_tiny_preset_steers_both_ways(preset, tmp_path, capsys):
    measure, steered, gain = TINY[preset]
    run, results = tmp_path / "run", tmp_path / "results.json"
    assert main(["train", "--config", preset, "--output_dir", str(run), "--disable_tqdm", "true"]) == 0
    command = ["evaluate", str(run / "final"), "--prompts", "builtin", "--limit", "100", "--samples", "5"]
    assert main([*command, *measure, "--output", str(results)]) == 0
    rows = {row["name"]: row["figures"]["reward"] for row in json.loads(results.read_text())["results"]}
    assert rows["best"] > rows["reference"], rows
    assert rows[steered] > rows["reference"] + gain, rows
    assert rows[steered] > rows["worst"] + gain, rows
