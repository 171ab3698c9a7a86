"""A chat and a tokenizer of bytes for tests of prompts."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHAT = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]


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
