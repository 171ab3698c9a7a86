"""What tests of prompts share: files, a chat, a tokenizer of bytes, and the error a bad source ends with."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from quarkrl.errors import UserError

CHAT = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]


def fails(call, *wanted: str) -> str:
    """The call raises a UserError of one line that holds each of the wanted pieces."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 700, message
    for piece in wanted:
        assert piece in message, message
    return message


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def byte_tokenizer(special: str | None = None, template: str | None = None, lacks: str = ""):
    """One token a byte, so that lengths can be counted by hand; <s> is 0, </s> is 1; drops what it lacks."""
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(lacks))
    vocabulary = {"<s>": 0, "</s>": 1} | {letter: i + 2 for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if special:
        specials = [("<s>", 0), ("</s>", 1)]
        tokenizer.post_processor = processors.TemplateProcessing(single=special, special_tokens=specials)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.chat_template = template
    return wrapped
