"""Tokenizers of the kinds that decode a text otherwise than its tokens one by one."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

WORDS = ["You", "are", "nice", "mean", "a", "b", "c", "d", "."]


def llama_tokenizer(
    prepend_scheme: str = "always", byte_fallback: bool = True, **named: Any
) -> PreTrainedTokenizerFast:
    """SentencePiece's kind: "▁" for a space, one before the text, and bytes for what is not in the vocabulary."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256) if byte_fallback)]
    scores = dict.fromkeys(pieces, 0.0) | dict.fromkeys("▁abcd.</s>", -3.0)
    scores |= {f"{space}{word}": -1.0 - (not space) for word in WORDS for space in ("▁", "")}
    backend = Tokenizer(models.Unigram(list(scores.items()), unk_id=0, byte_fallback=byte_fallback))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**names, **named})


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """The same with the decoder that T5 and others have."""
    tokenizer = llama_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def wordpiece_tokenizer(**named: Any) -> PreTrainedTokenizerFast:
    """BERT's kind, "##" before what continues a word; decoding removes spaces before punctuation."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocab = [*names, *map(str.lower, WORDS), *"[]/<>s", "##ly", "##b", "##c"]
    model = models.WordPiece({word: i for i, word in enumerate(dict.fromkeys(vocab))}, unk_token="[UNK]")
    backend = Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(names)
    backend.post_processor = TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", 2)])
    named = {"pad_token": "[PAD]", "cls_token": "[CLS]", "eos_token": "[SEP]", "unk_token": "[UNK]"} | named
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)
