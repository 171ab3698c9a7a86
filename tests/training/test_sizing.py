"""Defaults by model size: every option that nobody has set, and no other; the run records and prints them."""

from __future__ import annotations

from dataclasses import fields as fields_of

import numpy as np
import pytest
import yaml
from helpers.eight_letters import PROMPTS, TOKENIZER
from helpers.tiny_models import make_home

from quarkrl.algorithm.pool import DataPool
from quarkrl.cli.main import main
from quarkrl.cli.train_options import RunOptions, parse_train
from quarkrl.errors import UserError
from quarkrl.training.first_look import spread_of
from quarkrl.training.options import QuarkOptions
from quarkrl.training.sizing import NAMES, SIZES, RewardSpread, Speed, parse_duration, size_defaults

COMMAND = ["--model", "m", "--prompts", "p", "--reward", "r"]


def chosen_for(parameters, *flags):
    command, line = parse_train([*COMMAND, *flags]).with_defaults(parameters)
    return {name: getattr(command.run if name == "lora_rank" else command.config, name) for name in NAMES}, line


def test_every_default_of_a_size_is_an_option_and_sizes_grow():
    declared = {*QuarkOptions.__dataclass_fields__, *RunOptions.__dataclass_fields__}
    assert {*NAMES} <= declared and all({*size.options} == {*SIZES[0].options} for size in SIZES)
    assert [size.below for size in SIZES] == sorted(size.below for size in SIZES)
    fields = [*fields_of(QuarkOptions), *fields_of(RunOptions)]
    assert {field.name for field in fields if field.metadata.get("fitted")} == {*NAMES}


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


def test_completions_of_a_prompt_are_compared_where_there_are_several():
    def of_pairs(parameters: float, *flags: str) -> tuple[float, int, int]:
        values = chosen_for(parameters, *flags)[0]
        return values["dpo_coef"], values["samples_per_prompt"], values["prompts_per_iteration"]

    assert of_pairs(134.5e6) == (10, 8, 128) and of_pairs(1e6) == (0.2, 8, 625)
    assert of_pairs(1e6, "--dpo_coef", "2") == (2, 8, 625)
    for alone in (["--dpo_coef", "0"], ["--samples_per_prompt", "1"], ["--no_do_sample"], ["--condition_on", "each"]):
        assert of_pairs(134.5e6, *alone) == (0, 1, 1024), alone
        assert of_pairs(1e6, *alone) == (0, 1, 5000), alone
    assert of_pairs(134.5e6, "--samples_per_prompt", "4") == (10, 4, 128)


def test_a_budget_takes_prompts_where_samples_of_a_prompt_are_compared():
    config = parse_train([*COMMAND, "--budget", "1m"]).with_defaults(1e9, 100, Speed(1, 1))[0].config
    assert (config.samples_per_prompt, config.prompts_per_iteration, config.dpo_coef) == (8, 64, 10)


def test_an_entropy_target_keeps_the_coefficient_that_it_adapts():
    values, line = chosen_for(1e6, "--entropy_target", "40")
    assert values["entropy_coef"] == QuarkOptions().entropy_coef and "entropy_coef" not in line
    assert chosen_for(1e6, "--entropy_target", "40", "--entropy_coef", "0.2")[0]["entropy_coef"] == 0.2


def test_the_papers_defaults_hold_with_a_preset_and_on_demand():
    paper = {name: getattr(QuarkOptions(), name, None) for name in NAMES}
    assert chosen_for(1e6, "--defaults", "paper") == (paper, None)
    command, line = parse_train(["--config", "toxicity"]).with_defaults(1e9)
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


def amounts(num_prompts: int, *flags: str, speed: Speed | None = None) -> tuple[int, ...]:
    """Iterations, steps, batch, prompts and samples of a run of a model with 1M parameters."""
    config = parse_train([*COMMAND, *flags]).with_defaults(1e6, num_prompts, speed)[0].config
    steps = config.num_iterations, config.steps_per_iteration, config.per_device_train_batch_size
    return (*steps, config.prompts_per_iteration, config.samples_per_prompt)


def test_few_prompts_get_more_samples_and_completions_are_not_drawn_more_often():
    assert amounts(20_000) == amounts(625) == (6, 40, 128, 625, 8)
    assert amounts(312) == (6, 40, 128, 625, 16)  # 312 x 16 completions.
    assert amounts(240) == (6, 31, 128, 625, 16)  # 3,840 completions, 3,968 draws: 1.03, as with plenty.
    assert amounts(20) == (6, 10, 32, 625, 16)  # 320 completions, 320 draws.
    alone = ["--dpo_coef", "0"]
    assert amounts(20_000, *alone) == amounts(5000, *alone) == (26, 50, 128, 5000, 1)
    assert amounts(2500, *alone) == (26, 50, 128, 5000, 2)  # 2,500 x 2 completions.
    assert amounts(240, *alone) == (26, 38, 128, 5000, 16)  # 3,840 completions, 4,864 draws: 1.27, as with plenty.


def test_what_is_set_stays_and_the_rest_suits_it():
    assert amounts(240, "--samples_per_prompt", "4") == (6, 15, 64, 625, 4)  # 960 completions and draws
    assert amounts(240, "--steps_per_iteration", "5") == (6, 5, 128, 625, 8)
    assert amounts(240, "--per_device_train_batch_size", "64", "--gradient_accumulation_steps", "2")[1] == 31
    assert amounts(240, "--no_do_sample") == (26, 10, 32, 5000, 1)  # Greedy completions of a prompt are equal.


def test_a_budget_takes_iterations_first_and_then_samples_and_prompts():
    # An iteration explores 5,000 completions and draws 6,400: 100 s.
    speed, alone = Speed(per_completion=0.01, per_draw=50 / 6400), ("--dpo_coef", "0")
    assert amounts(20_000, "--budget", "1h", *alone, speed=speed) == (26, 50, 128, 5000, 1)  # 43 min
    assert amounts(20_000, "--budget", "20m", *alone, speed=speed) == (12, 50, 128, 5000, 1)
    assert amounts(20_000, "--budget", "6m40s", *alone, speed=speed) == (8, 25, 128, 2500, 1)
    fixed = amounts(20_000, "--budget", "20m", "--num_iterations", "24", *alone, speed=speed)
    assert fixed == (24, 25, 128, 2500, 1)
    # Samples go down before prompts.
    assert amounts(500, "--budget", "5m", *alone, speed=speed)[3:] == (5000, 3)


def test_a_budget_that_is_exceeded_is_a_warning():
    def warning(*flags: str) -> str:
        command = parse_train([*COMMAND, "--dpo_coef", "0", *flags])
        return command.with_defaults(1e6, 20_000, Speed(0.01, 50 / 6400))[1].partition("\n")[2]

    fixed = ["--num_iterations", "24", "--prompts_per_iteration", "5000", "--steps_per_iteration", "50"]
    assert warning("--budget", "20m", *fixed) == (
        "warning: sampling and learning exceed --budget 20m. "
        "Lower or leave out num_iterations, steps_per_iteration, prompts_per_iteration."
    )
    assert "exceed --budget 1s. A run has no fewer iterations" in warning("--budget", "1s")
    assert warning("--budget", "20m") == warning(*fixed) == ""


@pytest.mark.parametrize("text", ["", "soon", "0m", "5 apples", "-3m"])
def test_a_budget_is_a_time(text):
    assert (parse_duration("90s"), parse_duration("1h30m"), parse_duration("0.5h")) == (90, 5400, 1800)
    with pytest.raises(UserError, match=r"^budget .*: must be a time above 0"):
        parse_duration(text)


def test_a_preset_has_no_budget():
    with pytest.raises(UserError, match="budget '5m': must be left out of a preset"):
        parse_train(["--config", "tiny-toxicity", "--budget", "5m"])


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys, monkeypatch):
    home = make_home(tmp_path, TOKENIZER, PROMPTS, "def length(completions, **_):\n    return [*map(len, completions)]")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    reward = f"{home}/rewards.py:length"
    flags = ["--steps_per_iteration", "9", "--num_quantiles", "2", "--disable_tqdm", "false", "--dry_run"]
    command = ["train", "--config", f"{home}/run.yaml", "--reward", reward, "--output_dir", f"{home}/runs/new"]
    assert main([*command, *flags]) == 0
    text = capsys.readouterr().err
    assert "plan: 2 iterations" in text and "memory: about" in text and "time: about" in text
    assert "times. Above 2, a model overfits" in text and "dry run: nothing was trained or written" in text
    assert sorted(path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts) == before


def few_valued(*shares: float) -> np.ndarray:
    """Return 200 rewards of 0, 1, … in these shares, `(200, 1)`."""
    return np.repeat(np.arange(len(shares)), [round(200 * share) for share in shares])[:, None].astype(float)


@pytest.mark.parametrize(
    ("rewards", "quantiles"),
    [
        (few_valued(0.09, 0.91), 2),
        (few_valued(0.05, 0.35, 0.6), 3),
        (few_valued(0.25, 0.25, 0.25, 0.25), 4),
        (few_valued(0.1, 0.1, 0.1, 0.1, 0.1, 0.5), 3),  # Fifths and quarters would leave one empty.
        (np.linspace(0, 1, 200)[:, None], 5),
    ],
)
def test_there_are_as_many_quantiles_as_the_rewards_fill(rewards, quantiles):
    spread = spread_of(rewards, ["reward"])
    assert spread.num_quantiles == quantiles
    pool = DataPool(quantiles)
    pool.add([[1]] * 200, [[2]] * 200, rewards, iteration=0)
    pool.quantize()
    assert {*pool.quantiles[:, 0].tolist()} == {*range(quantiles)}


def test_the_coarsest_of_several_rewards_decides_and_missing_ones_do_not_count():
    both = np.hstack([np.linspace(0, 1, 200)[:, None], few_valued(0.09, 0.91)])
    both[5, 0] = np.nan
    assert spread_of(both, ["fine", "coarse"]).num_quantiles == 2
    assert spread_of(np.full((3, 1), np.nan), ["reward"]) is None
    assert spread_of(np.linspace(0, 1, 200)[:, None], ["reward"], ceiling=0.05).num_quantiles == 5


def sized(spread: RewardSpread, num_prompts: int, *flags: str):
    command, line = parse_train([*COMMAND, "--dpo_coef", "0", *flags]).with_defaults(1e6, num_prompts, spread=spread)
    return command.config.num_quantiles, command.config.samples_per_prompt, line.partition("\n")[2]


def test_few_valued_rewards_choose_the_quantiles_and_rare_ones_more_samples():
    common, rare = spread_of(few_valued(0.24, 0.76), ["reward"]), spread_of(few_valued(0.02, 0.98), ["kind"])
    seen = "rewards: 76% of 200 first samples share the reward 1, so the run has 2 quantiles"
    assert sized(common, 5000) == (2, 1, seen)
    # 5 of 202 are expected in the smallest quantile: 64 of 1,000 x 3 samples.
    seen = "rewards: 98% of 200 first samples share the kind 1, so the run has 2 quantiles and 3 samples per prompt"
    assert sized(rare, 5000, "--prompts_per_iteration", "1000", "--steps_per_iteration", "50")[:2] == (2, 1)
    assert sized(rare, 1200) == (2, 4, seen.replace("3 samples", "4 samples"))  # as without ties: 5,000 in all
    # Pairs need eight samples whatever the rewards are.
    assert sized(rare, 5000, "--dpo_coef", "0.2") == (2, 8, seen.replace(" and 3 samples per prompt", ""))
    few = "98% of 200 first samples share the kind 1, so only 2 of 4 quantiles would have samples"
    warning = f"warning: {few}. Lower --num_quantiles, or choose a finer reward."
    assert sized(rare, 5000, "--num_quantiles", "4", "--samples_per_prompt", "2") == (4, 2, warning)


def test_quantiles_follow_from_words_and_from_a_quantile_of_guidance():
    common = spread_of(few_valued(0.24, 0.76), ["reward"])
    assert sized(common, 5000, "--conditioning", "text", "--words", "a", "b", "c")[0] == 3
    assert sized(common, 5000, "--guidance_from", "3", "--explore_guidance_scale", "2")[0] == 5


def test_rewards_that_do_not_differ_are_a_warning():
    _, samples, warning = sized(spread_of(few_valued(0, 1.0), ["reward"]), 5000)
    assert samples == 1  # More samples of a reward that never differs would only cost time.
    assert warning.startswith(
        "warning: all 200 first samples have the reward 1. Choose prompts whose completions differ"
    )


def test_a_run_with_rewards_of_0_and_1_has_two_quantiles_and_says_why(tmp_path, capsys):
    code = "def a(completions, **_):\n    return [float('a' in text) for text in completions]"
    home = make_home(tmp_path, TOKENIZER, PROMPTS, code)
    command = [
        "train",
        "--model",
        f"{home}/model",
        "--prompts",
        f"{home}/prompts.txt",
        "--reward",
        f"{home}/rewards.py:a",
    ]
    assert main([*command, "--max_completion_length", "4", "--output_dir", f"{home}/run", "--dry_run"]) == 0
    assert "first samples share the reward" in (text := capsys.readouterr().err) and "the run has 2 quantiles" in text
