"""The special tokens that a tokenizer adds around each text, such as BOS and EOS."""

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase

_TEXT_ID = 2**32 - 1  # Stands for the text. No vocabulary is so large.


def add_special_tokens(tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> list[int]:
    """Add special tokens to a tokenizer, in place, and return their ids, which are above all others.

    The tokenizers library numbers a new token by counting. So where a vocabulary has gaps, the id can be in use, and it
    changes when the tokenizer is saved and loaded.
    """
    vocabulary = tokenizer.get_vocab()
    highest = max(vocabulary.values(), default=-1)
    if tokenizer.is_fast and len(vocabulary) <= highest:
        # Tokens in the vocabulary of the model keep their ids.
        backend = tokenizer.backend_tokenizer
        state = json.loads(backend.to_str())
        state["model"]["vocab"] |= {name: highest + 1 + k for k, name in enumerate(names)}
        backend.model = Tokenizer.from_str(json.dumps(state)).model
    tokenizer.add_tokens(list(names), special_tokens=True)
    return tokenizer.convert_tokens_to_ids(list(names))


def surrounding_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer adds before and after each text.

    They are read from the post-processor, with a placeholder for the text: a tokenizer may not know a text, or may
    normalise it.
    """
    if not tokenizer.is_fast:
        return _surrounding_ids_of_slow(tokenizer)
    backend = tokenizer.backend_tokenizer
    if backend.post_processor is None:
        return [], []
    encoding = backend.encode("", add_special_tokens=False)
    encoding.pad(1, pad_id=_TEXT_ID)  # The one way to make an encoding of a given id.
    ids = backend.post_processor.process(encoding, None, True).ids
    start = ids.index(_TEXT_ID)
    return ids[:start], ids[start + 1 :]


def post_processor(
    tokenizer: PreTrainedTokenizerBase, before: Sequence[int], between: Sequence[int], after: Sequence[int] = ()
) -> Any:
    """Make a post-processor for a fast tokenizer that adds ids around a text.

    Args:
        tokenizer: gives the names of the ids. Offsets are trimmed as its own post-processor trims them.
        before: the ids before a text, and before a pair of texts.
        between: the ids between the two texts of a pair.
        after: the ids after a text, and after a pair of texts.
    """
    old = tokenizer.backend_tokenizer.post_processor
    old_steps = [] if old is None else [json.loads(old.__getstate__())]
    old_steps = [part for step in old_steps for part in step.get("processors", [step])]
    token_of = {i: tokenizer.convert_ids_to_tokens(i) or f"id {i}" for i in (*before, *between, *after)}
    pieces = {i: {"SpecialToken": {"id": token, "type_id": 0}} for i, token in token_of.items()}
    end = [pieces[i] for i in after]
    first, second = ({"Sequence": {"id": name, "type_id": type_id}} for type_id, name in enumerate("AB"))
    template = {
        "type": "TemplateProcessing",
        "single": [*(pieces[i] for i in before), first, *end],
        "pair": [*(pieces[i] for i in before), first, *(pieces[i] for i in between), second, *end],
        "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]} for i, token in token_of.items()},
    }
    trimming = [step for step in old_steps if step["type"] == "ByteLevel"]
    # From JSON, because the constructor of a template takes no token with a colon or a dollar sign.
    empty = json.loads(Tokenizer(BPE()).to_str())
    empty["post_processor"] = {"type": "Sequence", "processors": [*trimming, template]} if trimming else template
    return Tokenizer.from_str(json.dumps(empty)).post_processor


def _surrounding_ids_of_slow(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, is_special = encoded["input_ids"], encoded["special_tokens_mask"]
    positions = [i for i, special in enumerate(is_special) if not special] or [len(ids)]
    return ids[: positions[0]], ids[positions[-1] + 1 :]
