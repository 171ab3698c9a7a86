"""`QuarkConfig`: the paper's settings by default, no option that does nothing, no impossible value."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import TrainingArguments

import quarkrl
from quarkrl import QuarkConfig
from quarkrl.errors import UserError

SOURCE = Path(quarkrl.__file__).parent
OWN = sorted({f.name for f in fields(QuarkConfig)} - {f.name for f in fields(TrainingArguments)})


def test_the_defaults_are_the_papers_toxicity_settings(tmp_path):
    config = QuarkConfig(output_dir=str(tmp_path))
    assert config.num_quantiles == 5
    assert (config.kl_coef, config.kl_direction, config.entropy_coef) == (0.05, "policy_ref", 0.06)
    assert (config.kl_target, config.entropy_target, config.coef_horizon) == (None, None, 2500)
    assert (config.max_completion_length, config.min_completion_length) == (20, 3)
    assert (config.temperature, config.top_p, config.eval_top_p) == (1.0, 1.0, 0.9)
    assert (config.learning_rate, config.adam_epsilon, config.max_grad_norm) == (1e-5, 1e-5, 0.0)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (128, 1)
    assert (config.steps_per_iteration, config.samples_per_prompt, config.prompts_per_iteration) == (500, 1, None)
    assert config.lr_scheduler_type == "linear"
    steps = config.num_iterations * config.steps_per_iteration
    assert 23_437 <= steps < 23_437 + 500  # The paper's steps, in whole iterations.
    assert config.get_warmup_steps(steps) == pytest.approx(500, rel=0.1)
    assert config.weight_decay == 0.0


def test_an_iteration_is_an_epoch(tmp_path):
    config = QuarkConfig(output_dir=str(tmp_path), num_iterations=7, steps_per_iteration=3)
    assert config.num_train_epochs == 7
    size = 4 * 2 * config.world_size
    config = QuarkConfig(
        output_dir=str(tmp_path), steps_per_iteration=3, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    assert (config.draws_per_step, config.draws_per_iteration) == (size, 3 * size)


def test_every_own_option_is_described():
    described = {f.name: f.metadata.get("help") for f in fields(QuarkConfig) if f.name in OWN}
    assert all(described.values()), described


@pytest.mark.parametrize("name", OWN)
def test_every_own_option_is_read_somewhere(name):
    """Official Quark parses --num-samples and --response-length and never reads them."""
    files = [path for path in SOURCE.rglob("*.py") if path.name != "config.py"]
    used = [path.name for path in files if re.search(rf"(args|config)\.{name}\b", path.read_text(encoding="utf-8"))]
    if name in ("num_iterations", "steps_per_iteration"):  # config.py itself makes them epochs and draws.
        used.append("config.py")
    assert used, f"nothing reads {name}"


IMPOSSIBLE = [
    ({"num_quantiles": 1}, "num_quantiles 1: want at least 2"),
    ({"num_iterations": 0}, "num_iterations 0: want at least 1"),
    ({"steps_per_iteration": 0}, "steps_per_iteration 0: want at least 1"),
    ({"prompts_per_iteration": 0}, "prompts_per_iteration 0: want at least 1"),
    ({"samples_per_prompt": 0}, "samples_per_prompt 0: want at least 1"),
    ({"max_completion_length": 0}, "max_completion_length 0: want at least 1"),
    ({"min_completion_length": -1}, "min_completion_length -1: want at least 0"),
    ({"min_completion_length": 9, "max_completion_length": 8}, "min_completion_length 9: want at most .*8"),
    ({"generation_batch_size": 0}, "generation_batch_size 0: want at least 1"),
    ({"eval_samples_per_prompt": 0}, "eval_samples_per_prompt 0: want at least 1"),
    ({"coef_horizon": 0}, "coef_horizon 0: want at least 1"),
    ({"kl_coef": -0.1}, "kl_coef -0.1: want at least 0"),
    ({"kl_coef": float("nan")}, "kl_coef nan: want at least 0"),
    ({"entropy_coef": -1.0}, "entropy_coef -1.0: want at least 0"),
    ({"temperature": 0.0}, "temperature 0.0: want more than 0"),
    ({"kl_target": 0.0}, "kl_target 0.0: want more than 0"),
    ({"entropy_target": -40.0}, "entropy_target -40.0: want more than 0"),
    ({"kl_target": 3.0, "kl_coef": 0.0}, "kl_target with kl_coef 0"),
    ({"entropy_target": 40.0, "entropy_coef": 0.0}, "entropy_target with entropy_coef 0"),
    ({"top_p": 0.0}, "top_p 0.0: want more than 0 and at most 1"),
    ({"top_p": 1.1}, "top_p 1.1: want more than 0 and at most 1"),
    ({"eval_top_p": 2.0}, "eval_top_p 2.0: want more than 0 and at most 1"),
    ({"max_unscored_share": 1.5}, "max_unscored_share 1.5: want a share from 0 to 1"),
    ({"max_unscored_share": -0.5}, "max_unscored_share -0.5: want a share from 0 to 1"),
    ({"draw": "best"}, "draw 'best': want uniform or balanced"),
    ({"kl_direction": "forward"}, "kl_direction 'forward': want policy_ref or ref_policy"),
    ({"condition_on": "all"}, "condition_on 'all': want sum or each"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size 0: want at least 1"),
    ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size 0: want at least 1"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps 0: want at least 1"),
    ({"learning_rate": -1e-5}, "learning_rate -1e-05: want at least 0"),
    ({"warmup_steps": -1}, "warmup_steps -1: want at least 0"),
    ({"max_grad_norm": -1.0}, "max_grad_norm -1.0: want at least 0"),
    ({"seed": -1}, "seed -1: want at least 0"),
    # Options of TrainingArguments that would do nothing here, or harm.
    ({"max_steps": 10}, "max_steps 10: not used; set --num_iterations"),
    ({"num_train_epochs": 4}, "num_train_epochs 4: not used; set --num_iterations"),
    ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers"),
    ({"resume_from_checkpoint": "nowhere/checkpoint-3"}, "resume_from_checkpoint 'nowhere/checkpoint-3': want"),
]


@pytest.mark.parametrize(("options", "message"), IMPOSSIBLE, ids=lambda case: str(case)[:50])
def test_an_impossible_value_is_one_error_with_name_value_and_limit(options, message, tmp_path):
    with pytest.raises(UserError, match=f"^{message}") as caught:
        QuarkConfig(output_dir=str(tmp_path), **options)
    assert "\n" not in str(caught.value)


def test_a_bf16_run_on_a_cpu_is_possible(tmp_path):
    assert QuarkConfig(output_dir=str(tmp_path), bf16=True).bf16
