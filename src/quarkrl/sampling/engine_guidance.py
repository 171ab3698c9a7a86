"""Guidance in an inference engine, where the distributions of a completion are requests of one batch.

The *main* request is the user's, behind a wanted reward token. A *contrast* request is the same prompt behind another
one. There is one contrast, or one for each guided reward. At each step an engine hands over the logits of its batch.
`guide_rows` finds the rows of each group, samples one token from their guided distribution, and leaves these rows no
other token to choose. So all requests of a group continue with the same token.

This module needs no engine. `vllm_guidance` and `vllm_scheduler` connect it to vLLM.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quarkrl.errors import UserError
from quarkrl.sampling.guidance import GuidanceOptions, check_guidance_rule, guided_logits
from quarkrl.sampling.options import GuidanceRule, count_passes
from quarkrl.sampling.strategy import keep_nucleus, sample_by_inverse_transform

# Arguments of a request, which a client of vLLM sends as `vllm_xargs`.
SCALE, FROM, RULE = "guidance_scale", "guidance_from", "guidance_rule"
_GREEDY_BELOW = 1e-5  # A temperature below it is greedy decoding, as in vLLM.


@dataclass(frozen=True)
class GroupMember:
    """One of the requests of a guided completion.

    Attributes:
        group_id: the same for all of them.
        part: 0 for the user's request, and i for the contrast that belongs to `scales[i - 1]`.
        scales: γ of each contrast.
        rule: both, or lower.
        vocab_size: tokens with ids from here on, such as reward tokens, are ruled out.
        end_ids: tokens that are ruled out until the request has `ends_from` tokens, its prompt included.
        ends_from: see `end_ids`.
        seed: of the completion.
        temperature, top_k, top_p, min_p: how the token is chosen, as in OpenAI's API and vLLM. Temperature 0 is greedy
            decoding, and a `top_k` of 0 or less keeps all tokens.
    """

    group_id: str
    part: int
    scales: tuple[float, ...]
    rule: GuidanceRule
    vocab_size: int
    end_ids: tuple[int, ...]
    ends_from: int
    seed: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float


def read_guidance(arguments: Mapping[str, Any] | None) -> GuidanceOptions | None:
    """Read the guidance arguments of a request; None without guidance, which includes γ = 1.

    Raises:
        UserError: an argument has the wrong type or is out of its limits.
    """
    arguments = arguments or {}
    if SCALE not in arguments:
        for name in (FROM, RULE):
            if name in arguments:
                raise UserError(f"{name} {arguments[name]!r}: must be used with {SCALE}. Set {SCALE} 2, for example.")
        return None
    scale, contrast, rule = arguments[SCALE], arguments.get(FROM, "worst"), arguments.get(RULE, "both")
    if isinstance(scale, bool) or not isinstance(scale, int | float | str):
        raise UserError(f"{SCALE} {scale!r}: must be a number. Set 1 to sample without guidance.")
    if isinstance(contrast, bool) or not isinstance(contrast, str | int) or contrast == "reference":
        raise UserError(
            f"{FROM} {contrast!r}: must be worst, best or the number of a quantile. An engine serves no reference."
        )
    check_guidance_rule(rule)
    return None if count_passes(scale) == 1 else GuidanceOptions(scale, contrast, rule)


def guide_rows(logits: Tensor, rows: Mapping[int, tuple[GroupMember, int]]) -> Tensor:
    """Choose the next token of each group, and rule out every other token in its rows, in place.

    A request of a group that is not whole keeps its logits. Its token must be discarded (`vllm_scheduler`).

    Args:
        logits: `(batch, vocab)` in float32.
        rows: for each row of a guided request, the request, and the number of tokens before the next one. A seed and
            this number give the random number. So a step that is repeated chooses the same token.

    Returns:
        `logits`.
    """
    groups: dict[str, dict[int, int]] = defaultdict(dict)  # By group, the row of each part.
    for row, (member, _) in rows.items():
        groups[member.group_id][member.part] = row
    batches: dict[tuple[GuidanceRule, int], list[list[int]]] = defaultdict(list)
    for group in groups.values():
        member, _ = rows[next(iter(group.values()))]
        if len(group) == 1 + len(member.scales):
            batches[member.rule, len(group)].append([group[part] for part in range(len(group))])
    for (rule, _), batch in batches.items():
        main_rows, *contrast_rows = (list(part) for part in zip(*batch, strict=True))
        members, lengths = zip(*(rows[row] for row in main_rows), strict=True)
        vocab_size = members[0].vocab_size
        scales = logits.new_tensor([member.scales for member in members])  # (groups, contrasts)
        guided = guided_logits(
            logits[main_rows], [logits[part] for part in contrast_rows], list(scales.T[..., None]), rule, vocab_size
        )  # (groups, vocab_size)
        for i, (member, length) in enumerate(zip(members, lengths, strict=True)):
            if length < member.ends_from:
                guided[i, list(member.end_ids)] = -torch.inf
        tokens = choose_tokens(guided, members, lengths)
        for part in (main_rows, *contrast_rows):
            logits[part] = -torch.inf
            logits[part, tokens] = 0.0
    return logits


def choose_tokens(logits: Tensor, members: Sequence[GroupMember], lengths: Sequence[int]) -> Tensor:
    """Choose the next token of each completion by its own sampling options.

    Args:
        logits: `(completions, vocab)`.
        members: the main request of each completion.
        lengths: number of tokens before the next one, which selects the random number.

    Returns:
        `(completions,)` token ids.
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
