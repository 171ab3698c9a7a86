"""Perplexity of completions under any causal language model, given their prompts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quarkrl.data.encoding import encode_plain_texts, encode_prompts
from quarkrl.data.prompts import Prompts
from quarkrl.errors import UserError
from quarkrl.evaluation.predictions import predict
from quarkrl.models.batching import batches_by_length, build_batch
from quarkrl.sampling.generator import QuarkGenerator


class PerplexityModel:
    """A model that computes the perplexity of a policy's completions.

    A model with the policy's vocabulary reads the token ids as they were sampled. Any other model reads text: prompt
    and completion are tokenized together, and a token that spans both belongs to the completion.

    Args:
        generator: the model that computes perplexity.
        policy: the model that writes the completions.
    """

    def __init__(self, generator: QuarkGenerator, policy: QuarkGenerator):
        self.generator = generator
        self.same_vocabulary = generator is policy or has_same_vocabulary(generator, policy)

    def nll(
        self,
        prompts: Prompts,
        prompt_numbers: Sequence[int],
        completion_ids: Sequence[Sequence[int]],
        texts: Sequence[str],
        batch_size: int,
    ) -> tuple[list[float], list[int], int]:
        """Compute, for each completion, the sum of its tokens' negative log-likelihoods in nats.

        Args:
            prompts: P prompts with their `ids`.
            prompt_numbers: for each completion, the index of its prompt.
            completion_ids: token ids of the completions, without EOS.
            texts: the completions as text.
            batch_size: completions per batch.

        Returns:
            The sums, the numbers of tokens, and how many completions were read with a truncated prompt. A prompt is
            truncated on the left to fit the context, and a completion longer than the context on the right.
        """
        if self.same_vocabulary:
            heads, tails = [prompts.ids[i] for i in prompt_numbers], [list(ids) for ids in completion_ids]
        else:
            heads, tails = _tokenize_pairs(
                self.generator.tokenizer, [prompts.prompts[i] for i in prompt_numbers], texts
            )
        context_length = self.generator.context_length
        truncated = sum(len(head) + len(tail) > context_length for head, tail in zip(heads, tails, strict=True))
        tails = [tail[: context_length - 1] for tail in tails]
        heads = [head[-(context_length - len(tail)) :] for head, tail in zip(heads, tails, strict=True)]
        sums = completion_nll(self.generator.model, heads, tails, self.generator.vocab_size, batch_size)
        return sums, [len(tail) for tail in tails], truncated


def has_same_vocabulary(one: QuarkGenerator, other: QuarkGenerator) -> bool:
    """Return whether two models have the same tokens, with the same ids, in their original vocabularies."""
    first, second = (
        {token: i for token, i in generator.tokenizer.get_vocab().items() if i < generator.vocab_size}
        for generator in (one, other)
    )
    return first == second


def completion_nll(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    vocab_size: int,
    batch_size: int,
) -> list[float]:
    """Return, for each completion, the sum of its tokens' negative log-likelihoods given its prompt, in nats.

    The likelihoods are over the original vocabulary, of size `vocab_size`. The sum of an empty completion is 0. A
    repeated pair of prompt and completion is computed once.
    """
    pairs = [(tuple(prompt), tuple(completion)) for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
    distinct_pairs = list(dict.fromkeys(pair for pair in pairs if pair[1]))
    lengths = [len(prompt) + len(completion) for prompt, completion in distinct_pairs]
    sums: dict[Any, float] = {}
    for rows in batches_by_length(distinct_pairs, lengths, batch_size):
        batch = build_batch([prompt for prompt, _ in rows], [completion for _, completion in rows])
        nll, _ = predict(model, batch, vocab_size)
        ends = np.cumsum([len(completion) for _, completion in rows])
        for pair, values in zip(rows, np.split(nll, ends[:-1]), strict=True):
            sums[pair] = float(values.sum())
    return [sums.get(pair, 0.0) for pair in pairs]


def _tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], texts: Sequence[str]
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of prompts and completions under another tokenizer; each prompt has at least one token."""
    if not tokenizer.is_fast:
        raise UserError(
            f"perplexity_model: {type(tokenizer).__name__} is a slow tokenizer without character offsets. "
            "Choose a model with a fast tokenizer (tokenizer.json)."
        )
    # GPT-2 has no BOS; its documents start after EOS.
    start_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    heads, tails = [], []
    for prompt, text in zip(prompts, texts, strict=True):
        if isinstance(prompt, str):
            head, tail = _tokenize_pair(tokenizer, prompt, text)
        elif tokenizer.chat_template:
            (head,) = encode_prompts(tokenizer, [prompt])
            (tail,) = encode_plain_texts(tokenizer, [text])
        else:
            head, tail = _tokenize_pair(tokenizer, "\n".join(message["content"] for message in prompt) + "\n", text)
        if not head:
            head, tail = ([start_id], tail) if start_id is not None else (tail[:1], tail[1:])
        heads.append(head)
        tails.append(tail)
    return heads, tails


def _tokenize_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and its completion, tokenized together and split by character offsets."""
    encoding = tokenizer(prompt + text, return_offsets_mapping=True, return_special_tokens_mask=True)
    ids, special = encoding["input_ids"], encoding["special_tokens_mask"]
    while ids and special[-1]:  # The tokenizer appends an EOS.
        ids, special = ids[:-1], special[:-1]
    ends = [end for _, end in encoding["offset_mapping"]]
    start = next((i for i in range(len(ids)) if not special[i] and ends[i] > len(prompt)), len(ids))
    return ids[:start], ids[start:]
