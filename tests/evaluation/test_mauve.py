"""MAUVE from the package `mauve-text`, on features of a tiny model and on random features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.kinds_of_tokenizers import llama_tokenizer
from helpers.tiny_models import tiny_model, tiny_tokenizer

from quarkrl.errors import UserError
from quarkrl.evaluation.mauve import mauve, text_features
from quarkrl.sampling.generator import QuarkGenerator

BYTES = tiny_tokenizer()


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "opt", "gpt_neox"])
def test_a_feature_is_the_last_hidden_state_over_prompt_and_truncated_text(architecture):
    generator = QuarkGenerator(tiny_model(architecture, BYTES, max_position_embeddings=32), BYTES, None)
    prompts, texts = ["ab", "c", "ab", "x" * 40], [" cde", " long", " cde", "y"]
    features = text_features(generator, prompts, texts, max_tokens=3, batch_size=2)
    for prompt, text, row in zip(prompts, [" cd", " lo", " cd", "y"], features, strict=True):
        limit = generator.context_length
        ids = torch.tensor([BYTES(prompt + text)["input_ids"][-limit:]])
        with torch.no_grad():
            states = generator.model(ids, output_hidden_states=True).hidden_states[-1]
        assert row == pytest.approx(states[0, -1].numpy(), abs=1e-5)
    assert features.shape == (4, 16) and (features[0] == features[2]).all()


def test_prompt_and_text_are_tokenized_together_and_special_tokens_in_them_are_text():
    """SentencePiece would put a space before a text by itself."""
    tokenizer = llama_tokenizer()
    generator = QuarkGenerator(tiny_model("llama", tokenizer), tokenizer, None)
    texts = ["b", " nice", "</s>", "< /s>"]
    features = text_features(generator, ["You"] * 4, texts, max_tokens=5, batch_size=4)
    for row, tokens in zip(features, (["b"], ["▁nice"], ["<", "▁", *"/s>"]), strict=False):
        ids = torch.tensor([tokenizer.convert_tokens_to_ids(["▁You", *tokens])])
        with torch.no_grad():
            states = generator.model(ids, output_hidden_states=True).hidden_states[-1]
        assert row == pytest.approx(states[0, -1].numpy(), abs=1e-5)
    assert (features[2] == features[3]).all()


def test_a_text_without_tokens_is_an_error():
    generator = QuarkGenerator(tiny_model("gpt2", BYTES), BYTES, None)
    with pytest.raises(UserError, match="no tokens"):
        text_features(generator, ["a", ""], ["b", ""], max_tokens=3, batch_size=2)


def test_mauve_is_1_for_the_same_texts_and_falls_with_their_distance(capfd):
    pytest.importorskip("mauve")
    rng = np.random.default_rng(0)
    human, alike, other = rng.normal(size=(200, 8)), rng.normal(size=(200, 8)), rng.normal(size=(200, 8)) + 1
    values = {name: mauve(x, human) for name, x in (("same", human), ("alike", alike), ("other", other))}
    assert values["same"][0] == pytest.approx(1)
    assert values["other"][0] < 0.5 < 0.9 < values["alike"][0]
    for value, (low, high) in values.values():
        assert 0 <= low < value <= high <= 1 and high - low < 0.5
    assert mauve(other, human) == values["other"]
    assert capfd.readouterr().err == ""  # No warning of faiss about few points.


def test_mauve_of_too_few_texts_is_an_error():
    pytest.importorskip("mauve")
    with pytest.raises(UserError, match="19 completions and 30 human texts: must be at least 20"):
        mauve(np.zeros((19, 4)), np.zeros((30, 4)))
