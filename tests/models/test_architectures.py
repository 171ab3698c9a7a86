"""One short run per architecture, with every kind of tokenizer: what is learned, sampled and saved."""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import torch
from helpers.runs import distinct_rewards, small_trainer
from helpers.tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from quarkrl import QuarkTrainer
from quarkrl.algorithm.pool import DataPool

PROMPTS = ["a b", "c", "d e f g h", "b a c", "e e e e", "f"]

# Architecture, tied output embedding, BOS, kind of PAD. All values of the last three occur.
CASES = [
    ("gpt2", True, False, "eos"),
    ("gpt2", False, False, None),
    ("llama", False, True, "own"),
    ("llama", True, True, None),
    ("qwen3", True, False, "own"),
    ("qwen3", False, False, "eos"),
    ("mistral", False, True, "eos"),
    ("gemma", True, True, "own"),
    ("gemma2", True, True, "own"),
    ("gpt_neox", False, False, "eos"),
    ("gpt_neox", True, False, "own"),
    ("opt", True, True, "own"),
    ("opt", False, True, "eos"),
]


@lru_cache
def tokenizer_of(bos: bool, pad: str | None):
    return tiny_tokenizer(bos=bos, pad=pad, words=[*"abcdefgh"])


def trainer_of(model, tokenizer, directory) -> QuarkTrainer:
    """A small trainer that learns fast."""
    options = {"per_device_train_batch_size": 12, "learning_rate": 1e-2, "warmup_steps": 1}
    return small_trainer(directory, distinct_rewards, model, PROMPTS, processing_class=tokenizer, **options)


@pytest.mark.parametrize(
    ("architecture", "tied", "bos", "pad"),
    CASES,
    ids=[f"{a}-{'tied' if t else 'untied'}-{'bos' if b else 'no_bos'}-pad_{p}" for a, t, b, p in CASES],
)
def test_a_run_trains_the_row_of_each_reward_token_and_samples_none(tmp_path, architecture, tied, bos, pad):
    tokenizer = tokenizer_of(bos, pad)
    model = tiny_model(architecture, tokenizer, tied=tied)
    trainer = trainer_of(model, tokenizer, tmp_path)
    conditioning = trainer.conditioning
    assert conditioning.vocab_size == len(tokenizer)
    rows = conditioning.new_token_ids
    weights = {"input": model.get_input_embeddings().weight, "output": model.get_output_embeddings().weight}
    assert (weights["input"] is weights["output"]) is tied
    before = {name: weight[rows].detach().clone() for name, weight in weights.items()}
    trainer.train()

    for name, weight in weights.items():
        moved = (weight[rows] - before[name]).abs().amax(dim=1)
        assert (moved > 1e-4).all(), name
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and all(map(math.isfinite, losses))
    assert isinstance(trainer.pool, DataPool) and len(trainer.pool) == 12
    for sample in trainer.pool:
        assert sample.completion_ids.max() < conditioning.vocab_size
        assert not bos or sample.prompt_ids[0] == tokenizer.bos_token_id

    final = trainer.save_final()
    plain, steered = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    best = rows[-1]
    expected = [*([tokenizer.bos_token_id] if bos else []), best, 0, 1]
    assert steered("a b")["input_ids"] == expected
    out = plain.generate(torch.tensor([expected] * 32), do_sample=True, max_new_tokens=8, pad_token_id=0)
    assert (out[:, len(expected) :] < conditioning.vocab_size).all()
    with torch.no_grad():
        torch.testing.assert_close(plain(out).logits, trainer.model.eval()(out).logits, rtol=1e-4, atol=1e-4)


def test_rows_that_pad_the_embedding_become_reward_tokens_or_are_never_sampled(tmp_path):
    """Qwen and others have more embedding rows than tokens."""
    tokenizer = tokenizer_of(False, "own")
    model = tiny_model("qwen3", tokenizer, rows=len(tokenizer) + 8)
    trainer = trainer_of(model, tokenizer, tmp_path)
    trainer.train()
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) + 8
    assert trainer.conditioning.vocab_size == len(tokenizer)
    assert max(int(sample.completion_ids.max()) for sample in trainer.pool) < len(tokenizer)
