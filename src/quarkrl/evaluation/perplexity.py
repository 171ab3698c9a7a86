"""Perplexity of completions under any language model, each given its prompt."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quarkrl.data.prompts import Prompts
from quarkrl.errors import UserError
from quarkrl.models.batching import build_batch
from quarkrl.models.completion_logits import completion_logits
from quarkrl.sampling.generator import QuarkGenerator

# Positions whose logits stand in memory at a time: 1.6 GB at a vocabulary of 50,000, the copy in float32 included.
_POSITIONS_AT_A_TIME = 4096


class Fluency:
    """What scores perplexity: a model, and how its tokens relate to the policy's.

    A model of the policy's own tokens reads them as they were sampled. Any other reads the text: prompt and
    completion are tokenised as one, and a token that reaches over from one into the other belongs to the completion.

    Args:
        judge: the model that scores.
        policy: the model whose tokenizer the completions come from.
    """

    def __init__(self, judge: QuarkGenerator, policy: QuarkGenerator):
        self.judge = judge
        self.same_tokens = judge is policy or shares_tokens(judge, policy)

    def nll(
        self, prompts: Prompts, owners: Sequence[int], ids: Sequence[Sequence[int]], texts: Sequence[str], batch: int
    ) -> tuple[list[float], list[int], int]:
        """Of each completion the sum of its tokens' negative log-likelihoods, in nats, and how many tokens.

        Args:
            prompts: with their `ids`.
            owners: for each completion, which prompt it continues.
            ids: the completions' token ids, without EOS.
            texts: the same as text.
            batch: completions at a time.

        Returns:
            Sums, counts, and how many prompts lost their beginning, where the model's context is too short for them.
        """
        if self.same_tokens:
            heads, tails = [prompts.ids[owner] for owner in owners], [list(row) for row in ids]
        else:
            asked = [prompts.prompts[owner] for owner in owners]
            heads, tails = _retokenised(self.judge.tokenizer, asked, texts)
        room = self.judge.context_length
        cut = sum(len(head) + len(tail) > room for head, tail in zip(heads, tails, strict=True))
        tails = [tail[: room - 1] for tail in tails]
        heads = [head[-(room - len(tail)) :] for head, tail in zip(heads, tails, strict=True)]
        return completion_nll(self.judge.model, heads, tails, batch), [len(tail) for tail in tails], cut


def shares_tokens(one: QuarkGenerator, other: QuarkGenerator) -> bool:
    """Whether two models mean the same by their (original) token ids."""
    first, second = (
        {text: i for text, i in generator.tokenizer.get_vocab().items() if i < generator.vocab_size}
        for generator in (one, other)
    )
    return first == second


def completion_nll(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    batch_size: int,
) -> list[float]:
    """For each completion, the sum of its tokens' negative log-likelihoods given its prompt, in nats.

    An empty completion gives 0. One that comes twice is read once.
    """
    pairs = [(tuple(prompt), tuple(completion)) for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
    todo = list(dict.fromkeys(pair for pair in pairs if pair[1]))
    sums: dict[Any, float] = {}
    for rows in by_length(todo, [len(prompt) + len(completion) for prompt, completion in todo], batch_size):
        batch = build_batch([prompt for prompt, _ in rows], [completion for _, completion in rows])
        input_ids, mask, labels = (batch[name].to(model.device) for name in ("input_ids", "attention_mask", "labels"))
        with torch.inference_mode():
            logits = completion_logits(model, input_ids, mask, labels)
            nll = torch.nn.functional.cross_entropy(logits.float(), labels[labels != -100], reduction="none")
        ends = np.cumsum([len(completion) for _, completion in rows])
        for pair, values in zip(rows, np.split(nll.double().cpu().numpy(), ends[:-1]), strict=True):
            sums[pair] = float(values.sum())
    return [sums.get(pair, 0.0) for pair in pairs]


def by_length(items: Sequence[Any], lengths: Sequence[int], batch_size: int) -> Iterator[list[Any]]:
    """The items in batches of like length: at most `batch_size`, and no more tokens than memory bears."""
    batch: list[Any] = []
    for i in sorted(range(len(items)), key=lambda i: lengths[i]):
        if batch and (len(batch) == batch_size or lengths[i] * (len(batch) + 1) > _POSITIONS_AT_A_TIME):
            yield batch
            batch = []
        batch.append(items[i])
    if batch:
        yield batch


def _retokenised(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], texts: Sequence[str]
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and completions as another model's tokens; a prompt has at least one."""
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which does not say where a completion begins: "
            "give a perplexity model with a fast one (tokenizer.json)"
        )
    # What GPT-2 and its kin read first, too, where there is nothing else.
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    heads, tails = [], []
    for prompt, text in zip(prompts, texts, strict=True):
        if isinstance(prompt, str):
            head, tail = _split(tokenizer, prompt, text)
        elif tokenizer.chat_template:
            head = list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
            tail = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            head, tail = _split(tokenizer, "\n".join(message["content"] for message in prompt) + "\n", text)
        if not head:
            head, tail = ([first], tail) if first is not None else (tail[:1], tail[1:])
        heads.append(head)
        tails.append(tail)
    return heads, tails


def _split(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> tuple[list[int], list[int]]:
    whole = tokenizer(prompt + text, return_offsets_mapping=True, return_special_tokens_mask=True)
    ids, special = whole["input_ids"], whole["special_tokens_mask"]
    while ids and special[-1]:  # An EOS that the tokenizer puts behind a text.
        ids, special = ids[:-1], special[:-1]
    ends = [end for _, end in whole["offset_mapping"]]
    start = next((i for i in range(len(ids)) if not special[i] and ends[i] > len(prompt)), len(ids))
    return ids[:start], ids[start:]
