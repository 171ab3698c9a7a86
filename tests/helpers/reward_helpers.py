"""Texts, calls of rewards, and tiny classifiers for tests of rewards."""

import asyncio

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from quarkrl.rewards import Judge, Perspective, Scorer

KEY = "sk-Very-Secret-0123456789"


TEXTS = ["a", "bb", "", "dddd"]
PROMPTS = ["p1", "p2", "p3", "p4"]
IDS = [[1], [2, 2], [], [4, 4, 4, 4]]


def length(completions):
    return [len(text) for text in completions]


def score(*rewards, columns=None, **options):
    """The `Scores` of TEXTS by these rewards."""
    return Scorer(list(rewards), **options)(PROMPTS, TEXTS, IDS, columns or {})


def perspective(server, **options):
    return Perspective(endpoint=server.perspective, **{"queries_per_second": None, **options})


def judge(server, **options):
    return Judge(server.openai, "org/judge-7b", **{"rubric": "How kind is it?", **options})


def ask(reward, texts, prompts=None):
    """What an async reward gives, rounded: 1 - 0.07 is not 0.93 to the last bit."""
    prompts = [""] * len(texts) if prompts is None else prompts
    scores = asyncio.run(reward(prompts=prompts, completions=texts, completion_ids=[[]] * len(texts)))
    return [None if score is None else round(score, 9) for score in scores]


WORDS = [f"w{i}" for i in range(40)]
LONG = " ".join(WORDS * 20)  # 800 tokens


def make_tokenizer(path, *, pad=True, special=True, limit=None):
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate([*names, *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    if special:
        tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    options = {"pad_token": "[PAD]"} if pad else {}
    if limit is not None:
        options["model_max_length"] = limit
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", eos_token="[SEP]", **options
    ).save_pretrained(path)


SMALL = {
    "vocab_size": 44,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def make_bert(path, *, bias=None, labels=("bad", "good"), seed=0, **config):
    """A tiny BERT; with `bias`, its logits are exactly these for every text."""
    torch.manual_seed(seed)
    settings = {
        **SMALL,
        "initializer_range": 0.5,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    model = BertForSequenceClassification(BertConfig(**settings, **config))
    if bias is not None:
        torch.nn.init.zeros_(model.classifier.weight)
        model.classifier.bias.data = torch.tensor(bias)
    model.save_pretrained(path)
    make_tokenizer(path)
    return path
