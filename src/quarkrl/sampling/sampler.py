"""Sampling of completions as token ids. Reward tokens are never sampled: they are conditions, not outputs."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from quarkrl.errors import UserError
from quarkrl.models.eval_mode import eval_mode
from quarkrl.models.sharding import is_sharded
from quarkrl.sampling.guidance import Contrast, make_decoder
from quarkrl.sampling.recorded_steps import RecordedSteps
from quarkrl.sampling.strategy import Sampling


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    uniforms: np.ndarray | None,
    *,
    end_ids: Sequence[int],
    vocab_size: int,
    contrast: Contrast | None = None,
    steps: RecordedSteps | None = None,
) -> list[list[int]]:
    """Sample one completion for each prompt, all in one batch.

    Args:
        model: any causal language model; it is in eval mode while sampling.
        prompt_ids: token ids of the prompts, with reward tokens if they are wanted. They are padded here.
        sampling: the sampling options.
        uniforms: from `sampling.uniforms`, one row for each prompt.
        end_ids: EOS ids. The first of them ends a completion and is its last token.
        vocab_size: tokens with ids from here on are never sampled.
        contrast: guidance for these prompts; None samples without guidance.
        steps: recorded by earlier calls with the same weights.

    Returns:
        Token ids of each completion, EOS included, without padding.

    Raises:
        UserError: the model's logits are not finite.
    """
    length, device = sampling.max_new_tokens, model.device
    recorded = partial((steps or RecordedSteps()).decoder, num_steps=length - 1)
    decoder = make_decoder(model, prompt_ids, contrast, vocab_size, recorded)
    numbers = None if uniforms is None else torch.from_numpy(uniforms).to(device)
    eos = torch.tensor(end_ids, dtype=torch.long, device=device)
    completions = torch.zeros(len(prompt_ids), length, dtype=torch.long, device=device)
    active = torch.arange(len(prompt_ids), device=device)  # (batch,) the completions in the batch
    ended = torch.zeros_like(active, dtype=torch.bool)  # (batch,) those that have ended, and are not removed yet
    with eval_mode(model):
        logits = decoder.prefill()
        for position in range(length):
            ruled_out = eos if position < sampling.min_new_tokens else None
            scores = check_and_mask(logits[:, :vocab_size].float(), ruled_out)
            tokens = sampling.next_tokens(scores, None if numbers is None else numbers[active, position])
            completions[active, position] = tokens
            ended |= torch.isin(tokens, eos)
            # A sharded model needs the same number of forward passes in each process.
            if position + 1 == length or (ended.all() and not is_sharded(model)):
                break
            if decoder.min_share_to_remove * len(active) <= ended.sum() < len(active):
                remaining = torch.nonzero(~ended)[:, 0]
                decoder.select(remaining)
                tokens, active, ended = tokens[remaining], active[remaining], ended[remaining]
            logits = decoder.step(tokens)
    return [_truncate_after_eos(ids, set(end_ids)) for ids in completions.tolist()]


def check_and_mask(logits: Tensor, ruled_out: Tensor | None) -> Tensor:
    """Return the logits with -inf for the tokens that are ruled out.

    Raises:
        UserError: the logits are not finite, so that any token could be sampled.
    """
    if not logits.amax(-1).isfinite().all():
        raise UserError(
            "the model's logits are not finite. Its weights are damaged, or float16 overflows. "
            "Load an intact model, in bfloat16 or float32."
        )
    return logits if ruled_out is None else logits.index_fill(-1, ruled_out, -torch.inf)


def _truncate_after_eos(ids: list[int], end_ids: set[int]) -> list[int]:
    for position, token in enumerate(ids):
        if token in end_ids:
            return ids[: position + 1]
    return ids


def complete(  # noqa: PLR0913 - sample's arguments and three more
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    end_ids: Sequence[int],
    vocab_size: int,
    seed: int | None = None,
    batch_size: int = 128,
    on_batch: Callable[[int], None] = lambda count: None,
    contrast: Contrast | None = None,
) -> list[list[int]]:
    """Sample one completion for each of any number of prompts, in batches of similar length.

    Args:
        model, prompt_ids, sampling, end_ids, vocab_size, contrast: see `sample`.
        seed: makes the completions repeatable. They do not depend on the batch size.
        batch_size: completions per batch.
        on_batch: called after each batch with its size.

    Returns:
        Token ids of each completion, in the order of the prompts.
    """
    uniforms = sampling.uniforms(len(prompt_ids), *(() if seed is None else (seed,)))
    order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
    completions: list[list[int]] = [[]] * len(prompt_ids)
    steps = RecordedSteps()
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = sample(
            model,
            [prompt_ids[row] for row in rows],
            sampling,
            None if uniforms is None else uniforms[rows],
            end_ids=end_ids,
            vocab_size=vocab_size,
            contrast=contrast and contrast.select(rows),
            steps=steps,
        )
        for row, ids in zip(rows, batch, strict=True):
            completions[row] = ids
        on_batch(len(rows))
    return completions
