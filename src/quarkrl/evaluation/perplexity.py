"""Perplexity of completions under any causal language model, given their prompts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quarkrl.data.chats import Chat, message_text, reads_chats, render_chat
from quarkrl.data.encoding import break_special_tokens, encode_as_text, encode_pairs_as_text, encode_prompts
from quarkrl.data.prompts import Prompts
from quarkrl.errors import UserError
from quarkrl.evaluation.predictions import predict
from quarkrl.models.batching import batches_by_length, build_batch
from quarkrl.sampling.generator import QuarkGenerator, has_same_vocabulary


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
        reader, writer = (one.is_encoder_decoder for one in (generator, policy))
        self.same_vocabulary = generator is policy or (reader == writer and has_same_vocabulary(generator, policy))
        if reader and not self.same_vocabulary:
            raise UserError(
                f"perplexity_model {type(generator.model).__name__}: must be the reference or a decoder-only model. "
                "An encoder–decoder model with other tokens reads no text that continues a prompt."
            )
        self.separator = "\n" if writer else ""

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
                self.generator.tokenizer,
                [prompts.as_encoded[i] for i in prompt_numbers],
                [f"{self.separator}{text}" for text in texts],
            )
        context_length = self.generator.context_length
        rooms = [self.generator.longest_prompt(len(tail)) for tail in tails]
        truncated = sum(len(head) > room for head, room in zip(heads, rooms, strict=True))
        tails = [tail[: context_length - 1] for tail in tails]
        heads = [head[-max(room, 1) :] for head, room in zip(heads, rooms, strict=True)]
        sums = completion_nll(self.generator.model, heads, tails, self.generator.vocab_size, batch_size)
        return sums, [len(tail) for tail in tails], truncated


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
    # GPT-2 has no BOS; its documents start after EOS.
    start_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    templated = [reads_chats(tokenizer) and not isinstance(prompt, str) for prompt in prompts]
    plain = [(_as_text(prompt), text) for prompt, text, chat in zip(prompts, texts, templated, strict=True) if not chat]
    plain_ids = encode_pairs_as_text(tokenizer, [prompt for prompt, _ in plain], [text for _, text in plain])
    heads, tails = [], []
    for prompt, text, chat in zip(prompts, texts, templated, strict=True):
        head, tail = _tokenize_after_chat(tokenizer, prompt, text) if chat else next(plain_ids)
        if not head:
            head, tail = ([start_id], tail) if start_id is not None else (tail[:1], tail[1:])
        heads.append(head)
        tails.append(tail)
    return heads, tails


def _as_text(prompt: Any) -> str:
    """A prompt as one text; a chat as its messages, one per line."""
    return prompt if isinstance(prompt, str) else "".join(message_text(message) + "\n" for message in prompt)


def _tokenize_after_chat(tokenizer: PreTrainedTokenizerBase, chat: Chat, text: str) -> tuple[list[int], list[int]]:
    """Token ids of a chat by the chat template, and of the completion behind it."""
    (head,) = encode_prompts(tokenizer, [list(map(dict, chat))])
    whole = render_chat(tokenizer, chat) + break_special_tokens(tokenizer, text)
    both = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
    if both[: len(head)] == head:
        return head, both[len(head) :]
    (tail,) = encode_as_text(tokenizer, [text], add_special_tokens=False)
    return head, tail
