"""Chats in `final/`: its tokenizer and chat template give the token ids of training behind the best reward token."""

from __future__ import annotations

import copy

import pytest
from helpers.chat_templates import (
    CHAT_TEMPLATES,
    CHATML,
    CHATML_WITH_GENERATION,
    CHATS,
    QWEN_2_5,
    SMOLLM_2,
    chat_tokenizer,
    flatten,
)
from helpers.reward_token_models import add_reward_tokens
from helpers.tiny_models import tiny_model, tiny_tokenizer
from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, TextGenerationPipeline
from transformers.utils.chat_template_utils import Chat

from quarkrl.data.chats import RefusedChat, encode_chats


def reload_steered(tokenizer, directory, attributes=("reward",)):
    """The conditioning, and the steered tokenizer as plain transformers loads it."""
    conditioning, extended, _ = add_reward_tokens(tokenizer, attributes=attributes, rows=len(tokenizer))
    conditioning.steer_tokenizer(extended).save_pretrained(directory)
    return conditioning, AutoTokenizer.from_pretrained(directory)


def serve(tokenizer, chat, **options):
    """The ids of a chat in a pipeline of transformers."""
    continued = chat[-1]["role"] == "assistant"
    end = {"continue_final_message": continued, "add_generation_prompt": not continued}
    return tokenizer.apply_chat_template(chat, return_dict=False, **end, **options)


# The chats that a template refuses, in training as in `final/`.
TOOLS = {"a tool call", "tool calls and a question"}
REFUSED = {
    "Gemma 2": {"a system message", *TOOLS},
    "Gemma 3": TOOLS,
    "ChatML": TOOLS,
    "generation blocks": TOOLS,
    "macros": {"an unfinished answer", "an unfinished answer, blank behind"},
}
READS_PARTS = {"Gemma 3"}


@pytest.mark.parametrize("attributes", [("reward",), ("kind", "brief")], ids=len)
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_the_templates_of_popular_models_serve_the_ids_of_training(name, attributes, tmp_path):
    tokenizer = chat_tokenizer(name)
    conditioning, served = reload_steered(tokenizer, tmp_path, attributes)
    refused = set()
    for title, chat in CHATS.items():
        (trained,) = encode_chats(tokenizer, [chat])
        if isinstance(trained, RefusedChat):
            refused.add(title)
            with pytest.raises((TemplateError, TypeError, ValueError)):
                serve(served, chat)
        else:
            chat = chat if name in READS_PARTS else flatten(chat)
            assert serve(served, chat) == conditioning.prefix(trained, conditioning.best), title
    assert refused == REFUSED.get(name, set())


def test_a_pipeline_of_transformers_reads_the_ids_of_training(tmp_path):
    tokenizer = chat_tokenizer("Qwen 2.5")
    conditioning, served = reload_steered(tokenizer, tmp_path)
    pipeline = TextGenerationPipeline(tiny_model("gpt2", served), served)
    for title in ("several turns", "an unfinished answer", "a tool call"):
        (trained,) = encode_chats(tokenizer, [CHATS[title]])
        read = pipeline.preprocess(Chat(CHATS[title]))["input_ids"].tolist()
        assert read == [conditioning.prefix(trained, conditioning.best)]


def test_each_named_template_is_steered(tmp_path):
    tokenizer = chat_tokenizer("ChatML")
    tokenizer.chat_template = {"default": CHATML, "tool_use": QWEN_2_5, "rag": SMOLLM_2}
    plain = copy.deepcopy(tokenizer)
    conditioning, served = reload_steered(tokenizer, tmp_path)
    assert served.chat_template.keys() == plain.chat_template.keys()
    chat = CHATS["several turns"]
    for options in ({}, {"chat_template": "rag"}, {"chat_template": "tool_use"}, {"tools": [{"name": "add"}]}):
        assert serve(served, chat, **options) == conditioning.prefix(serve(plain, chat, **options), conditioning.best)


def test_a_template_named_like_no_default_is_steered_too(tmp_path):
    tokenizer = chat_tokenizer("ChatML")
    tokenizer.chat_template = {"short": CHATML}
    conditioning, extended, _ = add_reward_tokens(tokenizer)
    served = conditioning.steer_tokenizer(extended)
    rendered = served.apply_chat_template(CHATS["one letter"], chat_template="short", tokenize=False)
    assert rendered == "<|reward_2|><|im_start|>user\na<|im_end|>\n"


# Assistant masks

GENERATION = {
    "as training libraries write it": CHATML_WITH_GENERATION,
    "BOS": "{{ bos_token }}" + CHATML_WITH_GENERATION,
    "from the first character": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "blanks around the tags": "a \n {%- generation -%} \n {{ messages[0].content }}\n{%- endgeneration -%}\n b",
    "blanks kept": "a  {%+ generation %}\n {{ messages[0].content }}\n {%+ endgeneration %}\n b\n",
    "empty": "ab{% generation %}{% endgeneration %}b{% generation %}c{% endgeneration %}d",
    "two in a row": "{% generation %}ab{% endgeneration %}{% generation %}c{% endgeneration %}",
    "variables": "{% set x = 1 %}ab{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    "{% for m in messages %}{% generation %}{{ loop.index }}{{ m.role }}{% endgeneration %}{% endfor %}",
    "in words": "{# {% generation %} #}{% raw %}{% generation %}{% endraw %}{% generation %}a{% endgeneration %}"
    "{{ 'generation' }}",
}


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("template", GENERATION.values(), ids=GENERATION)
def test_the_assistant_masks_are_those_of_the_plain_template_behind_the_reward_tokens(template, bos, tmp_path):
    tokenizer = tiny_tokenizer(bos=bos, chat_template=template)
    conditioning, served = reload_steered(tokenizer, tmp_path, ("kind", "brief"))
    marked = 0
    for chat in (CHATS["several turns"], CHATS["unicode"], CHATS["one letter"]):
        plain, steered = (
            one.apply_chat_template(chat, return_assistant_tokens_mask=True) for one in (tokenizer, served)
        )
        ids, mask = plain["input_ids"], plain["assistant_masks"]
        assert steered["input_ids"] == conditioning.prefix(ids, conditioning.best)
        start = steered["input_ids"].index(conditioning.prefixes[0][2][0])
        assert steered["assistant_masks"] == [*mask[:start], 0, 0, *mask[start:]]
        marked += sum(mask)
    assert marked


# Tokenizers that treat the start of a text, or the blanks around a special token, in their own way


def word_tokenizer(template: str, scheme: str = "first", bos: AddedToken | None = None) -> PreTrainedTokenizerFast:
    """A Unigram tokenizer in which a blank before a word is a part of it."""
    pieces = ["<unk>", "▁", *"ab\n>▁", "▁a", "▁b", "▁▁"]
    backend = Tokenizer(models.Unigram([(piece, -1.0 - 1 / len(piece)) for piece in dict.fromkeys(pieces)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    tokenizer.add_tokens([AddedToken("<u>", special=True), AddedToken("<l>", lstrip=True, special=True)])
    if bos:
        tokenizer.add_special_tokens({"bos_token": bos})
    tokenizer.chat_template = template
    return tokenizer


STARTS = [
    "a b",
    " a",
    "  a",
    "\na",
    "▁a",
    "<u>a",
    "<u> a",
    " <u>a",
    "<l>a",
    " <l> a",
    "<s>a",
    "<s> a",
    " <s> a",
    " ",
    "</s>",
]


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_blank_that_the_tokenizer_adds_at_the_start_is_served(scheme, tmp_path):
    """llama.cpp#8584: a chat that starts with a word, not with BOS, starts with the blank of that word."""
    tokenizer = word_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}", scheme)
    conditioning, served = reload_steered(tokenizer, tmp_path)
    for text in STARTS:
        chat = [{"role": "user", "content": text}]
        assert serve(served, chat) == conditioning.prefix(serve(tokenizer, chat), conditioning.best), text


@pytest.mark.parametrize("normalizer", [normalizers.Prepend("▁"), normalizers.Strip(), normalizers.Replace(" ", "▁")])
def test_a_normaliser_can_add_or_remove_the_blank_at_the_start(normalizer, tmp_path):
    tokenizer = word_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer.backend_tokenizer.normalizer = normalizer
    conditioning, served = reload_steered(tokenizer, tmp_path)
    for text in ("a b", "\na" if isinstance(normalizer, normalizers.Prepend) else "b", "<u>a", "▁a"):
        chat = [{"role": "user", "content": text}]
        assert serve(served, chat) == conditioning.prefix(serve(tokenizer, chat), conditioning.best), text


@pytest.mark.parametrize("scheme", ["first", "always"])
@pytest.mark.parametrize("lstrip", [True, False])
@pytest.mark.parametrize("rstrip", [True, False])
def test_blanks_that_bos_takes_from_the_text_are_not_served(scheme, lstrip, rstrip, tmp_path):
    bos = AddedToken("<s>", lstrip=lstrip, rstrip=rstrip, special=True)
    tokenizer = word_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}", scheme, bos)
    conditioning, served = reload_steered(tokenizer, tmp_path)
    for text in STARTS:
        chat = [{"role": "user", "content": text}]
        assert serve(served, chat) == conditioning.prefix(serve(tokenizer, chat), conditioning.best), text


def test_reward_tokens_keep_their_ids_where_the_vocabulary_has_gaps(tmp_path):
    """The tokenizers library numbers an added token by counting, again each time a tokenizer is loaded."""
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 3, "<unk>": 6, "<s>": 9}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    conditioning, extended, _ = add_reward_tokens(tokenizer, rows=10)
    conditioning.steer_tokenizer(extended).save_pretrained(tmp_path)
    served = AutoTokenizer.from_pretrained(tmp_path)
    assert conditioning.new_token_ids == [10, 11, 12]
    assert serve(served, [{"role": "user", "content": "a b"}]) == [9, 12, 0, 3]
    assert served.decode([9, 12, 0, 3]) == "<s> <|reward_2|> a b"
