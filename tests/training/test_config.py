"""`QuarkConfig`: the paper's settings by default, no option that does nothing, no impossible value."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from helpers.errors import error_message
from transformers import HfArgumentParser, TrainingArguments

import quarkrl
from quarkrl import QuarkConfig
from quarkrl.cli.train_options import parse_train
from quarkrl.errors import UserError
from quarkrl.models.precision import bf16_is_fast
from quarkrl.training.config import resume_rules
from quarkrl.training.options import QuarkOptions

SOURCE = Path(quarkrl.__file__).parent
QUARK_OPTIONS = {f.name for f in fields(QuarkOptions)}
OWN = sorted({f.name for f in fields(QuarkConfig)} - {f.name for f in fields(TrainingArguments)})


def test_the_defaults_are_the_papers_toxicity_settings(tmp_path):
    config = QuarkConfig(output_dir=str(tmp_path))
    assert config.num_quantiles == 5
    assert (config.kl_coef, config.kl_direction, config.entropy_coef) == (0.05, "policy_ref", 0.06)
    assert (config.kl_target, config.entropy_target, config.coef_horizon) == (None, None, 2500)
    assert (config.max_completion_length, config.min_completion_length) == (20, 3)
    assert (config.temperature, config.top_p, config.eval_top_p) == ([1.0], 1.0, 0.9)
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


def test_temperatures_of_exploring_are_taken_in_turn(tmp_path):
    def explored(temperature):
        config = QuarkConfig(output_dir=str(tmp_path), temperature=temperature)
        return [config.sampling(iteration).temperature for iteration in range(5)]

    assert explored([1.0, 0.2]) == [1.0, 0.2, 1.0, 0.2, 1.0]
    assert explored(0.7) == [0.7] * 5


def test_every_own_option_is_described():
    described = {f.name: f.metadata.get("help") for f in fields(QuarkConfig) if f.name in OWN}
    assert all(described.values()), described


@pytest.mark.parametrize("name", OWN)
def test_every_own_option_is_read_somewhere(name):
    """Official Quark parses --num-samples and --response-length and never reads them."""
    files = [path for path in SOURCE.rglob("*.py") if path.name != "config.py"]
    used = [path.name for path in files if re.search(rf"(args|config)\.{name}\b", path.read_text(encoding="utf-8"))]
    for method in (QuarkConfig.sampling, QuarkConfig.eval_sampling, QuarkConfig.exploring_scale):
        if re.search(rf"self\.{name}\b", inspect.getsource(method)):
            used.append(method.__name__)
    if name in (
        "num_iterations",
        "steps_per_iteration",
        "distill_iterations",
    ):  # config.py itself makes them epochs and draws.
        used.append("config.py")
    assert used, f"nothing reads {name}"


def test_a_parser_of_transformers_reads_the_config(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--kl_coef", "0.2", "--draw", "balanced", "--temperature", "1", "0.5"]
    (config,) = HfArgumentParser([QuarkConfig]).parse_args_into_dataclasses(flags)
    assert (config.kl_coef, config.draw, config.temperature) == (0.2, "balanced", [1.0, 0.5])


# Resuming

BRANCH = {"kl_coef", "learning_rate", "temperature", "draw", "top_p", "seed", "bf16", "optim", "lr_scheduler_type"}
FIXED = {
    "dpo_coef",
    "raw",
    "chat_template_kwargs",
    "last_assistant_turn",
    "system_prompt",
    "conditioning",
    "words",
    "num_quantiles",
    "condition_on",
    "reward_columns",
    "reward_weights",
    "steps_per_iteration",
    "draws_per_step",
}
FREE = {"num_iterations", "per_device_train_batch_size", "generation_batch_size", "save_strategy", "score_cache"}
FREE |= {"reward_timeout", "on_bad_numbers", "disable_tqdm", "skip_bad_prompts", "max_unscored_share"}
SELECTION = {"metric_for_best_model", "greater_is_better", "eval_strategy", "eval_steps", "eval_delay", "eval_top_p"}


def test_each_option_has_the_resume_rule_of_its_declaration():
    rules = resume_rules()
    by_rule = {
        rule: {name for name in rules if rules[name] == rule} for rule in ("branch", "fixed", "free", "selection")
    }
    assert by_rule["fixed"] == FIXED
    assert by_rule["branch"] >= BRANCH and by_rule["free"] >= FREE and by_rule["selection"] >= SELECTION
    assert set(OWN) <= set(rules)


def test_a_run_is_identified_by_the_options_that_its_result_depends_on(tmp_path):
    identity = QuarkConfig(output_dir=str(tmp_path), temperature=0.5, report_to=["none"]).run_identity()
    assert identity["temperature"] == [0.5] and identity["draws_per_step"] == 128
    assert identity.keys() >= BRANCH | FIXED
    assert not identity.keys() & (FREE | SELECTION | {"output_dir", "report_to", "logging_steps"})


def test_a_run_that_keeps_its_best_checkpoint_is_also_identified_by_what_chooses_it(tmp_path):
    options = {"eval_strategy": "epoch", "load_best_model_at_end": True, "eval_top_p": 0.5}
    identity = QuarkConfig(output_dir=str(tmp_path), **options).run_identity()
    assert identity.keys() >= SELECTION and not identity.keys() & FREE
    assert (identity["eval_top_p"], identity["metric_for_best_model"]) == (0.5, "reward")


def test_the_recorded_options_are_quarks_own_and_all_that_the_result_depends_on(tmp_path):
    config = QuarkConfig(output_dir=str(tmp_path), seed=3, weight_decay=0.1, optim="adafactor")
    recorded = json.loads(json.dumps(config.recorded_options()))
    assert recorded.keys() == QUARK_OPTIONS | config.run_identity().keys()
    assert (recorded["seed"], recorded["weight_decay"], recorded["optim"]) == (3, 0.1, "adafactor")
    assert not recorded.keys() & {"remove_unused_columns", "num_train_epochs", "output_dir"}


# Values

IMPOSSIBLE = [
    ({"bf16": "atuo"}, "bf16 'atuo': must be True, False or auto. Did you mean 'auto'?"),
    ({"num_quantiles": 1}, "num_quantiles 1: must be at least 2"),
    ({"num_iterations": 0}, "num_iterations 0: must be at least 1"),
    ({"steps_per_iteration": 0}, "steps_per_iteration 0: must be at least 1"),
    ({"prompts_per_iteration": 0}, "prompts_per_iteration 0: must be at least 1"),
    ({"samples_per_prompt": 0}, "samples_per_prompt 0: must be at least 1"),
    ({"max_completion_length": 0}, "max_completion_length 0: must be at least 1"),
    ({"min_completion_length": -1}, "min_completion_length -1: must be at least 0"),
    ({"min_completion_length": 9, "max_completion_length": 8}, "min_completion_length 9: must be at most .*8"),
    ({"generation_batch_size": 0}, "generation_batch_size 0: must be at least 1"),
    ({"eval_samples_per_prompt": 0}, "eval_samples_per_prompt 0: must be at least 1"),
    ({"coef_horizon": 0}, "coef_horizon 0: must be at least 1"),
    ({"coef_horizon": 25, "kl_target": 3.0}, "coef_horizon 25: must be greater than 25.6, 0.2 times the 128 samples"),
    ({"coef_horizon": 1, "entropy_target": 3.0}, "coef_horizon 1: must be greater than 25.6"),
    ({"kl_coef": -0.1}, "kl_coef -0.1: must be at least 0"),
    ({"kl_coef": float("nan")}, "kl_coef nan: must be at least 0 and finite"),
    ({"entropy_coef": -1.0}, "entropy_coef -1.0: must be at least 0"),
    ({"temperature": 0.0}, "temperature 0.0: must be greater than 0"),
    ({"temperature": [1.0, -1.0]}, "temperature -1.0: must be greater than 0"),
    ({"temperature": []}, "temperature \\[\\]: must be a number"),
    ({"kl_target": 0.0}, "kl_target 0.0: must be greater than 0"),
    ({"entropy_target": -40.0}, "entropy_target -40.0: must be greater than 0"),
    ({"kl_target": 3.0, "kl_coef": 0.0}, "kl_target 3.0: must be left out if kl_coef is 0"),
    ({"entropy_target": 40.0, "entropy_coef": 0.0}, "entropy_target 40.0: must be left out if entropy_coef is 0"),
    ({"top_p": 0.0}, "top_p 0.0: must be greater than 0 and at most 1"),
    ({"top_p": 1.1}, "top_p 1.1: must be greater than 0 and at most 1"),
    ({"eval_top_p": 2.0}, "eval_top_p 2.0: must be greater than 0 and at most 1"),
    ({"max_unscored_share": 1.5}, "max_unscored_share 1.5: must be at least 0 and at most 1"),
    ({"max_unscored_share": -0.5}, "max_unscored_share -0.5: must be at least 0 and at most 1"),
    ({"draw": "best"}, "draw 'best': must be uniform or balanced"),
    ({"kl_direction": "forward"}, "kl_direction 'forward': must be policy_ref or ref_policy"),
    ({"condition_on": "all"}, "condition_on 'all': must be sum or each"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size 0: must be at least 1"),
    ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size 0: must be at least 1"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps 0: must be at least 1"),
    ({"learning_rate": -1e-5}, "learning_rate -1e-05: must be at least 0"),
    ({"warmup_steps": -1}, "warmup_steps -1: must be at least 0"),
    ({"max_grad_norm": -1.0}, "max_grad_norm -1.0: must be at least 0"),
    ({"seed": -1}, "seed -1: must be at least 0"),
    ({"eval_temperature": 0.0}, "eval_temperature 0.0: must be greater than 0"),
    ({"do_sample": False, "samples_per_prompt": 2}, "samples_per_prompt 2: must be 1 if do_sample"),
    ({"eval_do_sample": False, "eval_samples_per_prompt": 4}, "eval_samples_per_prompt 4: must be 1"),
    ({"explore_guidance_scale": -1.0}, "explore_guidance_scale -1.0: must be at least 0"),
    ({"explore_guidance_scale": [1.0, float("nan")]}, "explore_guidance_scale nan: must be at least 0 and finite"),
    ({"explore_guidance_scale": []}, "explore_guidance_scale \\[\\]: must be a number"),
    ({"eval_guidance_scale": float("inf")}, "eval_guidance_scale inf: must be at least 0"),
    ({"eval_guidance_scale": 2.0, "guidance_from": "best"}, "guidance_from 'best': must be worst, reference"),
    (
        {"eval_guidance_scale": 2.0, "guidance_from": "4"},
        "guidance_from '4': must be worst, reference or a quantile .*3",
    ),
    ({"guidance_from": "reference"}, "guidance_from 'reference': must be left out if guidance is off"),
    ({"engine": "tgi"}, "engine 'tgi': must be builtin or vllm"),
    ({"engine_url": "http://localhost:8000"}, "engine_url 'http://localhost:8000': must be left out .*--engine vllm"),
    ({"engine": "vllm", "engine_url": "localhost:8000"}, "engine_url 'localhost:8000': must start with http://"),
    ({"engine": "vllm", "temperature": [1.0, 0.001]}, "temperature 0.001: must be at least 0.01 with vLLM"),
    ({"engine": "vllm", "eval_temperature": 1e-3}, "eval_temperature 0.001: must be at least 0.01 with vLLM"),
    ({"engine": "vllm", "distill_temperature": [1e-3]}, "distill_temperature 0.001: must be at least 0.01 with vLLM"),
    (
        {"engine": "vllm", "eval_guidance_scale": 2.0, "guidance_from": "reference"},
        "guidance_from reference: must be a quantile with vLLM",
    ),
    # Options of TrainingArguments that would do nothing here, or harm.
    ({"max_steps": 10}, "max_steps 10: must be left out. Set --num_iterations"),
    ({"num_train_epochs": 4}, "num_train_epochs 4: must be left out. Set --num_iterations"),
    ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers"),
    ({"dataloader_in_order": False}, "dataloader_in_order False: must be True"),
    ({"dataloader_num_workers": -1}, "dataloader_num_workers -1: must be at least 0"),
    (
        {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 0},
        "dataloader_prefetch_factor 0: must be at least 1",
    ),
    ({"dataloader_multiprocessing_context": "spawn"}, "dataloader_multiprocessing_context 'spawn': must be left out"),
    (
        {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "spwan"},
        "dataloader_multiprocessing_context 'spwan': must be .* Did you mean 'spawn'",
    ),
    ({"resume_from_checkpoint": "nowhere/checkpoint-3"}, "resume_from_checkpoint 'nowhere/checkpoint-3': must be"),
]


@pytest.mark.parametrize(("options", "message"), IMPOSSIBLE, ids=lambda case: str(case)[:50])
def test_an_impossible_value_is_one_error_with_name_value_and_limit(options, message, tmp_path):
    with pytest.raises(UserError, match=f"^{message}") as caught:
        QuarkConfig(output_dir=str(tmp_path), **options)
    assert "\n" not in str(caught.value)


def test_a_short_horizon_is_possible_without_a_target_or_with_small_steps(tmp_path):
    assert QuarkConfig(output_dir=str(tmp_path), coef_horizon=1).coef_horizon == 1
    QuarkConfig(output_dir=str(tmp_path), coef_horizon=26, kl_target=3.0, use_cpu=True)


def test_a_process_that_sees_several_gpus_uses_one_and_says_so(tmp_path, monkeypatch, caplog):
    """`nn.DataParallel` would give the loss batches that belong to different steps."""
    prepare = TrainingArguments.__post_init__

    def see_four_gpus(self):
        prepare(self)
        self._n_gpu = 4

    monkeypatch.setattr(TrainingArguments, "__post_init__", see_four_gpus)
    config = QuarkConfig(output_dir=str(tmp_path), per_device_train_batch_size=8)
    assert (config.n_gpu, config.train_batch_size, config.draws_per_step) == (1, 8, 8)
    assert "one of 4 GPUs is used. To use all, start the run by torchrun --nproc_per_node 4." in caplog.text


@pytest.mark.parametrize("processes", [1, 2])
def test_several_processes_average_over_the_tokens_of_all(tmp_path, monkeypatch, processes):
    monkeypatch.setattr(TrainingArguments, "world_size", processes)

    def make():
        return QuarkConfig(output_dir=str(tmp_path), average_tokens_across_devices=False)

    if processes == 1:
        assert make().world_size == 1
    else:
        error_message(make, "average_tokens_across_devices False: must be True in a run of several processes")


@pytest.mark.parametrize("fast", [True, False])
def test_automatic_bf16_follows_the_processor(tmp_path, monkeypatch, fast):
    monkeypatch.setattr("quarkrl.training.config.bf16_is_fast", lambda: fast)
    assert QuarkConfig(output_dir=str(tmp_path), bf16="auto").run_identity()["bf16"] is fast
    command = parse_train(["--bf16", "auto", "--output_dir", str(tmp_path)])
    assert command.config.bf16 is fast
    assert (
        command.non_default_options.get("bf16", False) is fast
    )  # config.yaml has the choice, so that a resumed run keeps it.


@pytest.mark.parametrize(("flags", "value"), [([], False), (["--bf16"], True), (["--bf16", "no"], False)])
def test_bf16_is_also_an_ordinary_switch(tmp_path, flags, value):
    assert parse_train([*flags, "--output_dir", str(tmp_path)]).config.bf16 is value


def test_bf16_is_fast_where_a_processor_has_either_unit_for_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for units in ((False, False), (False, True), (True, False)):
        for name, unit in zip(("_is_avx512_bf16_supported", "_is_amx_tile_supported"), units, strict=True):
            monkeypatch.setattr(torch.cpu, name, lambda unit=unit: unit)
        assert bf16_is_fast() is any(units)


@pytest.mark.parametrize("has_units", [True, False])
def test_bf16_is_fast_on_a_gpu_with_units_for_it(monkeypatch, has_units):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_units or including_emulation)
    assert bf16_is_fast() is has_units


def test_a_bf16_run_on_a_cpu_is_possible(tmp_path):
    assert QuarkConfig(output_dir=str(tmp_path), bf16=True).bf16


def test_what_only_several_processes_can_have_is_left_out_in_one(tmp_path, monkeypatch):
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    flags = ["--ddp_backend", "gloo", "--fsdp", "--fsdp_config", '{"version": 2}', "--use_cpu"]
    command = parse_train(["--output_dir", str(tmp_path), *flags])
    config, given = command.config, command.non_default_options
    assert (config.ddp_backend, config.fsdp_plugin_args) == (None, None) and not config.fsdp
    assert given["ddp_backend"] == "gloo" and given["fsdp"]  # Kept, so that several processes can resume the run.
    assert command.ignored_options_note().startswith("ddp_backend and fsdp ignored")
    assert command._replace(non_default_options={}).ignored_options_note() is None


def test_a_scale_of_guidance_is_one_for_each_iteration(tmp_path):
    def scales(value):
        return QuarkConfig(output_dir=str(tmp_path), explore_guidance_scale=value).explore_guidance_scale

    assert QuarkConfig(output_dir=str(tmp_path)).explore_guidance_scale == [1.0]
    assert scales(2) == [2.0] and scales([1, 1.5, 2]) == [1, 1.5, 2]
    _, config, *_ = parse_train(["--output_dir", str(tmp_path), "--explore_guidance_scale", "1", "1", "2.5"])
    assert config.explore_guidance_scale == [1.0, 1.0, 2.5]
    (tmp_path / "run.yaml").write_text("explore_guidance_scale: 3\nguidance_from: 1\ndo_sample: false\n")
    _, config, *_ = parse_train(["--output_dir", str(tmp_path), "--config", str(tmp_path / "run.yaml")])
    assert (config.explore_guidance_scale, config.guidance_from, config.do_sample) == ([3.0], "1", False)


def test_the_best_checkpoint_is_chosen_by_the_reward_by_default(tmp_path):
    options = {"output_dir": str(tmp_path), "eval_strategy": "epoch", "load_best_model_at_end": True}
    config = QuarkConfig(**options)
    assert (config.metric_for_best_model, config.greater_is_better) == ("reward", True)
    assert QuarkConfig(**options, metric_for_best_model="eos_share").metric_for_best_model == "eos_share"
    assert QuarkConfig(output_dir=str(tmp_path)).metric_for_best_model is None
