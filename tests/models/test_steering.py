"""The steered tokenizer: it puts reward tokens before each prompt by itself, also when saved and in chat templates."""

from __future__ import annotations

import json

import pytest
from helpers.reward_token_models import add_reward_tokens
from helpers.tiny_models import BOS, CHAT_TEMPLATE, EOS, SHARED, needs_shared, tiny_tokenizer
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaTokenizer

from quarkrl.data.encoding import encode_prompts
from quarkrl.errors import UserError
from quarkrl.models.steering import steer_tokenizer

TOKENIZERS = {
    "plain": (lambda: tiny_tokenizer(), [2, 64, 65]),
    "bos": (lambda: tiny_tokenizer(bos=True), ["bos", 2, 64, 65]),
    # A prompt is continued, so nothing is added behind it.
    "eos behind": (lambda: tiny_tokenizer(eos_after=True), [2, 64, 65]),
    "bos and eos": (lambda: tiny_tokenizer(bos=True, eos_after=True), ["bos", 2, 64, 65]),
    "own pad": (lambda: tiny_tokenizer(bos=True, pad="own"), ["bos", 2, 64, 65]),
    "add_bos_token": (lambda: tiny_tokenizer(bos=True, add_bos_token=True), ["bos", 2, 64, 65]),
    "llama": (
        lambda: LlamaTokenizer(vocab={"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "b": 5}, add_bos_token=True),
        ["bos", 2, 3, 4, 5],
    ),
}


@pytest.mark.parametrize(("make", "expected"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_steered_tokenizer_puts_the_best_token_first_also_when_loaded(make, expected, tmp_path):
    conditioning, extended, _ = add_reward_tokens(make())
    named = {"bos": extended.bos_token_id, "eos": extended.eos_token_id, 2: conditioning.prefixes[0][2][0]}
    expected = [named.get(piece, piece) for piece in expected]
    steered = conditioning.steer_tokenizer(extended)
    steered.save_pretrained(tmp_path)
    for tokenizer in (steered, AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer("ab")["input_ids"] == expected
        assert tokenizer(["ab", "ab"])["input_ids"] == [expected, expected]
        assert (
            tokenizer("ab", add_special_tokens=False)["input_ids"] == extended("ab", add_special_tokens=False).input_ids
        )
        assert conditioning.strip(tokenizer("ab")["input_ids"]) == encode_prompts(extended, ["ab"])[0]
        assert tokenizer.decode(expected, skip_special_tokens=True) == "ab"
        assert len(tokenizer) == len(extended)


def test_a_tokenizer_whose_config_adds_bos_is_steered_when_loaded_too(tmp_path):
    """With `add_bos_token` in tokenizer_config.json, transformers would replace the post-processor when it loads."""
    tiny_tokenizer(bos=True).save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "add_bos_token": True}))
    conditioning, extended, _ = add_reward_tokens(AutoTokenizer.from_pretrained(tmp_path))
    conditioning.steer_tokenizer(extended).save_pretrained(tmp_path / "steered")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "steered")
    assert loaded("ab")["input_ids"] == [extended.bos_token_id, conditioning.prefixes[0][2][0], 64, 65]


@pytest.mark.parametrize("bos", [True, False])
def test_a_steered_tokenizer_gives_the_ids_of_prefix(bos):
    conditioning, extended, _ = add_reward_tokens(tiny_tokenizer(bos=bos), attributes=("kind", "brief"))
    for quantiles in ((2, 2), (0, 1)):
        steered = conditioning.steer_tokenizer(extended, quantiles)
        for text in ("ab", "", "a b\n\n c", "é<eos>"):
            assert steered(text)["input_ids"] == conditioning.prefix(extended(text)["input_ids"], quantiles)


def test_a_steered_tokenizer_pads_and_truncates():
    conditioning, extended, _ = add_reward_tokens(tiny_tokenizer(bos=True, pad="own"))
    steered = conditioning.steer_tokenizer(extended)
    bos, best, pad = extended.bos_token_id, conditioning.prefixes[0][2][0], extended.pad_token_id
    batch = steered(["ab", "a"], padding=True, padding_side="left")
    assert batch["input_ids"] == [[bos, best, 64, 65], [pad, bos, best, 64]]
    assert batch["attention_mask"] == [[1, 1, 1, 1], [0, 1, 1, 1]]
    assert steered("abcdef", truncation=True, max_length=4)["input_ids"] == [bos, best, 64, 65]
    assert steered("a", "b")["input_ids"] == [bos, best, 64, bos, 65]


def test_a_slow_tokenizer_is_refused():
    tokenizer = ByT5Tokenizer()
    with pytest.raises(UserError, match="tokenizer ByT5Tokenizer: must be a fast tokenizer"):
        steer_tokenizer(tokenizer, [90], "", [], {})


@needs_shared
def test_a_real_tokenizer_is_steered(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "webmix-gpt2")
    conditioning, extended, _ = add_reward_tokens(tokenizer, num_quantiles=5)
    conditioning.steer_tokenizer(extended).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    plain = tokenizer("The weather is")["input_ids"]
    assert loaded("The weather is")["input_ids"] == conditioning.prefix(plain, conditioning.best)


# Chat templates

CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hello\nthere"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "bye"},
]
TEMPLATES = {
    "as real ones": CHAT_TEMPLATE,
    "a BOS in words": "<bos>{% for message in messages %}{{ message.content }}\n{% endfor %}",
    "no BOS": "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}",
    "ends with a newline": "{{ bos_token }}{{ messages[0].content }}\n",
    "ends with two newlines": "{{ messages[0].content }}\n\n",
    "ends with CRLF": "{{ messages[0].content }}\r\n",
    "ends with blanks": "{{ messages[0].content }}\n  ",
    "ends with a block": "{% if true %}{{ messages[0].content }}{% endif %}\n",
    "starts with a newline": "\n{{ messages[0].content }}",
    "starts with an indented block": "  {% if true %}x{% endif %}{{ messages[0].content }}",
    "sets, macros, namespaces": "{% set ns = namespace(n=0) %}{% macro f(x) %}<{{ x }}>{% endmacro %}"
    "{% for message in messages %}{% set ns.n = ns.n + 1 %}{{ f(message.content) }}{{ ns.n }}{% endfor %}{{ ns.n }}",
    "breaks and tools": "{% for message in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{{ message | tojson }}{% endfor %}{{ tools | tojson if tools }}",
    "generation blocks": "{% for message in messages %}{% generation %}{{ message.content }}{% endgeneration %}"
    "{% endfor %}",
}


@pytest.mark.parametrize("generation_prompt", [False, True])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_steered_template_renders_as_before_with_the_token_in_front(template, bos, generation_prompt):
    conditioning, extended, _ = add_reward_tokens(tiny_tokenizer(bos=bos, chat_template=template))
    steered = conditioning.steer_tokenizer(extended)
    rendered, plain = (
        tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=generation_prompt)
        for tokenizer in (steered, extended)
    )
    if bos and plain.startswith(BOS):
        assert rendered == BOS + "<|reward_2|>" + plain.removeprefix(BOS)
    else:
        assert rendered == "<|reward_2|>" + plain
    ids, plain_ids = (
        tokenizer.apply_chat_template(CHAT, add_generation_prompt=generation_prompt, return_dict=False)
        for tokenizer in (steered, extended)
    )
    assert ids == conditioning.prefix(plain_ids, conditioning.best)


def test_a_template_by_hand():
    conditioning, extended, _ = add_reward_tokens(tiny_tokenizer(bos=True, chat_template=True))
    rendered = conditioning.steer_tokenizer(extended).apply_chat_template(
        CHAT[:2], tokenize=False, add_generation_prompt=True
    )
    assert rendered == f"{BOS}<|reward_2|>[sys]be kind[/sys][user] hello\nthere{EOS}[assistant]"


@pytest.mark.parametrize(
    ("quantile", "token"), [("worst", 0), ("best", 2), (1, 1), ("1", 1), (0, 0), (None, 2)], ids=repr
)
def test_an_argument_of_the_template_selects_another_quantile(quantile, token):
    conditioning, extended, _ = add_reward_tokens(tiny_tokenizer(bos=True, chat_template=True), attributes=("a", "b"))
    steered = conditioning.steer_tokenizer(extended)
    rendered = steered.apply_chat_template(CHAT, tokenize=False, quantile=quantile)
    assert rendered.startswith(f"{BOS}<|a_{token}|><|b_{token}|>[sys]be kind")


def test_an_unknown_quantile_in_the_argument_of_the_template():
    conditioning, extended, _ = add_reward_tokens(tiny_tokenizer(chat_template=True))
    with pytest.raises(Exception, match="quantile: must be one of best, worst, 0, 1, 2"):
        conditioning.steer_tokenizer(extended).apply_chat_template(CHAT, tokenize=False, quantile=3)


def test_a_template_survives_saving(tmp_path):
    conditioning, extended, _ = add_reward_tokens(
        tiny_tokenizer(bos=True, chat_template=True), attributes=("kind", "brief")
    )
    steered = conditioning.steer_tokenizer(extended, (0, 1))
    steered.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.apply_chat_template(CHAT, tokenize=False).startswith(f"{BOS}<|kind_0|><|brief_1|>[sys]")
    assert loaded.chat_template == steered.chat_template


def test_bos_and_reward_tokens_may_have_any_characters():
    bos = '<"bos"▁😀\\>'
    tokenizer = tiny_tokenizer(chat_template="{{ bos_token }}{{ messages[0].content }}")
    tokenizer.add_special_tokens({"bos_token": bos})
    conditioning, extended, _ = add_reward_tokens(tokenizer, attributes=("güte😀",))
    rendered = conditioning.steer_tokenizer(extended).apply_chat_template(CHAT, tokenize=False)
    assert rendered == f"{bos}<|güte😀_2|>be kind"


def test_an_exception_of_a_template_is_still_raised():
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}"
    conditioning, extended, _ = add_reward_tokens(tiny_tokenizer(chat_template=template))
    with pytest.raises(Exception, match="no system, please"):
        conditioning.steer_tokenizer(extended).apply_chat_template(CHAT, tokenize=False)


def test_a_tokenizer_without_a_template_gets_none():
    conditioning, extended, _ = add_reward_tokens()
    assert conditioning.steer_tokenizer(extended).chat_template is None
