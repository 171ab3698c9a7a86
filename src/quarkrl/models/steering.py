"""A tokenizer that puts reward tokens before each prompt by itself, also in its chat template.

It is saved with the final model. So plain transformers, vLLM and others give the model the same token ids that it was
trained on, without knowing about Quark.
"""

import copy
from collections.abc import Sequence

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from quarkrl.errors import UserError
from quarkrl.models.chat_template import steer_chat_template


def steer_tokenizer(tokenizer: PreTrainedTokenizerBase, reward_token_ids: Sequence[int]) -> PreTrainedTokenizerBase:
    """Return a copy of a tokenizer that puts reward tokens before each text, after BOS if it adds one.

    Args:
        tokenizer: knows the reward tokens; it is not changed.
        reward_token_ids: one per attribute.

    Raises:
        UserError: the tokenizer is not a fast one. Only those have a post-processor that can be set.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"tokenizer {type(tokenizer).__name__}: must be a fast tokenizer. Save one with a tokenizer.json beside "
            "the model."
        )
    before, after = _special_tokens_around(tokenizer)
    single: list[int | str] = [*before, *reward_token_ids, "$A", *after]
    pair: list[int | str] = [*single, *before, "$B:1", *after]
    steered = copy.deepcopy(tokenizer)
    token_of: dict[int | str, str] = {i: steered.convert_ids_to_tokens(i) for i in (*before, *reward_token_ids, *after)}
    steered.backend_tokenizer.post_processor = TemplateProcessing(
        single=[token_of.get(piece, piece) for piece in single],
        pair=[token_of.get(piece, piece) for piece in pair],
        special_tokens=[(token, i) for i, token in token_of.items()],
    )
    # transformers would replace the post-processor when it loads a tokenizer whose config has add_bos_token.
    steered._should_update_post_processor = False
    start_ids = [] if steered.bos_token_id is None else [steered.bos_token_id]
    steered.chat_template = steer_chat_template(steered, reward_token_ids, start_ids)
    return steered


def _special_tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer adds before and after each text, such as BOS and EOS."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)
    return full[:start], full[start + len(plain) :]
