"""Guidance of each attribute by its own γ: the formula, and that one attribute is guided as by a number."""

from __future__ import annotations

import pytest
import torch
from helpers.errors import error_message
from helpers.tiny_models import tiny_model, tiny_tokenizer

from quarkrl.models.conditioning import Conditioning
from quarkrl.sampling.guidance import Contrast, GuidanceOptions, guided_logits, make_contrast
from quarkrl.sampling.options import count_passes, read_scale
from quarkrl.sampling.sampler import complete
from quarkrl.sampling.strategy import Sampling

PROMPTS = [[10, 20, 30], [40], [50, 60, 70, 80, 90, 100], [11, 21]]
GREEDY, CHANCE = Sampling(max_new_tokens=6, do_sample=False), Sampling(max_new_tokens=8, top_p=0.8)


def trained(*attributes):
    """A tiny model with three quantiles of each attribute, and its conditioning."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("gpt2", tokenizer)
    conditioning, _ = Conditioning.add_to(tokenizer, model, 3, attributes)
    return model, conditioning


def run(model, conditioning, scale, sampling=GREEDY, quantile="best", guidance_from="worst", **options):
    """Completions of the prompts, guided."""
    contrast = make_contrast(conditioning, PROMPTS, GuidanceOptions(scale, guidance_from), quantile)
    wanted = [conditioning.prefix(ids, conditioning.quantiles_of(quantile)) for ids in PROMPTS]
    options = {"end_ids": [256], "vocab_size": 257, "seed": 0, **options}
    return complete(model, wanted, sampling, contrast=contrast, **options)


def test_one_attribute_is_guided_exactly_as_by_a_number():
    model, conditioning = trained("polite")
    for sampling in (GREEDY, CHANCE):
        assert run(model, conditioning, "polite=3", sampling) == run(model, conditioning, 3.0, sampling)


def test_the_formula_of_two_contrasts_by_hand():
    """Of .5 .5, γ = 2 against .8 .2 multiplies by .5/.8 and .5/.2; γ = 3 against .25 .75 by 2² and (2/3)²."""
    wanted, first, second = (torch.tensor([p]).log() for p in ([0.5, 0.5], [0.8, 0.2], [0.25, 0.75]))
    both = guided_logits(wanted, [first, second], [2.0, 3.0]).exp()[0]
    assert both.tolist() == pytest.approx([0.5 * 0.625 * 4, 0.5 * 2.5 * 4 / 9])


@torch.no_grad()
def by_hand(model, conditioning, prompt, scales, steps):
    """Greedy guidance of one prompt by each attribute: no cache, no padding, no batch."""

    def log_p(quantiles, tokens):
        ids = torch.tensor([[*conditioning.prefix(prompt, quantiles), *tokens]])
        return model(ids).logits[0, -1, :257].log_softmax(-1)

    tokens = []
    while len(tokens) < steps and 256 not in tokens:
        best = log_p((2, 2), tokens)
        contrasts = [log_p((0, 2), tokens), log_p((2, 0), tokens)]
        guided = best + sum((scale - 1) * (best - other) for scale, other in zip(scales, contrasts, strict=True))
        tokens.append(int(guided.argmax()))
    return tokens


def test_each_contrast_differs_in_its_own_attribute_alone():
    model, conditioning = trained("polite", "short")
    completions = run(model, conditioning, "polite=4,short=2.5")
    assert completions == [by_hand(model, conditioning, prompt, (4, 2.5), 6) for prompt in PROMPTS]
    assert run(model, conditioning, "short=2.5") == [by_hand(model, conditioning, p, (1, 2.5), 6) for p in PROMPTS]
    assert completions != run(model, conditioning, "polite=2.5,short=4")


def test_batches_do_not_change_the_completions():
    model, conditioning = trained("polite", "short")
    whole = run(model, conditioning, "polite=4,short=2.5", CHANCE)
    assert run(model, conditioning, "polite=4,short=2.5", CHANCE, batch_size=2) == whole


def test_a_scale_of_1_for_all_is_unguided():
    model, conditioning = trained("polite", "short")
    assert run(model, conditioning, "polite=1,short=1", CHANCE) == run(model, conditioning, 1.0, CHANCE)
    assert make_contrast(conditioning, [[5]], GuidanceOptions("polite=1")).is_off


def test_the_wanted_quantile_of_an_unguided_attribute_may_be_any():
    _, conditioning = trained("polite", "short")
    options = GuidanceOptions("polite=2")
    contrast = make_contrast(conditioning, [[5]], options, "polite=best,short=worst")
    assert contrast == Contrast((2.0,), [conditioning.prefix([5], (0, 0))])


@pytest.mark.parametrize(
    ("scale", "guidance_from", "piece"),
    [
        (
            "polite=2,sort=1",
            "worst",
            "must name rewards that condition, which are polite, short. Did you mean 'short'?",
        ),
        ("polite=2,polite=3", "worst", "must have one NAME=γ for each reward"),
        ("polite=x", "worst", "must be a number, or NAME=γ,NAME=γ"),
        ("polite=-1", "worst", "must be finite and at least 0"),
        ("polite=2", "reference", "must be one number if guidance is from the reference"),
        ("polite=2", "best", "must differ from quantile 'best' in polite"),
    ],
)
def test_an_invalid_scale_is_an_error_with_the_remedy(scale, guidance_from, piece):
    _, conditioning = trained("polite", "short")
    options = GuidanceOptions(scale, guidance_from)
    error_message(lambda: make_contrast(conditioning, [[5]], options), piece)


def test_each_guided_attribute_takes_a_forward_pass():
    assert [count_passes(scale) for scale in (1, 2, "a=2,b=1", "a=2,b=3")] == [1, 2, 2, 3]
    assert read_scale("2.5") == 2.5 and read_scale("a=2, b=3") == {"a": 2.0, "b": 3.0}
