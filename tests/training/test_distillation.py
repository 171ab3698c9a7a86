"""Guidance baked in: the best token alone learns what the teacher says with guidance; no reward is called for it."""

from __future__ import annotations

import pytest
import torch
from helpers.eight_letters import PROMPTS
from helpers.runs import (
    LORA,
    KillBefore,
    assert_same_weights,
    distinct_rewards,
    logs_of,
    model_of,
    share_of_a_to_d,
    small_trainer,
    weights_of,
)
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from quarkrl import QuarkConfig
from quarkrl.errors import UserError
from quarkrl.sampling.guidance import guided_logits
from quarkrl.training.distillation import Stage

DISTILLED = {"distill_guidance_scale": 2.0, "distill_iterations": 2}
ADAPTER = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)


@torch.no_grad()
def next_tokens(trainer, weights=None) -> dict[str, torch.Tensor]:
    """The log-probabilities of the first token after each prompt, over the original vocabulary, by quantile."""
    conditioning, policy = trainer.conditioning, trainer.model.eval()
    plain = trainer.prompts.ids
    logits = {}
    for name in ("best", "worst"):
        rows = [policy(torch.tensor([conditioning.prefix(ids, conditioning.quantiles_of(name))])) for ids in plain]
        logits[name] = torch.stack([row.logits[0, -1, : conditioning.vocab_size] for row in rows]).log_softmax(-1)
    return logits


def divergence(first, second) -> float:
    return float((first.exp() * (first - second)).sum(-1).mean())


@pytest.mark.parametrize("peft_config", [None, ADAPTER], ids=["all weights", "adapter"])
@pytest.mark.parametrize("source", ["worst", "reference"])
def test_the_best_token_alone_becomes_what_the_teacher_was_with_guidance(tmp_path, peft_config, source):
    calls = []

    def reward(completion_ids, **_):
        calls.append(len(completion_ids))
        return share_of_a_to_d(completion_ids)

    options = {
        "num_quantiles": 2,
        "steps_per_iteration": 20,
        "samples_per_prompt": 16,
        "learning_rate": 3e-2 if peft_config else 1e-2,
        "min_completion_length": 0,
    }
    trainer = small_trainer(tmp_path, reward, peft_config=peft_config, guidance_from=source, **options, **DISTILLED)
    trainer.train()
    assert sum(calls) == 2 * 16 * len(PROMPTS) == len(trainer.pool)
    student = next_tokens(trainer)["best"]
    with trainer.teacher.within(trainer.model) as teacher, torch.no_grad():
        assert teacher is trainer.model
        logits = next_tokens(trainer)
        if source == "reference":
            with trainer.reference() as reference:
                rows = [reference(torch.tensor([ids])).logits[0, -1] for ids in trainer.prompts.ids]
            logits["worst"] = torch.stack(rows)[:, : trainer.conditioning.vocab_size]
    guided = guided_logits(logits["best"], [logits["worst"]], [2.0]).log_softmax(-1)
    before, after = divergence(guided, logits["best"]), divergence(guided, student)
    assert after < 0.5 * before, (before, after)
    torch.testing.assert_close(next_tokens(trainer)["best"], student)  # The policy has its own weights again.
    rows = logs_of(tmp_path, "distill_guidance_scale")
    assert [(row["iteration"], row["distill_guidance_scale"]) for row in rows] == [(2, 2.0), (3, 2.0)]
    assert trainer.state.global_step == 80


def test_guidance_from_the_reference_is_distilled_after_a_kl_term_that_was_guided_from_words(tmp_path):
    words = {"conditioning": "soft", "words": ["a", "b"], "num_quantiles": 2, "kl_guidance_scale": 1.5}
    trainer = small_trainer(tmp_path, share_of_a_to_d, guidance_from="reference", **words, **DISTILLED)
    trainer.train()
    assert trainer.collate.with_reference and trainer.collate.contrast is None


def test_the_line_of_an_iteration_of_distillation_has_its_scale_and_no_reward(tmp_path, capfd):
    small_trainer(tmp_path, share_of_a_to_d, disable_tqdm=False, **DISTILLED).train()
    lines = capfd.readouterr().err.splitlines()
    explored, distilled = (next(line for line in lines if line.startswith(f"iteration {n}/4  ")) for n in (2, 3))
    assert "reward" in explored and "distils" not in explored
    assert "distils γ 2" in distilled and "reward" not in distilled and "kl" in distilled


def test_a_temperature_and_a_rule_are_distilled_too(tmp_path):
    options = {"num_quantiles": 2, "steps_per_iteration": 30, "samples_per_prompt": 16, "learning_rate": 1e-2}
    options |= {"min_completion_length": 0, "distill_guidance_rule": "lower", "distill_temperature": 1.5}
    trainer = small_trainer(tmp_path, share_of_a_to_d, **options, **DISTILLED)
    trainer.train()
    student = next_tokens(trainer)["best"]
    with trainer.teacher.within(trainer.model):
        logits = next_tokens(trainer)
    distances = {
        (rule, temperature): divergence(
            (guided_logits(logits["best"], [logits["worst"]], [2.0], rule) / temperature).log_softmax(-1), student
        )
        for rule in ("both", "lower")
        for temperature in (1.0, 1.5)
    }
    assert min(distances, key=lambda key: distances[key]) == ("lower", 1.5), distances


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["all weights", "adapter"])
def test_a_run_that_is_cut_within_distillation_resumes_exactly(tmp_path, peft_config):
    options = {**DISTILLED, "save_strategy": "steps", "save_steps": 1, "peft_config": peft_config}
    whole = small_trainer(tmp_path / "whole", distinct_rewards, model_of(), **options)
    whole.train()
    cut = small_trainer(tmp_path / "cut", distinct_rewards, model_of(), **options, callbacks=[KillBefore(8)])
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed = small_trainer(tmp_path / "cut", distinct_rewards, model_of(), **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(weights_of(whole.model), weights_of(resumed.model))
    assert_same_weights(whole.teacher.weights, resumed.teacher.weights)


def test_each_stage_has_the_policy_after_the_one_before_as_its_teacher_and_resumes_exactly(tmp_path):
    options = {**DISTILLED, "distill_guidance_scale": [2.0, 1.5], "distill_temperature": [1.0, 1.2]}
    options |= {"save_strategy": "steps", "save_steps": 1}
    begun = {}

    class Remember(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **_):
            begun.setdefault(state.global_step, weights_of(model))

    whole = small_trainer(tmp_path / "whole", distinct_rewards, model_of(), **options, callbacks=[Remember()])
    whole.train()
    rows = logs_of(tmp_path / "whole", "distill_guidance_scale")
    assert [(row["iteration"], row["distill_guidance_scale"]) for row in rows] == [(2, 2), (3, 2), (4, 1.5), (5, 1.5)]
    steps = whole.args.steps_per_iteration
    for number in (0, 1):
        teacher = load_file(tmp_path / "whole" / f"teacher-{number}.safetensors")
        assert_same_weights({name: begun[(2 + 2 * number) * steps][name] for name in teacher}, teacher)
    assert whole.teacher.stage == Stage(1, 4, 1.5, 1.2)
    for step in (2 * steps + 1, 4 * steps, 4 * steps + 1):
        cut = small_trainer(tmp_path / f"{step}", distinct_rewards, model_of(), **options, callbacks=[KillBefore(step)])
        with pytest.raises(KeyboardInterrupt):
            cut.train()
        resumed = small_trainer(tmp_path / f"{step}", distinct_rewards, model_of(), **options)
        resumed.train(resume_from_checkpoint=True)
        assert_same_weights(weights_of(whole.model), weights_of(resumed.model))


def test_within_distillation_the_teacher_is_needed_and_the_length_is_fixed(tmp_path):
    options = {**DISTILLED, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        small_trainer(tmp_path, distinct_rewards, **options, callbacks=[KillBefore(8)]).train()
    longer = small_trainer(tmp_path, distinct_rewards, **{**options, "num_iterations": 3})
    with pytest.raises(UserError, match="num_iterations was 2, is 3"):
        longer.train(resume_from_checkpoint=True)
    (tmp_path / "teacher-0.safetensors").unlink()
    with pytest.raises(UserError, match=r"teacher-0\.safetensors: must hold the teacher to resume"):
        small_trainer(tmp_path, distinct_rewards, **options).train(resume_from_checkpoint=True)


def test_without_a_scale_there_is_no_distillation(tmp_path):
    config = QuarkConfig(str(tmp_path), num_iterations=3, distill_iterations=2)
    assert (config.total_iterations, config.num_train_epochs) == (3, 3)
    config = QuarkConfig(str(tmp_path), num_iterations=3, **DISTILLED, guidance_from="reference")
    assert (config.total_iterations, config.num_train_epochs) == (5, 5)
    with pytest.raises(UserError, match="distill_temperature: has 2 values, and must have at most one for"):
        QuarkConfig(str(tmp_path), **DISTILLED, distill_temperature=[1.0, 1.2])
    with pytest.raises(UserError, match=r"distill_guidance_scale -1\.0: must be at least 0"):
        QuarkConfig(str(tmp_path), distill_guidance_scale=-1)
