"""Runs with a DPO term: the loss by hand, what it teaches, and what it is refused with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.eight_letters import VOCAB
from helpers.runs import (
    LORA,
    KillBefore,
    assert_same_weights,
    logs_of,
    share_of_a,
    small_trainer,
    still_model,
    weights_of,
)

from quarkrl.errors import UserError
from quarkrl.training.memory import size_of_run
from quarkrl.training.runtime_tuning import positions_of_parts

PAIRS = {"dpo_coef": 2.0, "dpo_beta": 0.5, "samples_per_prompt": 4, "entropy_coef": 0.0}
KINDS = (("off", 0.0), ("on", 2.0))
NO_DROPOUT = replace(LORA, lora_dropout=0.0)


@torch.no_grad()
def gain_by_hand(trainer, sample) -> float:
    """How much more likely the policy that is asked for the best quantile finds a completion than p_0."""
    prompt, completion = sample.prompt_ids.tolist(), sample.completion_ids.tolist()
    early = torch.arange(len(completion)) < trainer.args.min_completion_length

    def log_p(model, ids, vocab):
        logits = model(torch.tensor([[*ids, *completion]])).logits[0, len(ids) - 1 : -1, :vocab].clone()
        for end in trainer.end_ids:
            logits[early, end] = -torch.inf
        return logits.log_softmax(-1)[range(len(completion)), completion].sum().item()

    best = trainer.conditioning.prefix(prompt, trainer.conditioning.best)
    learned = log_p(trainer.model, best, None)
    with trainer.reference() as p_0:
        return learned - log_p(p_0, prompt, VOCAB)


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("peft_config", [None, NO_DROPOUT], ids=["all weights", "adapter"])
def test_the_loss_has_the_term_of_each_pair_by_hand(tmp_path, peft_config, kl_coef):
    trainer = small_trainer(tmp_path, peft_config=peft_config, kl_coef=kl_coef, min_completion_length=2, **PAIRS)
    trainer.train()  # So that policy and reference differ.
    trainer.model.train()
    batch = trainer.collate(range(8))
    with_pairs = trainer.compute_loss(trainer.model, batch)
    trainer.args.dpo_coef = 1e-30
    without = trainer.compute_loss(trainer.model, batch)
    gaps = []
    for better, worse in zip(*(rows[:8] for rows in trainer.collate.pairs), strict=True):
        first, second = trainer.pool[int(better)], trainer.pool[int(worse)]
        assert first.prompt_ids.tolist() == second.prompt_ids.tolist()
        gaps.append(gain_by_hand(trainer, first) - gain_by_hand(trainer, second))
    expected = -torch.nn.functional.logsigmoid(0.5 * torch.tensor(gaps)).mean()
    assert expected < 0.69  # Nats: chance.
    torch.testing.assert_close(with_pairs - without, 2.0 * expected, rtol=1e-4, atol=1e-5)


def test_the_term_makes_the_better_completions_likelier_and_is_logged(tmp_path):
    trainer = small_trainer(tmp_path, share_of_a, kl_coef=0.0, num_iterations=4, steps_per_iteration=10, **PAIRS)
    trainer.train()
    losses = [row["dpo"] for row in logs_of(tmp_path, "dpo")]
    assert losses[-1] < losses[0] and losses[-1] < 0.6  # Chance is 0.69.


def test_parts_of_a_batch_and_accumulated_batches_give_the_gradient_of_the_whole(tmp_path):
    gradients = []
    for name, options in {"whole": {}, "parts": {}, "two": {"per_device_train_batch_size": 4}}.items():
        accumulation = {"gradient_accumulation_steps": 2} if name == "two" else {}
        trainer = small_trainer(tmp_path / name, peft_config=NO_DROPOUT, **PAIRS, **options, **accumulation)
        trainer.begin_epoch(0)
        trainer.create_optimizer()
        batch = trainer.collate(range(8))
        tokens = (batch["labels"] != -100).sum()
        trainer.part_positions = 3 * batch["input_ids"].shape[1] if name == "parts" else 0
        batches = [trainer.collate(range(4)), trainer.collate(range(4, 8))] if name == "two" else [batch]
        for inputs in batches:
            trainer.training_step(trainer.model, dict(inputs), tokens)
        gradients.append({n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-7)


def test_a_resumed_run_has_the_same_pairs_and_weights(tmp_path):
    options = {**PAIRS, "num_iterations": 3, "save_strategy": "epoch"}
    whole = small_trainer(tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        small_trainer(tmp_path / "cut", callbacks=[KillBefore(step=7)], **options).train()
    resumed = small_trainer(tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=True)
    for found, expected in zip(resumed.collate.pairs, whole.collate.pairs, strict=True):
        assert found.tolist() == expected.tolist()
    assert_same_weights(weights_of(resumed.model), weights_of(whole.model))


def test_the_plans_of_memory_and_of_parts_count_both_completions_of_a_pair(tmp_path):
    config = {
        name: small_trainer(tmp_path / name, bf16=True, **PAIRS | {"dpo_coef": coef}).args for name, coef in KINDS
    }
    assert positions_of_parts(config["off"]) // 3 == positions_of_parts(config["on"]) > 0
    config["off"].per_device_train_batch_size = config["on"].per_device_train_batch_size = 1
    off, on = (size_of_run(still_model(), config[name], 8, 16) for name in ("off", "on"))
    assert on.activations == 3 * off.activations and on.batch == off.batch


def test_distillation_has_no_pairs(tmp_path):
    trainer = small_trainer(tmp_path, distill_guidance_scale=[2.0], distill_iterations=1, **PAIRS)
    trainer.train()
    assert trainer.distils and trainer.collate.pairs is None


def test_what_the_term_needs(tmp_path):
    with pytest.raises(UserError, match=r"^samples_per_prompt 1: must be at least 2 with dpo_coef, .* 8\.$"):
        small_trainer(tmp_path, **{**PAIRS, "samples_per_prompt": 1})
    with pytest.raises(UserError, match=r"^dpo_coef 2: must be 0 with condition_on each\. Set --condition_on sum\.$"):
        small_trainer(tmp_path, [share_of_a, share_of_a], condition_on="each", **PAIRS)


def test_without_the_term_a_run_is_as_before(tmp_path):
    weights = []
    for name, options in {"off": {}, "zero": {"dpo_coef": 0.0, "dpo_beta": 0.7}}.items():
        trainer = small_trainer(tmp_path / name, model=still_model(), **options)
        trainer.train()
        weights.append(weights_of(trainer.model))
        assert not logs_of(tmp_path / name, "dpo")
    assert_same_weights(*weights)
