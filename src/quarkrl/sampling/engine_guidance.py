"""Guidance in an inference engine, where the two distributions of a completion are two requests of one batch.

The *main* request is the user's, behind a wanted reward token. The *contrast* request is the same prompt behind another
one. At each step an engine hands over the logits of its batch. `guide_rows` finds the two rows of each pair, samples
one token from their guided distribution, and leaves both rows no other token to choose. So both requests continue with
the same token.

This module needs no engine. `vllm_guidance` and `vllm_scheduler` connect it to vLLM.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quarkrl.errors import UserError
from quarkrl.sampling.guidance import GuidanceOptions, guided_logits
from quarkrl.sampling.options import read_scale
from quarkrl.sampling.strategy import keep_nucleus, sample_by_inverse_transform

# Arguments of a request, which a client of vLLM sends as `vllm_xargs`.
SCALE, FROM = "guidance_scale", "guidance_from"
_GREEDY_BELOW = 1e-5  # A temperature below it is greedy decoding, as in vLLM.


@dataclass(frozen=True)
class PairMember:
    """One of the two requests of a guided completion.

    Attributes:
        pair_id: the same for both requests.
        is_main: whether the request is the user's.
        scale: γ.
        vocab_size: tokens with ids from here on, such as reward tokens, are ruled out.
        seed: of the completion.
        temperature, top_k, top_p, min_p: how the token is chosen, as in OpenAI's API and vLLM. Temperature 0 is greedy
            decoding, and a `top_k` of 0 or less keeps all tokens.
    """

    pair_id: str
    is_main: bool
    scale: float
    vocab_size: int
    seed: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float


def read_guidance(arguments: Mapping[str, Any] | None) -> GuidanceOptions | None:
    """Read the guidance arguments of a request; None without guidance, which includes γ = 1.

    Raises:
        UserError: an argument is not a number or out of its limits.
    """
    arguments = arguments or {}
    if SCALE not in arguments:
        if FROM in arguments:
            raise UserError(f"{FROM} {arguments[FROM]!r}: must be used with {SCALE}. Set {SCALE} 2, for example.")
        return None
    scale, contrast = arguments[SCALE], arguments.get(FROM, "worst")
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise UserError(f"{SCALE} {scale!r}: must be a number. Set 1 to sample without guidance.")
    if isinstance(contrast, bool) or not isinstance(contrast, str | int) or contrast == "reference":
        raise UserError(
            f"{FROM} {contrast!r}: must be worst, best or the number of a quantile. An engine serves no reference."
        )
    return None if read_scale(scale) == 1 else GuidanceOptions(float(scale), contrast)


def guide_rows(logits: Tensor, rows: Mapping[int, tuple[PairMember, int]]) -> Tensor:
    """Choose the next token of each pair, and rule out every other token in both rows, in place.

    A request whose partner is not in the batch keeps its logits. Its token must be discarded (`vllm_scheduler`).

    Args:
        logits: `(batch, vocab)` in float32.
        rows: for each row of a guided request, the request, and the number of tokens before the next one. A seed and
            this number give the random number. So a step that is repeated chooses the same token.

    Returns:
        `logits`.
    """
    mains = {member.pair_id: (row, member, length) for row, (member, length) in rows.items() if member.is_main}
    contrasts = {member.pair_id: row for row, (member, _) in rows.items() if not member.is_main}
    pairs = [(*mains[pair_id], row) for pair_id, row in contrasts.items() if pair_id in mains]
    if not pairs:
        return logits
    main_rows, members, lengths, contrast_rows = zip(*pairs, strict=True)
    vocab_size = members[0].vocab_size
    scales = logits.new_tensor([[member.scale] for member in members])
    sides = logits[list(main_rows)], logits[list(contrast_rows)]
    guided = guided_logits(sides[0], [sides[1]], [scales], vocab_size=vocab_size)  # (pairs, vocab_size)
    tokens = choose_tokens(guided, members, lengths)
    both = [*main_rows, *contrast_rows]
    logits[both] = -torch.inf
    logits[both, tokens.repeat(2)] = 0.0
    return logits


def choose_tokens(logits: Tensor, members: Sequence[PairMember], lengths: Sequence[int]) -> Tensor:
    """Choose the next token of each completion by its own sampling options.

    Args:
        logits: `(pairs, vocab)`.
        members: the main request of each completion.
        lengths: number of tokens before the next one, which selects the random number.

    Returns:
        `(pairs,)` token ids.
    """
    greedy_tokens = logits.argmax(-1)
    temperatures = logits.new_tensor([member.temperature for member in members])
    is_greedy = temperatures < _GREEDY_BELOW
    if is_greedy.all():
        return greedy_tokens
    probabilities = (logits / temperatures.masked_fill(is_greedy, 1.0)[:, None]).softmax(-1)
    least = logits.new_tensor([[member.min_p] for member in members]) * probabilities.amax(-1, keepdim=True)
    counts = [member.top_k for member in members]
    if any(count > 0 for count in counts):
        vocab_size = logits.shape[-1]
        last = [[min(count, vocab_size) - 1 if count > 0 else vocab_size - 1] for count in counts]
        descending = probabilities.sort(-1, descending=True).values
        least = torch.maximum(least, descending.gather(-1, torch.tensor(last, device=logits.device)))
    probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    if any(member.top_p < 1 for member in members):
        top_p = logits.new_tensor([[member.top_p] for member in members])
        probabilities = keep_nucleus(probabilities / probabilities.sum(-1, keepdim=True), top_p)
    uniforms = logits.new_tensor(
        [
            float(np.random.default_rng((member.seed, length)).random(dtype=np.float32))
            for member, length in zip(members, lengths, strict=True)
        ]
    )
    return torch.where(is_greedy, greedy_tokens, sample_by_inverse_transform(probabilities, uniforms))
