"""The ablations of the method: the matrix names what exists, and each variant changes what is learned."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "proof"))

from ablations_page import write
from page import points
from run import HERE, ROOT, flags

from quarkrl.cli.train_options import parse_train

MATRIX = yaml.safe_load((HERE / "ablations.yaml").read_text(encoding="utf-8"))
VARIANTS = sorted(method["variant"] for method in MATRIX["methods"].values() if "variant" in method)
SHORT = ["--model", "builtin", "--prompts", "builtin", "--reward", "profanity", "--held_out", "0", "--seed", "0"]
SHORT += ["--num_iterations", "6", "--prompts_per_iteration", "64", "--samples_per_prompt", "2", "--num_quantiles", "2"]
SHORT += ["--steps_per_iteration", "2", "--per_device_train_batch_size", "32", "--learning_rate", "1e-3"]
SHORT += ["--conditioning", "tokens", "--save_strategy", "no", "--bf16", "false", "--on_collapse", "warn"]


@pytest.mark.parametrize("name", MATRIX["methods"])
def test_the_options_of_a_variant_are_those_of_the_command_and_score_as_much(name):
    options = MATRIX["methods"][name]["options"]
    config = parse_train([*SHORT[:6], "--output_dir", "unused", *flags(options)]).config
    scored = config.num_iterations * config.prompts_per_iteration * config.samples_per_prompt
    assert scored == MATRIX["tasks"]["ablations-6m"]["scored"]


def test_the_page_has_a_section_of_each_group_that_has_run(tmp_path):
    """The figures are those of the proof, under the names of three variants."""
    records = ROOT / "benchmarks" / "results" / "proof" / "toxicity-6m"
    results = tmp_path / "results" / "ablations-6m"
    results.mkdir(parents=True)
    for method, record in {"base": "base", "quark": "grpo", "beta-0": "sft", "K-2": "ppo"}.items():
        (found,) = (json.loads(file.read_text(encoding="utf-8")) for file in records.glob(f"{record}-*.json"))
        found |= {"method": method, "settings": {}}
        (results / f"{method}.json").write_text(json.dumps(found), encoding="utf-8")
    text = write(MATRIX, tmp_path / "results", tmp_path).read_text(encoding="utf-8")
    assert re.findall("^## (.*)", text, re.MULTILINE) == ["Weight of the KL term", "Number of quantiles"]
    first, second = text.split("\n## ")[1:]
    assert "| Quark |" in first and "| Quark |" in second  # What each group compares with.
    assert "| β 0, no KL |" in first and "| β 0, no KL |" not in second and "| K 2 |" in second
    assert {path.name for path in (tmp_path / "images").iterdir()} == {
        "ablation-weight-of-the-KL-term.svg",
        "ablation-number-of-quantiles.svg",
    }


def final_weights(directory: Path, script: list[str]) -> str:
    """Run the command; return a digest of the weights that it has trained."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *script, "train", *SHORT, "--output_dir", str(directory)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return hashlib.sha256((directory / "final" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def plain_weights(tmp_path_factory) -> str:
    return final_weights(tmp_path_factory.mktemp("plain") / "run", ["-m", "quarkrl"])


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_runs_and_learns_something_else(variant, plain_weights, tmp_path):
    assert final_weights(tmp_path / "run", [str(HERE / "variants.py"), variant]) != plain_weights


def test_a_row_that_would_hide_another_is_an_error(tmp_path):
    """Best and worst quantile once had the same key, and the page showed the worst."""
    record = json.loads((ROOT / "benchmarks/results/proof/ablations-6m/quark-seed=0.json").read_text(encoding="utf-8"))
    (tmp_path / "quark.json").write_text(json.dumps(record | {"rows": record["rows"] * 2}), encoding="utf-8")
    with pytest.raises(ValueError, match="one would hide the other"):
        points(tmp_path)
