"""Guidance in an engine: the rows of a group choose one token, as the built-in sampler does from the same model."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.tiny_models import tiny_model, tiny_tokenizer

from quarkrl.errors import UserError
from quarkrl.models.conditioning import Conditioning
from quarkrl.sampling.engine_guidance import (
    GroupMember,
    choose_tokens,
    guide_rows,
    read_guidance,
)
from quarkrl.sampling.guidance import GuidanceOptions, find_contrast, make_contrast
from quarkrl.sampling.sampler import sample
from quarkrl.sampling.strategy import Sampling
from quarkrl.sampling.vllm_guidance import GROUP, GuidanceLogitsProcessor

PROMPTS = [[10, 20, 30], [40], [50, 60, 70, 80]]
SCALES = [2.0, 0.5, 3.0]
LENGTH, MIN_LENGTH = 8, 3
PLAIN = {"seed": 0, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
MAIN = GroupMember("a", 0, (2.0,), "both", vocab_size=4, end_ids=(), ends_from=0, **PLAIN)
ATTRIBUTES = ["polite", "short"]


def train(*attributes: str):
    tokenizer = tiny_tokenizer()
    model = tiny_model("gpt2", tokenizer).eval()
    conditioning, _ = Conditioning.add_to(tokenizer, model, 3, attributes)
    return model, conditioning


@pytest.fixture(scope="module")
def trained():
    return train("reward")


@torch.no_grad()
def next_logits(model, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0, -1].float()


def engine_completions(model, conditioning, scales=SCALES, rule="both", **options) -> list[list[int]]:
    """Completions of guided requests in one batch, each with its contrasts and its own γ."""
    sequences, members = [], []
    for i, (ids, scale) in enumerate(zip(PROMPTS, scales, strict=True)):
        best = conditioning.prefix(ids, conditioning.best)
        contrast = find_contrast(conditioning, best, GuidanceOptions(scale, "worst", rule))
        main = replace(
            MAIN,
            group_id=str(i),
            scales=contrast.scales,
            rule=contrast.rule,
            vocab_size=conditioning.vocab_size,
            ends_from=len(best) + MIN_LENGTH,
            **options,
        )
        sequences += [list(prompt) for prompt in (best, *contrast.prompt_ids)]
        members += [replace(main, part=part) for part in range(1 + len(contrast.scales))]
    order = np.random.default_rng(0).permutation(len(members)).tolist()  # The rows of a group are not adjacent.
    for _ in range(LENGTH):
        logits = torch.stack([next_logits(model, sequences[i]) for i in order])
        logits = guide_rows(logits, {row: (members[i], len(sequences[i])) for row, i in enumerate(order)})
        for row, i in enumerate(order):
            sequences[i].append(int(logits[row].argmax()))
    completions = {member.group_id: ids[-LENGTH:] for member, ids in zip(members, sequences, strict=True)}
    assert all(completions[m.group_id] == ids[-LENGTH:] for m, ids in zip(members, sequences, strict=True))
    return list(completions.values())


def built_in_completions(
    model, conditioning, sampling, uniforms, scales=SCALES, rule="both", end_ids=()
) -> list[list[int]]:
    completions = []
    for i, (ids, scale) in enumerate(zip(PROMPTS, scales, strict=True)):
        contrast = make_contrast(conditioning, [ids], GuidanceOptions(scale, "worst", rule))
        numbers = None if uniforms is None else uniforms[i : i + 1]
        best = conditioning.prefix(ids, conditioning.best)
        options = {"end_ids": end_ids, "vocab_size": conditioning.vocab_size, "contrast": contrast}
        completions += sample(model, [best], sampling, numbers, **options)
    return completions


GREEDY = Sampling(max_new_tokens=LENGTH, do_sample=False)


def test_greedy_tokens_equal_those_of_the_built_in_sampler(trained):
    assert engine_completions(*trained) == built_in_completions(*trained, GREEDY, None)


def test_greedy_tokens_of_the_rule_lower_equal_those_of_the_built_in_sampler(trained):
    completions = engine_completions(*trained, rule="lower")
    assert completions == built_in_completions(*trained, GREEDY, None, rule="lower")
    assert completions != engine_completions(*trained)


def test_greedy_tokens_with_a_scale_for_each_reward_equal_those_of_the_built_in_sampler():
    """One batch has groups of two and of three requests."""
    trained, scales = train(*ATTRIBUTES), ["polite=3,short=0.5", "polite=1,short=4", 2.0]
    assert engine_completions(*trained, scales) == built_in_completions(*trained, GREEDY, None, scales)


@pytest.mark.parametrize("rule", ["both", "lower"])
def test_eos_is_ruled_out_after_guidance_as_in_the_built_in_sampler(trained, rule):
    """The first tokens that the model prefers end a completion."""
    first = {ids[0] for ids in built_in_completions(*trained, GREEDY, None, rule=rule)}
    sampling = replace(GREEDY, min_new_tokens=MIN_LENGTH)
    expected = built_in_completions(*trained, sampling, None, rule=rule, end_ids=[*first])
    completions = engine_completions(*trained, rule=rule, end_ids=(*first,))
    assert [ids[: len(wanted)] for ids, wanted in zip(completions, expected, strict=True)] == expected
    assert all(not first & {*ids[:MIN_LENGTH]} for ids in completions)


def test_sampled_tokens_equal_those_of_the_built_in_sampler_with_the_same_random_numbers(trained):
    sampling = Sampling(max_new_tokens=LENGTH, temperature=0.7, top_p=0.8)
    first = [len(ids) + 1 for ids in PROMPTS]
    uniforms = [
        [np.random.default_rng((5, length + step)).random(dtype=np.float32) for step in range(LENGTH)]
        for length in first
    ]
    expected = built_in_completions(*trained, sampling, np.array(uniforms))
    assert engine_completions(*trained, seed=5, temperature=0.7, top_p=0.8) == expected


def test_a_token_by_hand():
    # log p: main (.5 .3 .2), contrast (.6 .1 .3). γ = 2 takes main² / contrast: .42, .9, .13.
    logits = torch.tensor([[0.5, 0.3, 0.2, 0.9], [0.6, 0.1, 0.3, 0.9], [0.1, 0.2, 0.3, 0.4]]).log()
    others = logits[2].clone()
    main = replace(MAIN, vocab_size=3)
    guide_rows(logits, {0: (main, 5), 1: (replace(main, part=1), 5)})
    only_the_second = [-torch.inf, 0.0, -torch.inf, -torch.inf]
    assert logits[:2].tolist() == [only_the_second, only_the_second]
    assert torch.equal(logits[2], others)


def test_a_request_without_its_partner_keeps_its_logits():
    logits = torch.rand(2, 4)
    expected = logits.clone()
    assert torch.equal(guide_rows(logits, {0: (MAIN, 5), 1: (replace(MAIN, group_id="b", part=1), 5)}), expected)


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.5}, {0, 1}),
        ({"min_p": 0.7}, {0, 1}),
        ({"top_k": 1}, {0}),
        ({"temperature": 0.0}, {0}),
        ({}, {0, 1, 2}),
    ],
)
def test_each_completion_has_its_own_sampling_options(options, tokens):
    logits = torch.tensor([[0.4, 0.35, 0.25]]).log().repeat(100, 1)
    chance = replace(MAIN, temperature=1.0)
    members = [replace(chance, seed=i, **options) for i in range(50)] + [replace(chance, seed=i) for i in range(50)]
    chosen = choose_tokens(logits, members, [3] * 100).tolist()
    assert set(chosen[:50]) == tokens
    assert set(chosen[50:]) == {0, 1, 2}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (None, None),
        ({"other": 1}, None),
        ({"guidance_scale": 1}, None),
        ({"guidance_scale": "polite=1,short=1"}, None),
        (
            {"guidance_scale": "polite=2,short=1", "guidance_rule": "lower"},
            GuidanceOptions("polite=2,short=1", "worst", "lower"),
        ),
        ({"guidance_scale": 2}, GuidanceOptions(2, "worst")),
        ({"guidance_scale": 0.5, "guidance_from": 1}, GuidanceOptions(0.5, 1)),
    ],
)
def test_the_arguments_of_a_request(arguments, expected):
    assert read_guidance(arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": "two"}, "guidance_scale 'two': must be a number, or NAME=γ,NAME=γ"),
        ({"guidance_scale": True}, "guidance_scale True: must be a number"),
        ({"guidance_rule": "lower"}, "guidance_rule 'lower': must be used with guidance_scale"),
        ({"guidance_scale": 2, "guidance_rule": "raise"}, "guidance_rule 'raise': must be both or lower"),
        ({"guidance_scale": -1}, "guidance_scale -1: must be finite and at least 0"),
        ({"guidance_from": "worst"}, "guidance_from 'worst': must be used with guidance_scale"),
        ({"guidance_scale": 2, "guidance_from": "reference"}, "guidance_from 'reference': must be worst, best or"),
    ],
)
def test_wrong_arguments_of_a_request(arguments, message):
    with pytest.raises(UserError, match=message):
        read_guidance(arguments)


def test_the_contrast_of_a_prompt(trained):
    conditioning = trained[1]
    best = conditioning.prefix([10, 20], conditioning.best)
    for guidance_from, quantile in (("worst", 0), (1, 1)):
        contrast = find_contrast(conditioning, best, GuidanceOptions(2.0, guidance_from))
        assert contrast.prompt_ids == [[conditioning.prefixes[0][quantile][0], 10, 20]] and contrast.scales == (2.0,)


def test_the_contrasts_of_a_prompt_keep_its_other_quantiles():
    _, conditioning = train(*ATTRIBUTES)
    prompt = conditioning.prefix([10, 20], (1, 2))
    contrast = find_contrast(conditioning, prompt, GuidanceOptions("polite=2,short=3", "worst"))
    assert contrast.prompt_ids == [conditioning.prefix([10, 20], quantiles) for quantiles in ((0, 2), (1, 0))]
    assert contrast.scales == (2.0, 3.0)


def test_a_prompt_that_has_no_contrast(trained):
    conditioning = trained[1]
    best = conditioning.prefix([10, 20], conditioning.best)
    with pytest.raises(UserError, match="guidance_from 'best': must differ from quantile 'reward=2'"):
        find_contrast(conditioning, best, GuidanceOptions(2.0, "best"))
    with pytest.raises(UserError, match="must be used with prompts that start with reward tokens"):
        find_contrast(conditioning, [10, 20], GuidanceOptions(2.0, "worst"))
    with pytest.raises(UserError, match="must be used with a model that Quark trained"):
        find_contrast(None, [10, 20], GuidanceOptions(2.0, "worst"))


# The processor, as vLLM's second model runner calls it. tests/sampling/test_vllm_guidance.py runs vLLM itself.


def request_parameters(**arguments) -> SimpleNamespace:
    neutral = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "prompt_logprobs": None}
    return SimpleNamespace(extra_args=arguments, eos_token_id=1, all_stop_token_ids={1}, **neutral)


def test_the_second_model_runner_names_requests_by_slot():
    processor = GuidanceLogitsProcessor(None, None)
    main = replace(MAIN, vocab_size=3)
    assert processor.add_request(7, request_parameters(**{GROUP: replace(main, part=1)}))
    assert processor.add_request(4, request_parameters(**{GROUP: main}))
    assert not processor.add_request(2, request_parameters())
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.6, 0.1, 0.3, 0.9], [0.5, 0.3, 0.2, 0.9]]).log()
    batch = SimpleNamespace(idx_mapping_np=np.array([2, 7, 4]), seq_lens_upper_bound_np=np.array([9, 5, 5]))
    assert processor.apply(logits, batch).argmax(-1).tolist() == [3, 1, 1]
    assert not processor.add_request(7, request_parameters())
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.6, 0.1, 0.3, 0.9], [0.5, 0.3, 0.2, 0.9]]).log()
    assert processor.apply(logits, batch).argmax(-1).tolist() == [3, 3, 3]


def test_a_guided_request_ends_at_once_where_no_scheduler_makes_its_pair():
    processor = GuidanceLogitsProcessor(None, None)
    assert processor.add_request(0, request_parameters(guidance_scale=2))
    batch = SimpleNamespace(idx_mapping_np=np.array([0]), seq_lens_upper_bound_np=np.array([5]))
    assert processor.apply(torch.tensor([[0.1, 0.2, 0.3, 0.4]]), batch).argmax(-1).tolist() == [1]


def test_options_without_effect_are_refused():
    parameters = request_parameters(guidance_scale=2)
    GuidanceLogitsProcessor.validate_params(parameters)
    parameters.repetition_penalty = 1.2
    with pytest.raises(UserError, match=r"repetition_penalty 1\.2: must be 1\.0 with guidance_scale"):
        GuidanceLogitsProcessor.validate_params(parameters)
    with pytest.raises(UserError, match="quarkrl_group: must not be set by a client"):
        GuidanceLogitsProcessor.validate_params(request_parameters(**{GROUP: MAIN}))
