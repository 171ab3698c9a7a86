"""A chat, a tokenizer of bytes, and writers of small data sets, for tests of prompts."""

from __future__ import annotations

from pathlib import Path

import datasets
from helpers.files import write
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TWO_ROWS = {"prompt": ["one", "two"], "n": [1, 2]}
TWO_LINES = '{"prompt": "one", "n": 1}\n{"prompt": "two", "n": 2}\n'
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


def save_jsonl_directory(directory: Path) -> Path:
    (directory / "files").mkdir()
    return write(directory / "files" / "train.jsonl", TWO_LINES).parent


def save_dataset_dict(directory: Path) -> Path:
    train, test = datasets.Dataset.from_dict(TWO_ROWS), datasets.Dataset.from_dict({"prompt": ["three"], "n": [3]})
    datasets.DatasetDict(train=train, test=test).save_to_disk(directory / "saved")
    return directory / "saved"


def save_parquet(directory: Path) -> Path:
    datasets.Dataset.from_dict(TWO_ROWS).to_parquet(directory / "p.parquet")
    return directory / "p.parquet"
