"""Defaults by model size: every option that nobody has set, and no other; the run records and prints them."""

from __future__ import annotations

import yaml
from helpers.eight_letters import PROMPTS, TOKENIZER
from helpers.tiny_models import make_home

from quarkrl.cli.main import main
from quarkrl.cli.train_options import RunOptions, parse_train
from quarkrl.training.options import QuarkOptions
from quarkrl.training.sizing import NAMES, SIZES, size_defaults

COMMAND = ["--model", "m", "--prompts", "p", "--reward", "r"]


def chosen_for(parameters, *flags):
    command, line = parse_train([*COMMAND, *flags]).with_size_defaults(parameters)
    return {name: getattr(command.run if name == "lora_rank" else command.config, name) for name in NAMES}, line


def test_every_default_of_a_size_is_an_option_and_sizes_grow():
    declared = {*QuarkOptions.__dataclass_fields__, *RunOptions.__dataclass_fields__}
    assert {*NAMES} <= declared and all({*size.options} == {*SIZES[0].options} for size in SIZES)
    assert [size.below for size in SIZES] == sorted(size.below for size in SIZES)


def test_a_small_model_trains_all_weights_and_a_large_one_an_adapter():
    small, line = chosen_for(1e6)
    assert (small["lora_rank"], small["learning_rate"], small["kl_coef"]) == (0, 2e-3, 0.4)
    assert line.startswith("defaults for a model of 1.0M parameters: lora_rank 0, learning_rate 0.002, kl_coef 0.4")
    large, line = chosen_for(134.5e6)
    assert (large["lora_rank"], large["learning_rate"], large["kl_coef"]) == (16, 3e-4, 0.05)
    assert "134.5M" in line and "7.0B" in chosen_for(7e9)[1]


def test_what_is_set_stays_and_the_learning_rate_suits_what_is_trained():
    values, line = chosen_for(134.5e6, "--kl_coef", "0.2", "--lora_rank", "0")
    assert (values["kl_coef"], values["lora_rank"], values["learning_rate"]) == (0.2, 0, 1e-5)
    assert "kl_coef" not in line and "lora_rank" not in line
    assert chosen_for(1e6, "--lora_rank", "8")[0]["learning_rate"] == size_defaults(1e6, lora_rank=8)["learning_rate"]


def test_an_entropy_target_keeps_the_coefficient_that_it_adapts():
    values, line = chosen_for(1e6, "--entropy_target", "40")
    assert values["entropy_coef"] == QuarkOptions().entropy_coef and "entropy_coef" not in line
    assert chosen_for(1e6, "--entropy_target", "40", "--entropy_coef", "0.2")[0]["entropy_coef"] == 0.2


def test_the_papers_defaults_hold_with_a_preset_and_on_demand():
    paper = {name: getattr(QuarkOptions(), name, None) for name in NAMES}
    assert chosen_for(1e6, "--defaults", "paper") == (paper, None)
    command, line = parse_train(["--config", "toxicity"]).with_size_defaults(1e9)
    assert line is None and command.run.lora_rank is None and command.config.kl_coef == 0.05


def test_a_run_prints_and_records_its_defaults_and_resumes_with_them(tmp_path, capsys):
    home = make_home(tmp_path, TOKENIZER, PROMPTS, "def length(completions, **_):\n    return [*map(len, completions)]")
    reward = f"{home}/rewards.py:length"
    command = ["train", "--config", f"{home}/run.yaml", "--reward", reward, "--output_dir", f"{home}/run"]
    assert main([*command, "--num_quantiles", "2", "--disable_tqdm", "false"]) == 0
    assert " parameters: lora_rank 0, learning_rate 0.002, kl_coef 0.4" in capsys.readouterr().err
    recorded = yaml.safe_load((home / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert {*NAMES} <= {*recorded} and recorded["learning_rate"] == 2e-3 and recorded["num_iterations"] == 2
    assert main(["train", "--resume", "--output_dir", f"{home}/run"]) == 0
    assert "defaults for" not in capsys.readouterr().err
    assert yaml.safe_load((home / "run" / "config.yaml").read_text(encoding="utf-8")) == recorded
