"""CachedDecoder: the logits of a forward pass without cache, whatever shares the batch."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from helpers.tiny_models import ARCHITECTURES, tiny_model, tiny_tokenizer

from quarkrl.sampling.decoder import CachedDecoder

PROMPTS = [[10, 20, 30], [40], [10, 20, 30]]
CPU = torch.device("cpu")


def next_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_a_forward_pass_without_cache(architecture):
    model = tiny_model(architecture, tiny_tokenizer())
    decoder = CachedDecoder.for_prompts(model, PROMPTS, CPU)
    torch.testing.assert_close(decoder.prefill(), torch.stack([next_logits(model, ids) for ids in PROMPTS]))
    found = decoder.step(torch.tensor([1, 2, 3]))
    expected = [next_logits(model, [*ids, token]) for ids, token in zip(PROMPTS, [1, 2, 3], strict=True)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)
    decoder.select(torch.tensor([2, 1]))
    assert decoder.batch_size == 2
    found = decoder.step(torch.tensor([4, 5]))
    expected = [next_logits(model, [10, 20, 30, 3, 4]), next_logits(model, [40, 2, 5])]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_equal_prompts_are_processed_once(gpt2):
    shapes = []
    gpt2.register_forward_pre_hook(
        lambda _module, _args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    decoder = CachedDecoder.for_prompts(gpt2, PROMPTS, CPU)
    assert len(decoder.prefill()) == 3 and len(decoder.step(torch.tensor([1, 2, 3]))) == 3
    assert shapes == [(2, 3), (3, 1)]


def test_a_context_provides_the_model_for_each_forward_pass(gpt2):
    entries = []

    @contextmanager
    def source():
        entries.append("enter")
        yield gpt2
        entries.append("exit")

    decoder = CachedDecoder.for_prompts(source, PROMPTS, CPU)
    torch.testing.assert_close(decoder.prefill()[1], next_logits(gpt2, [40]))
    decoder.step(torch.tensor([1, 2, 3]))
    assert entries == ["enter", "exit"] * 2
