"""What a run keeps and goes on from: its best checkpoint, final/, a resumed run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.eight_letters import EOS_ID, VOCAB
from helpers.runs import (
    LORA,
    KillBefore,
    assert_same_pool,
    assert_same_weights,
    distinct_rewards,
    figures_of,
    model_of,
    small_trainer,
    still_model,
    weights_of,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, pipeline

from quarkrl.algorithm.pool import DataPool
from quarkrl.errors import UserError
from quarkrl.sampling.generator import QuarkGenerator

# Evaluating, saving


def test_held_out_prompts_are_evaluated_and_the_best_checkpoint_is_kept(tmp_path):
    trainer = small_trainer(
        tmp_path,
        eval_dataset=["a", "b c"],
        eval_strategy="epoch",
        eval_samples_per_prompt=4,
        save_strategy="epoch",
        num_iterations=3,
        metric_for_best_model="reward",
        load_best_model_at_end=True,
        save_total_limit=3,
    )
    trainer.train()
    rewards = figures_of(tmp_path, "eval_reward")
    assert len(rewards) == 3
    best = tmp_path / f"checkpoint-{3 * (1 + int(np.argmax(rewards)))}"
    assert trainer.state.best_metric == max(rewards)
    assert Path(trainer.state.best_model_checkpoint).name == best.name
    assert_same_weights(weights_of(trainer.model), weights_of(AutoModelForCausalLM.from_pretrained(best)))
    again = trainer.evaluate()
    assert again["eval_reward"] == max(rewards)  # The same seed, the same weights.
    assert trainer.evaluate(["a"], metric_key_prefix="test").keys() >= {"test_reward", "test_eos_share"}


def test_a_run_stops_early_when_the_reward_no_longer_grows(tmp_path):
    trainer = small_trainer(
        tmp_path,
        lambda completion_ids, **_: [1.0] * len(completion_ids),
        eval_dataset=["a", "b c"],
        eval_strategy="epoch",
        save_strategy="epoch",
        metric_for_best_model="reward",
        load_best_model_at_end=True,
        num_iterations=5,
        on_collapse="warn",
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
    )
    trainer.train()
    assert trainer.state.global_step == 2 * 3


def test_a_checkpoint_holds_the_conditioning_and_no_pickled_options(tmp_path):
    small_trainer(tmp_path, save_strategy="epoch", save_total_limit=2).train()
    for checkpoint in (tmp_path / "checkpoint-3", tmp_path / "checkpoint-6"):
        names = {path.name for path in checkpoint.iterdir()}
        assert {"quark.json", "model.safetensors", "tokenizer.json", "training", "trainer_state.json"} <= names
        assert "training_args.bin" not in names
        options = json.loads((checkpoint / "quark.json").read_text(encoding="utf-8"))["config"]
        assert options["save_total_limit"] == 2
    text = QuarkGenerator.from_pretrained(tmp_path / "checkpoint-3").generate("a b", quantile="worst", seed=0)
    assert len(text) == 1


def test_final_is_an_ordinary_checkpoint_steered_to_the_best(tmp_path):
    trainer = small_trainer(tmp_path)
    trainer.train()
    final = trainer.save_final()
    assert final == tmp_path / "final"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert_same_weights(weights_of(model), weights_of(trainer.model))
    best = trainer.conditioning.prefixes[0][-1][0]
    assert tokenizer("a b")["input_ids"] == [best, 0, 1]
    assert sorted(model.generation_config.suppress_tokens) == [10, 11, 12]
    assert model.config.use_cache
    ids = torch.tensor([[best, 0, 1]] * 64)
    out = model.generate(ids, do_sample=True, max_new_tokens=10, pad_token_id=EOS_ID)
    assert (out[:, 3:] < VOCAB).all()
    (answer,) = pipeline("text-generation", model=str(final))("a b", max_new_tokens=4, do_sample=False)
    assert answer["generated_text"].startswith("a b")


def test_quark_json_says_what_a_run_was(tmp_path):
    trainer = small_trainer(tmp_path, distinct_rewards, ref_model=still_model(seed=5), kl_coef=0.07)
    trainer.train()
    facts = json.loads((trainer.save_final() / "quark.json").read_text(encoding="utf-8"))
    assert facts["conditioning"]["prefixes"] == [[[10], [11], [12]]]
    assert facts["quantile_edges"] == trainer.pool.edges.tolist() and len(facts["quantile_edges"][0]) == 2
    assert (facts["iterations"], facts["pool_size"]) == (2, 16)
    assert facts["config"]["kl_coef"] == facts["coefs"]["kl_coef"] == 0.07 and facts["config"]["seed"] == 0
    assert "distinct_rewards" in json.dumps(facts["rewards"])
    assert facts["reference"]["parameters"] == sum(p.numel() for p in still_model().parameters())
    other = small_trainer(tmp_path / "other", ref_model=still_model(seed=6))
    assert len(facts["reference"]["sha256"]) == 64 != other.identities["reference"]["sha256"]


def test_an_adapter_is_merged_into_final(tmp_path):
    trainer = small_trainer(tmp_path, peft_config=LORA, learning_rate=1e-2, save_strategy="epoch")
    before = trainer.conditioning.new_token_ids
    rows = trainer.model.get_input_embeddings().weight[list(before)].detach().clone()
    trainer.train()
    final = trainer.save_final()
    assert not (final / "adapter_config.json").exists()
    merged = AutoModelForCausalLM.from_pretrained(final).eval()
    assert type(merged).__name__ == "GPT2LMHeadModel"
    ids = torch.tensor([[12, 0, 1, 2], [10, 3, 3, 4]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, trainer.model.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    moved = (merged.get_input_embeddings().weight[list(before)] - rows).abs().amax(dim=1)
    assert (moved > 0).all()


# Resume


@pytest.mark.parametrize(
    ("stop", "options"),
    [
        (6, {}),  # Iteration 2 is explored and on disk, and learning has not begun.
        (8, {}),  # Amid learning of iteration 2; the last checkpoint is after iteration 1.
        (8, {"save_strategy": "steps", "save_steps": 7}),  # The checkpoint is amid learning, too.
        (
            2,
            {"save_strategy": "steps", "save_steps": 1, "kl_coef": 0.0},
        ),  # Amid iteration 0, of which no reference is left.
        (8, {"kl_target": 1e-6, "entropy_target": 1e6, "coef_horizon": 40}),
        (8, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}),
        (8, {"peft_config": LORA}),
    ],
    ids=["explored", "learning", "mid-iteration", "first", "adaptive", "accumulation", "lora"],
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, stop, options):
    options = {"save_strategy": "epoch", "num_iterations": 4, "model": None, **options}
    asked: list[list[int]] = []

    def reward(completion_ids, **_):
        asked.extend(completion_ids)
        return distinct_rewards(completion_ids)

    whole = small_trainer(tmp_path / "whole", reward, **{**options, "model": model_of()})  # With dropout.
    whole.train()
    expected = list(asked)

    asked.clear()
    cut = small_trainer(tmp_path / "cut", reward, **{**options, "model": model_of()}, callbacks=[KillBefore(stop)])
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed = small_trainer(tmp_path / "cut", reward, **{**options, "model": model_of()})
    resumed.train(resume_from_checkpoint=True)
    assert asked == expected  # Nothing is sampled twice, or otherwise.
    assert_same_pool(resumed.pool, whole.pool)
    assert resumed.pool.quantiles.tolist() == whole.pool.quantiles.tolist()
    assert resumed.coefs == whole.coefs
    assert_same_weights(weights_of(resumed.model), weights_of(whole.model))
    on_disk = [DataPool.load(tmp_path / run / "pool", 3, ("reward",)) for run in ("whole", "cut")]
    assert on_disk[0].rewards.tolist() == on_disk[1].rewards.tolist()


def test_resuming_without_the_pool_is_an_error(tmp_path):
    small_trainer(tmp_path, save_strategy="epoch").train()
    shutil.rmtree(tmp_path / "pool")
    with pytest.raises(UserError, match=r"pool: iteration-000000\.parquet is missing"):
        small_trainer(tmp_path, num_iterations=4, save_strategy="epoch").train(resume_from_checkpoint=True)
