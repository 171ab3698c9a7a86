"""Perplexity under any model: it reads the policy's token ids, or the text if its vocabulary is another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.eight_letters import EOS_ID
from helpers.evaluation_helpers import WORDS, nll_by_hand
from helpers.kinds_of_tokenizers import llama_tokenizer
from helpers.tiny_models import ARCHITECTURES, tiny_model, tiny_tokenizer

from quarkrl.data.prompts import load_prompts
from quarkrl.evaluation.perplexity import PerplexityModel, completion_nll, has_same_vocabulary
from quarkrl.models.conditioning import Conditioning
from quarkrl.sampling.generator import QuarkGenerator

BYTES = tiny_tokenizer()


def generator(tokenizer, architecture: str = "gpt2", **options) -> QuarkGenerator:
    return QuarkGenerator(tiny_model(architecture, tokenizer, **options), tokenizer, None)


@pytest.mark.parametrize("batch_size", [1, 2, 128])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_nll_of_a_completion_does_not_depend_on_its_batch(architecture, batch_size):
    model = tiny_model(architecture, WORDS)
    prompts = [[0, 1], [2], [3, 4, 5, 6, 7], [1], [0], [2]]
    completions = [[5], [1, 2, 3, 4, 5, 6], [0, 0], [], [EOS_ID], [1, 2, 3, 4, 5, 6]]
    expected = [nll_by_hand(model, p, c) for p, c in zip(prompts, completions, strict=True)]
    assert expected[3] == 0
    sums = completion_nll(model, prompts, completions, len(WORDS), batch_size)
    assert sums == pytest.approx(expected, rel=1e-4)
    assert sums[1] == sums[5]


def test_reward_tokens_have_no_probability_in_the_perplexity_of_the_policy_itself():
    """Their rows are drawn at random, so before training they have about 3 of 13 parts of the probability."""
    model = tiny_model("gpt2", WORDS)
    conditioning, tokenizer = Conditioning.add_to(WORDS, model, 3)
    policy = QuarkGenerator(model, tokenizer, conditioning)
    prompts = load_prompts(["a b"]).encode(WORDS, max_length=10)
    (nll,), _, _ = PerplexityModel(policy, policy).nll(prompts, [0], [[2]], [""], 8)
    logits = model(torch.tensor([[0, 1]])).logits[0, -1, : conditioning.vocab_size]
    assert nll == pytest.approx(-float(logits.log_softmax(-1)[2].detach()), rel=1e-5)


def test_a_model_with_the_same_vocabulary_reads_the_sampled_ids():
    policy, judge = generator(WORDS), generator(WORDS, seed=1)
    prompts = load_prompts(["a b", "c"]).encode(WORDS, max_length=10)
    sums, counts, truncated = PerplexityModel(judge, policy).nll(prompts, [0, 1], [[2, 8], [3]], ["not", "read"], 8)
    assert counts == [2, 1] and truncated == 0
    assert sums == pytest.approx([nll_by_hand(judge.model, [0, 1], [2, 8]), nll_by_hand(judge.model, [2], [3])])


def test_a_trained_model_has_the_vocabulary_of_its_reference():
    plain = generator(WORDS)
    model = tiny_model("gpt2", WORDS)
    conditioning, tokenizer = Conditioning.add_to(WORDS, model, 3)
    assert has_same_vocabulary(QuarkGenerator(model, tokenizer, conditioning), plain)
    assert not has_same_vocabulary(generator(BYTES), plain)


def test_a_model_with_another_vocabulary_reads_the_text():
    policy, judge = generator(WORDS), generator(BYTES)
    prompts = load_prompts(["a b", "c"]).encode(WORDS, max_length=10)
    sums, counts, _ = PerplexityModel(judge, policy).nll(prompts, [0, 0, 1], [[2], [], [3, 4]], [" cd", "", " é"], 8)
    assert counts == [3, 0, 3]  # é is two bytes.
    ids = [BYTES(text)["input_ids"] for text in ("a b", " cd", "c", " é")]
    assert sums == pytest.approx(
        [nll_by_hand(judge.model, ids[0], ids[1]), 0, nll_by_hand(judge.model, ids[2], ids[3])], rel=1e-5
    )


def test_a_token_that_spans_prompt_and_completion_belongs_to_the_completion():
    """The prompt "c a" and the completion "b" give one word, "ab", which a word-level tokenizer does not know."""
    policy, judge = generator(BYTES), generator(WORDS)
    prompts = load_prompts(["c a"]).encode(BYTES, max_length=10)
    sums, counts, _ = PerplexityModel(judge, policy).nll(prompts, [0], [[1]], ["b d"], 8)
    assert counts == [2] and sums == pytest.approx([nll_by_hand(judge.model, [2], [8, 3])])


def test_a_completion_with_nothing_before_it_is_read_behind_bos_or_eos():
    policy, judge = generator(BYTES), generator(WORDS)
    prompts = load_prompts(["a"]).encode(BYTES, max_length=10)
    sums, counts, _ = PerplexityModel(judge, policy).nll(prompts, [0], [[1]], ["a b"], 8)  # "aa b"
    assert counts == [2] and sums == pytest.approx([nll_by_hand(judge.model, [EOS_ID], [8, 1])])


def test_special_tokens_around_a_text_are_not_scored():
    policy, judge = generator(WORDS), generator(tiny_tokenizer(bos=True, eos_after=True))
    prompts = load_prompts(["a"]).encode(WORDS, max_length=10)
    sums, counts, _ = PerplexityModel(judge, policy).nll(prompts, [0], [[1]], [" b"], 8)
    bos = judge.tokenizer.bos_token_id
    a, space, b = (judge.tokenizer(text)["input_ids"][1] for text in ("a", " ", "b"))
    assert counts == [2] and sums == pytest.approx([nll_by_hand(judge.model, [bos, a], [space, b])])


def test_a_chat_is_rendered_by_the_perplexity_model_s_template_or_as_lines():
    prompts = load_prompts([{"prompt": [{"role": "user", "content": "a b"}]}])
    prompts.ids = [[0, 1]]
    policy = generator(WORDS)
    for template, before in ((True, "[user] a b<eos>[assistant]"), (False, "a b\n")):
        judge = generator(tiny_tokenizer(chat_template=template))
        sums, counts, _ = PerplexityModel(judge, policy).nll(prompts, [0], [[2]], [" c"], 8)
        ids = [judge.tokenizer(text)["input_ids"] for text in (before, " c")]
        assert counts == [2] and sums == pytest.approx([nll_by_hand(judge.model, *ids)])


def test_a_prompt_too_long_for_the_perplexity_model_is_truncated_on_the_left_and_counted():
    policy, judge = generator(WORDS), generator(BYTES, "llama", max_position_embeddings=8)
    prompts = load_prompts(["a b c d e f"]).encode(WORDS, max_length=10)
    sums, counts, truncated = PerplexityModel(judge, policy).nll(prompts, [0], [[6]], [" gh"], 8)
    ids = BYTES("a b c d e f gh")["input_ids"]
    assert truncated == 1 and counts == [3]
    assert sums == pytest.approx([nll_by_hand(judge.model, ids[-8:-3], ids[-3:])])
    assert np.isfinite(PerplexityModel(judge, policy).nll(prompts, [0], [[6]], [" g" * 9], 8)[0]).all()


def test_special_tokens_that_a_completion_spells_are_read_as_text():
    """The policy wrote the characters; the EOS of the perplexity model would be one improbable token."""
    policy, judge = generator(WORDS), generator(tiny_tokenizer(bos=True))
    chat = [{"role": "user", "content": "a"}]
    judge.tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    prompts = load_prompts([{"prompt": "a"}, {"prompt": chat}])
    prompts.ids = [[0], [0]]
    _, counts, _ = PerplexityModel(judge, policy).nll(prompts, [0, 1], [[1], [1]], ["<eos>", "<eos>"], 8)
    assert counts == [5, 6]  # Behind a chat template, which parses special tokens, a space breaks them.


def test_a_completion_is_tokenized_with_its_chat():
    """SentencePiece would put a space before a completion by itself."""
    tokenizer = llama_tokenizer(chat_template="{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    policy, judge = generator(WORDS), generator(tokenizer, "llama")
    prompts = load_prompts([{"prompt": [{"role": "user", "content": "You"}]}])
    prompts.ids = [[0]]
    sums, counts, _ = PerplexityModel(judge, policy).nll(prompts, [0, 0], [[1], [1]], [" nice", "b"], 8)
    head, nice, b = tokenizer("You")["input_ids"], *tokenizer.convert_tokens_to_ids(["▁nice", "b"])
    assert counts == [1, 1]
    assert sums == pytest.approx([nll_by_hand(judge.model, head, [nice]), nll_by_hand(judge.model, head, [b])])
