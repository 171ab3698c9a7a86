"""Perplexity under any model: the policy's own tokens as they are, any other's from the text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.tiny import ARCHITECTURES, tiny_model, tiny_tokenizer

from quarkrl.data.prompts import load_prompts
from quarkrl.evaluation.perplexity import Fluency, by_length, completion_nll, shares_tokens
from quarkrl.models.conditioning import Conditioning
from quarkrl.sampling.generator import QuarkGenerator

WORDS = tiny_tokenizer(words=[*"abcdefgh"])  # a to h are 0 to 7, <unk> 8, <eos> 9.
BYTES = tiny_tokenizer()
EOS_ID = 9


def generator(tokenizer, architecture: str = "gpt2", **options) -> QuarkGenerator:
    return QuarkGenerator(tiny_model(architecture, tokenizer, **options), tokenizer, None)


def nll_by_hand(model, prompt: list[int], completion: list[int]) -> float:
    with torch.no_grad():
        log_p = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return -sum(float(log_p[len(prompt) - 1 + i, token]) for i, token in enumerate(completion))


@pytest.mark.parametrize("batch_size", [1, 2, 128])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_completions_nll_is_its_own_whatever_stands_beside_it(architecture, batch_size):
    model = tiny_model(architecture, WORDS)
    prompts = [[0, 1], [2], [3, 4, 5, 6, 7], [1], [0], [2]]
    completions = [[5], [1, 2, 3, 4, 5, 6], [0, 0], [], [EOS_ID], [1, 2, 3, 4, 5, 6]]
    expected = [nll_by_hand(model, p, c) for p, c in zip(prompts, completions, strict=True)]
    assert expected[3] == 0
    found = completion_nll(model, prompts, completions, batch_size)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found[1] == found[5]


def test_batches_are_of_like_length_and_hold_no_more_than_memory_bears():
    assert list(by_length("abcde", [5, 1, 4, 2, 3], 2)) == [["b", "d"], ["e", "c"], ["a"]]
    assert [len(batch) for batch in by_length(range(5), [2000] * 5, 128)] == [2, 2, 1]  # 4,096 positions
    assert [len(batch) for batch in by_length([0, 1], [9000, 9000], 128)] == [1, 1]


def test_a_model_of_the_same_tokens_reads_them_as_sampled():
    policy, judge = generator(WORDS), generator(WORDS, seed=1)
    prompts = load_prompts(["a b", "c"]).encode(WORDS, max_length=10)
    fluency = Fluency(judge, policy)
    sums, counts, cut = fluency.nll(prompts, [0, 1], [[2, 8], [3]], ["not", "read"], 8)
    assert counts == [2, 1] and cut == 0
    assert sums == pytest.approx([nll_by_hand(judge.model, [0, 1], [2, 8]), nll_by_hand(judge.model, [2], [3])])


def test_a_trained_model_has_the_tokens_of_its_reference():
    plain = generator(WORDS)
    model = tiny_model("gpt2", WORDS)
    conditioning, tokenizer = Conditioning.add_to(WORDS, model, 3)
    assert shares_tokens(QuarkGenerator(model, tokenizer, conditioning), plain)
    assert not shares_tokens(generator(BYTES), plain)


def test_a_model_of_other_tokens_reads_the_text():
    policy, judge = generator(WORDS), generator(BYTES)
    prompts = load_prompts(["a b", "c"]).encode(WORDS, max_length=10)
    sums, counts, _ = Fluency(judge, policy).nll(prompts, [0, 0, 1], [[2], [], [3, 4]], [" cd", "", " é"], 8)
    assert counts == [3, 0, 3]  # é is two bytes.
    ids = [BYTES(text)["input_ids"] for text in ("a b", " cd", "c", " é")]
    assert sums == pytest.approx(
        [nll_by_hand(judge.model, ids[0], ids[1]), 0, nll_by_hand(judge.model, ids[2], ids[3])], rel=1e-5
    )


def test_a_token_that_reaches_over_belongs_to_the_completion():
    """Written as one word, "a" and "b" are one unknown word to a reader of words."""
    policy, judge = generator(BYTES), generator(WORDS)
    prompts = load_prompts(["c a"]).encode(BYTES, max_length=10)
    sums, counts, _ = Fluency(judge, policy).nll(prompts, [0], [[1]], ["b d"], 8)
    assert counts == [2] and sums == pytest.approx([nll_by_hand(judge.model, [2], [8, 3])])


def test_a_completion_with_nothing_before_it_is_read_behind_bos_or_eos():
    policy, judge = generator(BYTES), generator(WORDS)
    prompts = load_prompts(["a"]).encode(BYTES, max_length=10)
    sums, counts, _ = Fluency(judge, policy).nll(prompts, [0], [[1]], ["a b"], 8)  # "aa b"
    assert counts == [2] and sums == pytest.approx([nll_by_hand(judge.model, [EOS_ID], [8, 1])])


def test_what_the_tokenizer_puts_around_a_text_is_not_scored():
    policy, judge = generator(WORDS), generator(tiny_tokenizer(bos=True, eos_after=True))
    prompts = load_prompts(["a"]).encode(WORDS, max_length=10)
    sums, counts, _ = Fluency(judge, policy).nll(prompts, [0], [[1]], [" b"], 8)
    bos = judge.tokenizer.bos_token_id
    a, space, b = (judge.tokenizer(text)["input_ids"][1] for text in ("a", " ", "b"))
    assert counts == [2] and sums == pytest.approx([nll_by_hand(judge.model, [bos, a], [space, b])])


def test_a_chat_is_read_by_the_perplexity_models_own_template_or_else_as_lines():
    prompts = load_prompts([{"prompt": [{"role": "user", "content": "a b"}]}])
    prompts.ids = [[0, 1]]
    policy = generator(WORDS)
    for template, before in ((True, "[user] a b<eos>[assistant]"), (False, "a b\n")):
        judge = generator(tiny_tokenizer(chat_template=template))
        sums, counts, _ = Fluency(judge, policy).nll(prompts, [0], [[2]], [" c"], 8)
        ids = [judge.tokenizer(text)["input_ids"] for text in (before, " c")]
        assert counts == [2] and sums == pytest.approx([nll_by_hand(judge.model, *ids)])


def test_a_prompt_too_long_for_the_perplexity_model_loses_its_beginning_and_is_counted():
    policy, judge = generator(WORDS), generator(BYTES, "llama", max_position_embeddings=8)
    prompts = load_prompts(["a b c d e f"]).encode(WORDS, max_length=10)
    sums, counts, cut = Fluency(judge, policy).nll(prompts, [0], [[6]], [" gh"], 8)
    ids = BYTES("a b c d e f gh")["input_ids"]
    assert cut == 1 and counts == [3]
    assert sums == pytest.approx([nll_by_hand(judge.model, ids[-8:-3], ids[-3:])])
    assert np.isfinite(Fluency(judge, policy).nll(prompts, [0], [[6]], [" g" * 9], 8)[0]).all()
