"""Reward tokens: how many, where they stand, what their rows are, and that a saved tokenizer puts them there itself."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.tiny import ARCHITECTURES, BOS, CHAT_TEMPLATE, EOS, SHARED, needs_shared, tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaTokenizer

from quarkrl.errors import UserError
from quarkrl.models.conditioning import FACTS_FILE, Conditioning, load_facts, reward_token

EVERY_MODEL = pytest.mark.parametrize("architecture", ARCHITECTURES)
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def conditioned(tokenizer=None, num_quantiles: int = 3, attributes=("reward",), architecture="gpt2", seed=0, **model):
    """A conditioning, the tokenizer and the model it was added to."""
    tokenizer = tokenizer or tiny_tokenizer()
    model = tiny_model(architecture, tokenizer, **model)
    conditioning, extended = Conditioning.add_to(tokenizer, model, num_quantiles, attributes, seed)
    return conditioning, extended, model


# The tokens


def test_one_token_per_quantile_is_added():
    tokenizer = tiny_tokenizer()  # 256 bytes and EOS
    conditioning, extended, model = conditioned(tokenizer, num_quantiles=5)
    assert conditioning == Conditioning(("reward",), ((257, 258, 259, 260, 261),), bos_id=None, vocab_size=257)
    assert len(extended) == len(tokenizer) + 5 == 262
    assert extended.convert_ids_to_tokens([257, 261]) == ["<|reward_0|>", "<|reward_4|>"]
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 262
    assert conditioning.num_quantiles == 5 and conditioning.best == (4,)


def test_one_token_per_quantile_and_attribute_is_added():
    conditioning, extended, _ = conditioned(num_quantiles=2, attributes=("kind", "brief"))
    assert conditioning.token_ids == ((257, 258), (259, 260)) and conditioning.best == (1, 1)
    names = ["<|kind_0|>", "<|kind_1|>", "<|brief_0|>", "<|brief_1|>"]
    assert extended.convert_ids_to_tokens([257, 258, 259, 260]) == names
    assert [reward_token("kind", 0), reward_token("brief", 1)] == [names[0], names[3]]
    assert len(extended) == 261


def test_the_given_tokenizer_is_left_alone():
    tokenizer = tiny_tokenizer(bos=True, chat_template=True)
    before = tokenizer.backend_tokenizer.to_str()
    conditioning, extended, _ = conditioned(tokenizer)
    conditioning.steered(extended)
    assert tokenizer.backend_tokenizer.to_str() == before and tokenizer.chat_template == CHAT_TEMPLATE
    assert extended("ab")["input_ids"] == tokenizer("ab")["input_ids"]  # added, not yet put anywhere


def test_a_reward_token_in_a_text_is_one_token_and_is_no_part_of_what_people_read():
    conditioning, extended, _ = conditioned()
    ids = extended("a<|reward_1|>b")["input_ids"]
    assert ids == [64, conditioning.token_ids[0][1], 65]
    assert extended.decode(ids, skip_special_tokens=True) == "ab"


def test_a_model_that_has_reward_tokens_is_refused_before_anything_changes():
    _, extended, model = conditioned()
    with pytest.raises(UserError, match=r"already has the reward token <\|reward_0\|>.*start from the model"):
        Conditioning.add_to(extended, model, 3)
    with pytest.raises(UserError, match=r"reward_2"):  # even if only some are there
        Conditioning.add_to(_with_token(tiny_tokenizer(), "<|reward_2|>"), model, 5)
    assert model.get_input_embeddings().weight.shape[0] == 260


def _with_token(tokenizer, token: str):
    tokenizer.add_tokens([token], special_tokens=True)
    return tokenizer


@pytest.mark.parametrize(
    ("quantile", "expected"), [("best", 4), ("worst", 0), (0, 0), (4, 4), ("0", 0), ("3", 3)], ids=str
)
def test_a_quantile_by_name_or_number(quantile, expected):
    conditioning = Conditioning(("a", "b"), (tuple(range(5)), tuple(range(5, 10))), None, 0)
    assert conditioning.quantiles_of(quantile) == (expected, expected)


@pytest.mark.parametrize("quantile", [5, -1, "5", "-1", "Best", "", "1.0", 1.0, None, True, "²"], ids=repr)
def test_any_other_quantile_is_refused_with_what_there_is(quantile):
    conditioning = Conditioning(("a",), (tuple(range(5)),), None, 0)
    with pytest.raises(UserError, match=r"want best, worst or a number from 0 \(worst\) to 4 \(best\)"):
        conditioning.quantiles_of(quantile)


# Prefix and strip

WITH_BOS = Conditioning(("kind", "brief"), ((90, 91, 92), (93, 94, 95)), bos_id=1, vocab_size=90)
WITHOUT_BOS = Conditioning(("kind",), ((90, 91, 92),), bos_id=None, vocab_size=90)


@pytest.mark.parametrize(
    ("conditioning", "prompt", "quantiles", "expected"),
    [
        (WITHOUT_BOS, [5, 6], (2,), [92, 5, 6]),
        (WITHOUT_BOS, [5, 6], (0,), [90, 5, 6]),
        (WITHOUT_BOS, [], (1,), [91]),
        (WITH_BOS, [1, 5, 6], (2, 0), [1, 92, 93, 5, 6]),
        (WITH_BOS, [5, 1, 6], (2, 0), [92, 93, 5, 1, 6]),  # BOS elsewhere is a word like any other
        (WITH_BOS, [1], (0, 1), [1, 90, 94]),
        (WITH_BOS, [1, 1, 5], (0, 1), [1, 90, 94, 1, 5]),
        (WITH_BOS, [], (0, 1), [90, 94]),
    ],
)
def test_the_prefix_stands_first_or_after_bos(conditioning, prompt, quantiles, expected):
    assert conditioning.prefix(prompt, quantiles) == expected


@settings(max_examples=50, deadline=None)
@given(prompt=st.lists(st.integers(0, 89)), quantiles=st.tuples(st.integers(0, 2), st.integers(0, 2)))
def test_strip_takes_away_what_prefix_put_there(prompt, quantiles):
    assert WITH_BOS.strip(WITH_BOS.prefix(prompt, quantiles)) == prompt
    assert WITHOUT_BOS.strip(WITHOUT_BOS.prefix(prompt, quantiles[:1])) == prompt


# Rows


@EVERY_MODEL
@TIED
def test_old_rows_stay_new_rows_come_and_tied_stays_tied(architecture, tied):
    tokenizer = tiny_tokenizer()
    plain = tiny_model(architecture, tokenizer, tied=tied)
    conditioning, _, model = conditioned(tokenizer, 5, architecture=architecture, tied=tied)
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (inputs is outputs) == tied == model.config.tie_word_embeddings
    for weight, old in ((inputs, plain.get_input_embeddings().weight), (outputs, plain.get_output_embeddings().weight)):
        assert weight.shape == (262, 16) and torch.equal(weight[:257], old)
        assert weight[257:].unique(dim=0).shape[0] == 5  # five different rows
    assert (inputs[257:] == outputs[257:]).all() == tied
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(model(ids).logits[..., :257], plain(ids).logits)
    assert conditioning.vocab_size == 257


def test_a_model_with_new_rows_is_saved_and_loaded_as_it_is(tmp_path):
    _, _, model = conditioned()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


@TIED
def test_an_adapter_trains_the_rows_of_the_reward_tokens_and_no_other(tied):
    conditioning, _, model = conditioned(architecture="llama", tied=tied)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    adapted = conditioning.with_adapter(model, config)
    assert config.trainable_token_indices is None  # the user's own stays as it was
    before = adapted.get_input_embeddings()(torch.arange(260)).detach().clone()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    adapted(input_ids=torch.tensor([[258, 64, 65]]), labels=torch.tensor([[258, 64, 65]])).loss.backward()
    optimizer.step()
    moved = (adapted.get_input_embeddings()(torch.arange(260)) != before).any(1).nonzero().flatten().tolist()
    assert 258 in moved and set(moved) <= {257, 258, 259}


def spread(weight: torch.Tensor, rows: int) -> None:
    """Give each dimension of the old rows a mean and a deviation of its own."""
    width = weight[:rows].shape[1:].numel()
    mean, std = torch.linspace(-5, 5, width), torch.linspace(0.1, 3, width)
    with torch.no_grad():
        weight[:rows] = (mean + std * torch.randn(rows, width)).reshape(weight[:rows].shape)


def assert_standard_normal(z: torch.Tensor) -> None:
    """Bounds are some four standard errors wide."""
    n = z.numel()
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.std() - 1) < 4 / (2 * n) ** 0.5
    assert abs((z.abs() < 1).double().mean() - 0.6827) < 4 * 0.465 / n**0.5
    assert abs((z.abs() < 2).double().mean() - 0.9545) < 4 * 0.208 / n**0.5


def test_new_rows_are_drawn_from_the_mean_and_deviation_of_each_dimension():
    tokenizer = tiny_tokenizer()
    model = tiny_model("phi", tokenizer, tied=False, hidden_size=256)
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    for values in (inputs.weight, outputs.weight, outputs.bias):
        spread(values, 257)
    Conditioning.add_to(tokenizer, model, 20)
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    z = [(w[257:] - w[:257].mean(0)) / w[:257].std(0) for w in (inputs.weight, outputs.weight, outputs.bias)]
    assert [each.shape for each in z] == [(20, 256), (20, 256), (20,)]
    assert_standard_normal(z[0])
    assert_standard_normal(z[1])
    assert abs(z[2].mean()) < 1 and 0.4 < z[2].std() < 1.6
    # The rows of the two layers have nothing to do with each other.
    assert abs(torch.corrcoef(torch.stack([z[0].flatten(), z[1].flatten()]))[0, 1]) < 0.06


def test_new_rows_depend_on_the_seed_and_on_nothing_else():
    def rows(seed: int, global_seed: int) -> torch.Tensor:
        torch.manual_seed(global_seed)
        _, _, model = conditioned(seed=seed)
        return model.get_input_embeddings().weight[257:]

    assert torch.equal(rows(0, 1), rows(0, 2))
    assert not torch.allclose(rows(0, 1), rows(1, 1))


@TIED
def test_rows_that_pad_the_embedding_are_used_before_it_grows(tied):
    """As in Qwen, whose embedding has more rows than its tokenizer has tokens."""
    tokenizer = tiny_tokenizer()
    plain = tiny_model("qwen3", tokenizer, tied=tied, rows=320)
    conditioning, _, model = conditioned(tokenizer, 5, architecture="qwen3", tied=tied, rows=320)
    weight = model.get_input_embeddings().weight
    assert conditioning.token_ids == ((257, 258, 259, 260, 261),) and conditioning.vocab_size == 257
    assert weight.shape[0] == 320 and torch.equal(weight[:257], plain.get_input_embeddings().weight[:257])
    assert not torch.isclose(weight[257:262], plain.get_input_embeddings().weight[257:262]).all(1).any()
    assert torch.equal(weight[262:], plain.get_input_embeddings().weight[262:])


def test_padding_too_small_for_the_reward_tokens_grows():
    conditioning, _, model = conditioned(num_quantiles=5, rows=259)
    assert conditioning.vocab_size == 257 and model.get_input_embeddings().weight.shape[0] == 262


def test_a_tokenizer_larger_than_the_embedding():
    """Tokens of the tokenizer that have no row are no words of the model, and stay so."""
    conditioning, _, model = conditioned(num_quantiles=5, rows=200)
    assert conditioning.token_ids == ((257, 258, 259, 260, 261),) and conditioning.vocab_size == 200
    assert model.get_input_embeddings().weight.shape[0] == 262


# A steered tokenizer

TOKENIZERS = {
    "plain": (lambda: tiny_tokenizer(), [2, 64, 65]),
    "bos": (lambda: tiny_tokenizer(bos=True), ["bos", 2, 64, 65]),
    "eos behind": (lambda: tiny_tokenizer(eos_after=True), [2, 64, 65, "eos"]),
    "bos and eos": (lambda: tiny_tokenizer(bos=True, eos_after=True), ["bos", 2, 64, 65, "eos"]),
    "own pad": (lambda: tiny_tokenizer(bos=True, pad="own"), ["bos", 2, 64, 65]),
    "add_bos_token": (lambda: tiny_tokenizer(bos=True, add_bos_token=True), ["bos", 2, 64, 65]),
    "llama": (
        lambda: LlamaTokenizer(vocab={"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "b": 5}, add_bos_token=True),
        ["bos", 2, 3, 4, 5],
    ),
}


@pytest.mark.parametrize(("make", "expected"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_steered_tokenizer_puts_the_best_token_first_also_when_loaded(make, expected, tmp_path):
    conditioning, extended, _ = conditioned(make())
    named = {"bos": extended.bos_token_id, "eos": extended.eos_token_id, 2: conditioning.token_ids[0][2]}
    expected = [named.get(piece, piece) for piece in expected]
    steered = conditioning.steered(extended)
    steered.save_pretrained(tmp_path)
    for tokenizer in (steered, AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer("ab")["input_ids"] == expected
        assert tokenizer(["ab", "ab"])["input_ids"] == [expected, expected]
        assert (
            tokenizer("ab", add_special_tokens=False)["input_ids"] == extended("ab", add_special_tokens=False).input_ids
        )
        assert conditioning.strip(tokenizer("ab")["input_ids"]) == extended("ab")["input_ids"]
        assert tokenizer.decode(expected, skip_special_tokens=True) == "ab"
        assert len(tokenizer) == len(extended)


def test_a_tokenizer_from_a_directory_that_asks_for_bos_by_its_config_stays_steered(tmp_path):
    """`add_bos_token` in tokenizer_config.json makes transformers set the post-processor anew when it loads."""
    tiny_tokenizer(bos=True).save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "add_bos_token": True}))
    conditioning, extended, _ = conditioned(AutoTokenizer.from_pretrained(tmp_path))
    conditioning.steered(extended).save_pretrained(tmp_path / "steered")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "steered")
    assert loaded("ab")["input_ids"] == [extended.bos_token_id, conditioning.token_ids[0][2], 64, 65]


@pytest.mark.parametrize("bos", [True, False])
def test_a_steered_tokenizer_gives_what_prefix_gives(bos):
    conditioning, extended, _ = conditioned(tiny_tokenizer(bos=bos), attributes=("kind", "brief"))
    for quantiles in ((2, 2), (0, 1)):
        steered = conditioning.steered(extended, quantiles)
        for text in ("ab", "", "a b\n\n c", "é<eos>"):
            assert steered(text)["input_ids"] == conditioning.prefix(extended(text)["input_ids"], quantiles)


def test_a_steered_tokenizer_pads_and_cuts_like_any_other():
    conditioning, extended, _ = conditioned(tiny_tokenizer(bos=True, pad="own"))
    steered = conditioning.steered(extended)
    bos, best, pad = extended.bos_token_id, conditioning.token_ids[0][2], extended.pad_token_id
    batch = steered(["ab", "a"], padding=True, padding_side="left")
    assert batch["input_ids"] == [[bos, best, 64, 65], [pad, bos, best, 64]]
    assert batch["attention_mask"] == [[1, 1, 1, 1], [0, 1, 1, 1]]
    assert steered("abcdef", truncation=True, max_length=4)["input_ids"] == [bos, best, 64, 65]
    assert steered("a", "b")["input_ids"] == [bos, best, 64, bos, 65]


def test_a_slow_tokenizer_is_refused():
    tokenizer = ByT5Tokenizer()
    with pytest.raises(UserError, match="ByT5Tokenizer is a slow tokenizer"):
        WITHOUT_BOS.steered(tokenizer)


@needs_shared
def test_a_real_tokenizer_is_steered(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "webmix-gpt2")
    conditioning, extended, _ = conditioned(tokenizer, num_quantiles=5)
    conditioning.steered(extended).save_pretrained(tmp_path)
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
    conditioning, extended, _ = conditioned(tiny_tokenizer(bos=bos, chat_template=template))
    steered = conditioning.steered(extended)
    rendered, plain = (
        each.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=generation_prompt)
        for each in (steered, extended)
    )
    if bos and plain.startswith(BOS):
        assert rendered == BOS + "<|reward_2|>" + plain.removeprefix(BOS)
    else:
        assert rendered == "<|reward_2|>" + plain
    ids, plain_ids = (
        each.apply_chat_template(CHAT, add_generation_prompt=generation_prompt, return_dict=False)
        for each in (steered, extended)
    )
    assert ids == conditioning.prefix(plain_ids, conditioning.best)


def test_a_template_by_hand():
    conditioning, extended, _ = conditioned(tiny_tokenizer(bos=True, chat_template=True))
    rendered = conditioning.steered(extended).apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert rendered == f"{BOS}<|reward_2|>[sys]be kind[/sys][user] hello\nthere{EOS}[assistant]"


def test_a_template_survives_saving(tmp_path):
    conditioning, extended, _ = conditioned(tiny_tokenizer(bos=True, chat_template=True), attributes=("kind", "brief"))
    steered = conditioning.steered(extended, (0, 1))
    steered.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.apply_chat_template(CHAT, tokenize=False).startswith(f"{BOS}<|kind_0|><|brief_1|>[sys]")
    assert loaded.chat_template == steered.chat_template


def test_a_template_puts_tokens_of_any_script_after_a_bos_of_any_script():
    bos = '<"bos"▁😀\\>'
    tokenizer = tiny_tokenizer(chat_template="{{ bos_token }}{{ messages[0].content }}")
    tokenizer.add_special_tokens({"bos_token": bos})
    conditioning, extended, _ = conditioned(tokenizer, attributes=("güte😀",))
    rendered = conditioning.steered(extended).apply_chat_template(CHAT, tokenize=False)
    assert rendered == f"{bos}<|güte😀_2|>be kind"


def test_what_a_template_raises_is_still_raised():
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}"
    conditioning, extended, _ = conditioned(tiny_tokenizer(chat_template=template))
    with pytest.raises(Exception, match="no system, please"):
        conditioning.steered(extended).apply_chat_template(CHAT, tokenize=False)


def test_a_tokenizer_without_a_template_gets_none():
    conditioning, extended, _ = conditioned()
    assert conditioning.steered(extended).chat_template is None


# quark.json


def test_a_saved_conditioning_is_loaded_with_the_facts_beside_it(tmp_path):
    WITH_BOS.save(tmp_path, reward="toxicity", edges=[0.1, 0.2])
    assert Conditioning.load(tmp_path) == WITH_BOS
    assert Conditioning.load(str(tmp_path)) == WITH_BOS
    facts = load_facts(tmp_path)
    assert facts["reward"] == "toxicity" and facts["edges"] == [0.1, 0.2]
    assert [path.name for path in tmp_path.iterdir()] == [FACTS_FILE]


def test_a_model_quark_did_not_train_has_no_conditioning(tmp_path):
    assert Conditioning.load(tmp_path) is None and load_facts(tmp_path) is None


DAMAGED = {
    "empty": "",
    "cut off": '{"conditioning": {"attributes": ["rew',
    "no text": b"\xff\xfe\x00",
    "a list": "[]",
    "no conditioning": "{}",
    "no object": '{"conditioning": 3}',
    "null": '{"conditioning": null}',
    "a key is missing": '{"conditioning": {"attributes": ["reward"], "token_ids": [[1, 2]], "bos_id": null}}',
    "words for ids": '{"conditioning": {"attributes": ["a"], "token_ids": [["x"]], "bos_id": null, "vocab_size": 1}}',
    "flat ids": '{"conditioning": {"attributes": ["a"], "token_ids": [1, 2], "bos_id": null, "vocab_size": 1}}',
    "no ids": '{"conditioning": {"attributes": ["a"], "token_ids": [], "bos_id": null, "vocab_size": 1}}',
    "ids missing": '{"conditioning": {"attributes": ["a", "b"], "token_ids": [[1]], "bos_id": null, "vocab_size": 1}}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_told_in_one_line(tmp_path, content):
    (tmp_path / FACTS_FILE).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"quark\.json is damaged.*want what `quarkrl train` wrote") as caught:
        Conditioning.load(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
