"""rep, wrep, token accuracy and perplexity of a model on human-written texts, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.evaluation_helpers import WORDS
from helpers.tiny_models import tiny_model

from quarkrl.errors import UserError
from quarkrl.evaluation.corpus import SPANS, corpus_ratios, corpus_row
from quarkrl.models.conditioning import Conditioning
from quarkrl.sampling.generator import QuarkGenerator

TEXTS = [[0, 1, 0, 2, 1, 1], [3], [4, 4, 4, 5], []]


def echoing() -> QuarkGenerator:
    """A GPT-2 with zero layers and a one-hot embedding: it always predicts the token that it has just read."""
    model = tiny_model("gpt2", WORDS, n_embd=16, n_layer=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.wte.weight[:, :10] = torch.eye(10)
        model.transformer.ln_f.weight.fill_(10.0)
    return QuarkGenerator(model, WORDS, None)


def test_the_figures_of_a_model_that_repeats_the_last_token():
    ratios = corpus_ratios(echoing(), TEXTS, "best", 8)
    # a b a c b b: the predictions are a b a c b; the last is right. e e e f: they are e e e; two are right.
    assert ratios["token accuracy"].value == (1 + 2) / 8
    for span in SPANS:
        assert ratios[f"rep/{span}"].value == 1
        assert ratios[f"wrep/{span}"].value == (4 + 1) / 8
    assert ratios["rep"].value == 1 and ratios["wrep"].value == 5 / 8


def test_a_prediction_that_occurred_exactly_l_tokens_before_is_a_repetition():
    generator = echoing()
    with torch.no_grad():
        generator.model.transformer.ln_f.weight.zero_()
        generator.model.transformer.ln_f.bias[0] = 1  # The model always predicts "a", token 0.
    ratios = corpus_ratios(generator, [[0, *[1] * 17]], "best", 8)
    # The predictions for positions 1 to 17 last occurred 1 to 17 tokens before.
    assert ratios["rep/16"].value == ratios["wrep/16"].value == 16 / 17
    assert ratios["rep/32"].value == 1 and ratios["token accuracy"].value == 0
    assert ratios["rep"].value == pytest.approx((16 / 17 + 3) / 4)


def test_each_figure_is_computed_from_the_model_s_predictions():
    generator = QuarkGenerator(tiny_model("gpt2", WORDS), WORDS, None)
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 8, size).tolist() for size in (60, 3, 25)]
    nll, right, repeated, wrong = 0.0, 0, dict.fromkeys(SPANS, 0), dict.fromkeys(SPANS, 0)
    total = 0
    for ids in texts:
        with torch.no_grad():
            log_p = generator.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for t in range(1, len(ids)):
            predicted = int(log_p[t - 1].argmax())
            nll -= float(log_p[t - 1, ids[t]])
            right += predicted == ids[t]
            total += 1
            for span in SPANS:
                hit = predicted in ids[max(0, t - span) : t]
                repeated[span] += hit
                wrong[span] += hit and predicted != ids[t]
    assert repeated[16] < repeated[32]  # Otherwise the spans would not matter.
    for batch_size in (1, 8):
        row = corpus_row("model", generator, texts, "best", batch_size, resamples=200)
        assert row.tokens == total == 85
        assert row.figures["perplexity"] == pytest.approx(np.exp(nll / total), rel=1e-4)
        assert row.figures["token accuracy"] == right / total
        for span in SPANS:
            assert row.figures[f"rep/{span}"] == repeated[span] / total
            assert row.figures[f"wrep/{span}"] == wrong[span] / total
        assert row.figures["rep"] == pytest.approx(np.mean([*repeated.values()]) / total)
        low, high = row.intervals["perplexity"]
        assert low <= row.figures["perplexity"] <= high


def test_a_text_longer_than_the_context_is_split_into_chunks():
    generator = QuarkGenerator(tiny_model("llama", WORDS, max_position_embeddings=4), WORDS, None)
    text = corpus_ratios(generator, [[0, 1, 2, 3, 4, 5, 6, 7, 0]], "best", 8)
    chunks = corpus_ratios(generator, [[0, 1, 2, 3], [4, 5, 6, 7]], "best", 8)  # The last chunk has one token.
    assert text["perplexity"].denominators.tolist() == [6]
    for name, ratio in text.items():
        assert ratio.value == pytest.approx(chunks[name].value, rel=1e-5)


def test_a_trained_model_predicts_after_its_reward_token_over_the_original_vocabulary():
    model = tiny_model("gpt2", WORDS)
    conditioning, tokenizer = Conditioning.add_to(WORDS, model, 2)
    generator = QuarkGenerator(model, tokenizer, conditioning)
    for quantile, token in (("worst", 10), ("best", 11)):
        with torch.no_grad():
            log_p = model(torch.tensor([[token, 0, 1, 2]])).logits[0, :, :10].log_softmax(-1)
        expected = -float(log_p[1, 1] + log_p[2, 2]) / 2
        assert corpus_ratios(generator, [[0, 1, 2]], quantile, 8)["perplexity"].value == pytest.approx(expected)


def test_reward_tokens_behind_several_special_tokens_are_read_and_not_predicted():
    model = tiny_model("gpt2", WORDS)
    conditioning, tokenizer = Conditioning.add_to(WORDS, model, 2)
    conditioning = replace(conditioning, start_ids=(3, 4))
    with torch.no_grad():
        log_p = model(torch.tensor([[3, 4, 11, 0, 1]])).logits[0, :, :10].log_softmax(-1)
    expected = -float(log_p[0, 4] + log_p[2, 0] + log_p[3, 1]) / 3
    ratios = corpus_ratios(QuarkGenerator(model, tokenizer, conditioning), [[3, 4, 0, 1]], "best", 8)
    assert ratios["perplexity"].value == pytest.approx(expected)


def test_texts_of_fewer_than_two_tokens_are_counted_and_a_corpus_of_them_is_an_error():
    row = corpus_row("model", echoing(), TEXTS, "best", 8, resamples=100)
    assert row.left_out == {"shorter than 2 tokens": 2} and row.tokens == 8
    with pytest.raises(UserError, match=r"^corpus: .* two tokens"):
        corpus_row("model", echoing(), [[1], []], "best", 8, resamples=100)
