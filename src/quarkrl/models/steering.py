"""A tokenizer that puts a prefix (reward tokens or words) before each prompt by itself, also in its chat template.

It is saved with the final model. So plain transformers, vLLM and others give the model the same token ids that it was
trained on, without knowing about Quark.
"""

import copy
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from quarkrl.errors import UserError
from quarkrl.models.chat_template import steer_chat_template
from quarkrl.models.special_tokens import post_processor, surrounding_ids


def steer_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    prefix: Sequence[int],
    prefix_text: str,
    start_ids: Sequence[int],
    choices: Mapping[str, str],
    keep_end: bool = False,
) -> PreTrainedTokenizerBase:
    """Return a copy of a tokenizer that puts a prefix before each text, after special tokens such as BOS.

    By default it adds nothing behind a text, such as EOS: a prompt is continued.

    Args:
        tokenizer: knows the tokens of the prefix; it is not changed.
        prefix: the ids of the prefix.
        prefix_text: its text, for the chat template.
        start_ids: the ids that precede the prefix in a chat that starts with them.
        choices: the texts of all prefixes, by the value of the chat template's argument `quantile`.
        keep_end: whether it adds behind a text what the tokenizer adds: an encoder reads the whole prompt.

    Raises:
        UserError: the tokenizer is not a fast one. Only those have a post-processor that can be set.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"tokenizer {type(tokenizer).__name__}: must be a fast tokenizer. Save one with a tokenizer.json beside "
            "the model."
        )
    before, after = surrounding_ids(tokenizer)
    steered = copy.deepcopy(tokenizer)
    steered.backend_tokenizer.post_processor = post_processor(
        tokenizer, before=[*before, *prefix], between=[*after, *before], after=after if keep_end else ()
    )
    # transformers would replace the post-processor when it loads a tokenizer whose config has add_bos_token.
    steered._should_update_post_processor = False
    steered.chat_template = steer_chat_template(steered, prefix_text, start_ids, choices)
    return steered


def as_generic(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a fast tokenizer as an object of the generic class, which is loaded exactly as it was saved."""
    names = ("model_max_length", "padding_side", "truncation_side", "model_input_names", "split_special_tokens")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        extra_special_tokens=tokenizer.extra_special_tokens,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        chat_template=tokenizer.chat_template,
        **{name: getattr(tokenizer, name) for name in names},
        **{name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
    )
