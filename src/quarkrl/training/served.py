"""The check that the saved model reads what it was trained on, before a run samples.

The tokenizer is saved as `final/` will have it, and loaded as users load it. Its ids for a prompt must be those of
training behind the best reward tokens.
"""

import logging
from collections.abc import Sequence
from datetime import datetime
from itertools import zip_longest
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from quarkrl.data.chats import reads_chats, with_fixed_date
from quarkrl.data.encoding import Prompt, encode_prompts, try_encode_prompts
from quarkrl.data.prompts import Prompts
from quarkrl.errors import UserError, one_line, shorten
from quarkrl.models.conditioning import Conditioning
from quarkrl.models.loading import load_tokenizer
from quarkrl.models.special_tokens import surrounding_ids
from quarkrl.models.steering import as_generic

logger = logging.getLogger(__name__)

# Texts on which tokenizers differ: nearly empty ones, spaces, scripts, control characters, words that look special.
PROBES: tuple[str, ...] = (
    " ",
    "a",
    "Hello world",
    " leading space",
    "  two  spaces ",
    "\n\nnewlines\r\n\ttab",
    "naïve café, 北京 🙂 e\u0301",
    "\ufeffbyte order\u200b mark\x00",
    "<|im_start|>user\nhi<|im_end|>",
    "<s>[INST] <<SYS>> </s> <pad> <unk> [CLS] [SEP] [MASK]",
    "</s>",
    "▁Ġ##",
)
_QUESTION = {"role": "user", "content": "What is 2 + 2?"}
_CALL = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
# Chats on which chat templates differ. A template may refuse some of them, such as system messages or tools.
CHAT_PROBES: tuple[list[dict[str, Any]], ...] = (
    [_QUESTION],
    [{"role": "system", "content": "Be brief."}, _QUESTION],
    [_QUESTION, {"role": "assistant", "content": "4"}, {"role": "user", "content": " Sure?"}],
    [_QUESTION, {"role": "assistant", "content": "It is"}],
    [
        _QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [_CALL]},
        {"role": "tool", "tool_call_id": "call00001", "name": "add", "content": "4"},
    ],
)
_FIRST_PROMPTS = 16  # How many of the run's own prompts are compared.


def check_served_ids(
    tokenizer: PreTrainedTokenizerBase,
    steered_tokenizer: PreTrainedTokenizerBase,
    conditioning: Conditioning,
    config: PretrainedConfig,
    prompts: Prompts,
    chat_date: datetime | None = None,
) -> PreTrainedTokenizerBase:
    """Check that the tokenizer that is saved with the final model gives the ids of training.

    Args:
        tokenizer: encodes the prompts of the run.
        steered_tokenizer: what is saved with the final model, if it is loaded as it was saved.
        conditioning: the reward tokens.
        config: the model's, which decides the class of the tokenizer that transformers loads.
        prompts: the run's prompts; the first of them are compared, beside texts and chats on which tokenizers differ.
            If no prompt is a chat, a difference in chats is a warning.
        chat_date: the date of the run's chats.

    Returns:
        The tokenizer to save: the steered one, or the same tokenizer as an object of a generic class. Classes such as
        `GPTNeoXTokenizer` rebuild their parts when they load, without the reward tokens.

    Raises:
        UserError: the ids of a prompt differ, or the tokenizer cannot be saved and loaded.
    """
    texts, chats = _probes(tokenizer, conditioning, prompts)
    has_chats = prompts.are_chats
    problems: list[str] = []
    if has_chats and (ambiguity := find_ambiguity(tokenizer, conditioning)):
        raise UserError(f"tokenizer {type(tokenizer).__name__}: must not {ambiguity} in a run on chats. Train on text.")
    for candidate in (steered_tokenizer, as_generic(steered_tokenizer)):
        try:
            served = _save_and_load(with_fixed_date(candidate, chat_date) if chat_date else candidate, config)
        except UserError as error:
            problems.append(str(error))
            continue
        if problem := _find_difference(served, conditioning, [*texts, *chats] if has_chats else texts):
            problems.append(problem)
            continue
        if not has_chats and (problem := _find_difference(served, conditioning, chats)):
            logger.warning(problem)
        return candidate
    raise UserError(problems[0])


def find_ambiguity(tokenizer: PreTrainedTokenizerBase, conditioning: Conditioning) -> str | None:
    """Return what makes the start of a chat depend on its text, so that no template can put reward tokens there.

    The position of the reward tokens follows from token ids in training, and from characters in a chat template.
    """
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in conditioning.start_ids:
        return "put UNK first, which is also the id of an unknown text,"
    if any(token.single_word for token in tokenizer.added_tokens_decoder.values()):
        return "have added tokens that match single words only"
    before, _ = surrounding_ids(tokenizer)
    if conditioning.start_ids and try_encode_prompts(tokenizer, [_UNKNOWN], empty_ids=before) == [before]:
        return "drop characters that it does not know"
    return None


_UNKNOWN = "\U0010fffd"  # For private use: in no vocabulary but those of bytes.
_Pairs: TypeAlias = list[tuple[Prompt, list[int]]]


def _probes(tokenizer: PreTrainedTokenizerBase, conditioning: Conditioning, prompts: Prompts) -> tuple[_Pairs, _Pairs]:
    """Texts and chats to compare, with their ids in training; among the first are the run's own prompts."""
    before, _ = surrounding_ids(tokenizer)
    own_specials = [str(token) for token in tokenizer.all_special_tokens]
    probes = [*PROBES, *own_specials, *(f"{token}a {token} b{token}" for token in own_specials)]
    texts: _Pairs = list(zip(prompts.as_encoded, prompts.ids, strict=True))[:_FIRST_PROMPTS]
    for text, ids in zip(probes, try_encode_prompts(tokenizer, probes, empty_ids=before), strict=True):
        # A tokenizer without UNK refuses texts.
        if isinstance(ids, list) and conditioning.position(ids) == len(before):
            texts.append((text, ids))
    if not reads_chats(tokenizer):
        return texts, []
    chats: list[Prompt] = [*CHAT_PROBES, *([{"role": "user", "content": text}] for text in probes)]
    encoded = zip(chats, try_encode_prompts(tokenizer, chats), strict=True)
    return texts, [(chat, ids) for chat, ids in encoded if isinstance(ids, list)]


def _find_difference(
    served: PreTrainedTokenizerBase, conditioning: Conditioning, pairs: Sequence[tuple[Prompt, list[int]]]
) -> str | None:
    """Describe the first prompt to which the saved tokenizer gives other ids than training does; None if there is none.

    Args:
        served: the saved tokenizer, loaded.
        conditioning: the reward tokens.
        pairs: prompts with their ids in training, without reward tokens.
    """
    for prompt, plain_ids in pairs:
        trained_ids = conditioning.prefix(plain_ids, conditioning.best)
        # A text as users encode it, without what `encode_prompts` removes.
        try:
            served_ids = served(prompt)["input_ids"] if isinstance(prompt, str) else encode_prompts(served, [prompt])[0]
        except UserError as error:
            return str(error)
        if served_ids != trained_ids:
            what, remedy = "tokenizer", "Save it with save_pretrained, load it with AutoTokenizer, and start from that"
            if not isinstance(prompt, str):
                what, remedy = "chat template of", "Train on text, or set another chat template"
            return (
                f"{what} {type(served).__name__}: must give the ids of training after it is saved and loaded. "
                f"For {shorten(prompt)} it gives {_first_difference(served_ids, trained_ids)}. {remedy}."
            )
    return None


def _save_and_load(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """Save a tokenizer beside a model's config, and load it as users do."""
    with TemporaryDirectory() as directory:
        try:
            config.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
        except Exception as error:
            # Custom classes raise any type of exception here.
            raise UserError(
                f"tokenizer {type(tokenizer).__name__}: must be saved with the model, which fails: {one_line(error)}. "
                "Use a tokenizer whose save_pretrained works."
            ) from error
        return load_tokenizer(directory, trust_remote_code="auto_map" in tokenizer.init_kwargs)


def _first_difference(served_ids: Sequence[int], trained_ids: Sequence[int]) -> str:
    pairs = zip_longest(served_ids, trained_ids)
    position, (served, trained) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    return f"{served} instead of {trained} at position {position}"
