"""Reward tokens: how many are added, their position in a prompt, their embedding rows, what a file may say of them."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.reward_token_models import add_reward_tokens, reward_tokens
from helpers.tiny_models import ARCHITECTURES, CHAT_TEMPLATE, tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from quarkrl.errors import UserError
from quarkrl.models.conditioning import Conditioning, reward_token

WITH_BOS = reward_tokens(("kind", "brief"), ((90, 91, 92), (93, 94, 95)), (1,), 90)
WITHOUT_BOS = reward_tokens(("kind",), ((90, 91, 92),), (), 90)
EVERY_MODEL = pytest.mark.parametrize("architecture", ARCHITECTURES)
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


# Tokens


def test_one_token_per_quantile_is_added():
    tokenizer = tiny_tokenizer()  # 256 bytes and EOS
    conditioning, extended, model = add_reward_tokens(tokenizer, num_quantiles=5)
    assert conditioning == reward_tokens(("reward",), ((257, 258, 259, 260, 261),), (), 257)
    assert len(extended) == len(tokenizer) + 5 == 262
    assert extended.convert_ids_to_tokens([257, 261]) == ["<|reward_0|>", "<|reward_4|>"]
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 262
    assert conditioning.num_quantiles == 5 and conditioning.best == (4,)


def test_one_token_per_quantile_and_attribute_is_added():
    conditioning, extended, _ = add_reward_tokens(num_quantiles=2, attributes=("kind", "brief"))
    assert conditioning.prefixes == (((257,), (258,)), ((259,), (260,))) and conditioning.best == (1, 1)
    names = ["<|kind_0|>", "<|kind_1|>", "<|brief_0|>", "<|brief_1|>"]
    assert extended.convert_ids_to_tokens([257, 258, 259, 260]) == names
    assert [reward_token("kind", 0), reward_token("brief", 1)] == [names[0], names[3]]
    assert len(extended) == 261


def test_the_given_tokenizer_is_not_changed():
    tokenizer = tiny_tokenizer(bos=True, chat_template=True)
    before = tokenizer.backend_tokenizer.to_str()
    conditioning, extended, _ = add_reward_tokens(tokenizer)
    conditioning.steer_tokenizer(extended)
    assert tokenizer.backend_tokenizer.to_str() == before and tokenizer.chat_template == CHAT_TEMPLATE
    assert extended("ab")["input_ids"] == tokenizer("ab")["input_ids"]  # Known, but not put first.


def test_a_reward_token_in_a_text_is_one_token_and_is_left_out_of_decoded_text():
    conditioning, extended, _ = add_reward_tokens()
    ids = extended("a<|reward_1|>b")["input_ids"]
    assert ids == [64, conditioning.prefixes[0][1][0], 65]
    assert extended.decode(ids, skip_special_tokens=True) == "ab"


def test_a_model_that_has_reward_tokens_is_refused_and_not_changed():
    _, extended, model = add_reward_tokens()
    with pytest.raises(UserError, match=r"already has the reward token <\|reward_0\|>"):
        Conditioning.add_to(extended, model, 3)
    with pytest.raises(UserError, match=r"reward_2"):  # One is enough.
        Conditioning.add_to(_with_token(tiny_tokenizer(), "<|reward_2|>"), model, 5)
    assert model.get_input_embeddings().weight.shape[0] == 260


def _with_token(tokenizer, token: str):
    tokenizer.add_tokens([token], special_tokens=True)
    return tokenizer


@pytest.mark.parametrize(
    ("quantile", "expected"), [("best", 4), ("worst", 0), (0, 0), (4, 4), ("0", 0), ("3", 3)], ids=str
)
def test_a_quantile_by_name_or_number(quantile, expected):
    conditioning = reward_tokens(("a", "b"), (tuple(range(5)), tuple(range(5, 10))), (), 0)
    assert conditioning.quantiles_of(quantile) == (expected, expected)


@pytest.mark.parametrize("quantile", [5, -1, "5", "-1", "Best", "", "1.0", 1.0, None, True, "²"], ids=repr)
def test_any_other_quantile_is_refused_with_the_possible_ones(quantile):
    conditioning = reward_tokens(("a",), (tuple(range(5)),), (), 0)
    with pytest.raises(UserError, match=r"must be best, worst, or a number from 0 \(worst\) to 4") as caught:
        conditioning.quantiles_of(quantile)
    assert str(caught.value).startswith(f"quantile {quantile!r}:")


@pytest.mark.parametrize(
    ("quantile", "expected"),
    [("kind=0,brief=best", (0, 2)), ("brief=1", (2, 1)), ("kind=worst", (0, 2)), (" brief=0 , kind=1", (1, 0))],
)
def test_a_quantile_for_each_attribute(quantile, expected):
    assert WITH_BOS.quantiles_of(quantile) == expected


@pytest.mark.parametrize(
    ("quantile", "message"),
    [
        ("rude=0", "must name attributes of the model, which are kind, brief"),
        ("breif=0", "Write NAME=QUANTILE,… Did you mean 'brief'"),
        ("kind=3", r"must be best, worst, or a number from 0 \(worst\) to 2"),
        ("kind=", "must be best, worst, or a number"),
        ("kind=0,", "must name attributes"),
        ("=0", "must name attributes"),
    ],
)
def test_a_wrong_quantile_of_an_attribute_is_refused(quantile, message):
    with pytest.raises(UserError, match=message) as caught:
        WITH_BOS.quantiles_of(quantile)
    assert str(caught.value).startswith(f"quantile {quantile!r}:")


# Prefix and strip


@pytest.mark.parametrize(
    ("conditioning", "prompt", "quantiles", "expected"),
    [
        (WITHOUT_BOS, [5, 6], (2,), [92, 5, 6]),
        (WITHOUT_BOS, [5, 6], (0,), [90, 5, 6]),
        (WITHOUT_BOS, [], (1,), [91]),
        (WITH_BOS, [1, 5, 6], (2, 0), [1, 92, 93, 5, 6]),
        (WITH_BOS, [5, 1, 6], (2, 0), [92, 93, 5, 1, 6]),  # BOS elsewhere is an ordinary token.
        (WITH_BOS, [1], (0, 1), [1, 90, 94]),
        (WITH_BOS, [1, 1, 5], (0, 1), [1, 90, 94, 1, 5]),
        (WITH_BOS, [], (0, 1), [90, 94]),
    ],
)
def test_the_reward_tokens_come_first_or_after_bos(conditioning, prompt, quantiles, expected):
    assert conditioning.prefix(prompt, quantiles) == expected


@settings(max_examples=50, deadline=None)
@given(prompt=st.lists(st.integers(0, 89)), quantiles=st.tuples(st.integers(0, 2), st.integers(0, 2)))
def test_strip_is_the_inverse_of_prefix(prompt, quantiles):
    assert WITH_BOS.strip(WITH_BOS.prefix(prompt, quantiles)) == prompt
    assert WITHOUT_BOS.strip(WITHOUT_BOS.prefix(prompt, quantiles[:1])) == prompt


# Embedding rows


@EVERY_MODEL
@TIED
def test_old_rows_are_kept_new_rows_differ_and_tied_stays_tied(architecture, tied):
    tokenizer = tiny_tokenizer()
    plain = tiny_model(architecture, tokenizer, tied=tied)
    conditioning, _, model = add_reward_tokens(tokenizer, 5, architecture=architecture, tied=tied)
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (inputs is outputs) == tied == model.config.tie_word_embeddings
    for weight, old in ((inputs, plain.get_input_embeddings().weight), (outputs, plain.get_output_embeddings().weight)):
        assert weight.shape == (262, 16) and torch.equal(weight[:257], old)
        assert weight[257:].unique(dim=0).shape[0] == 5  # All different.
    assert (inputs[257:] == outputs[257:]).all() == tied
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(model(ids).logits[..., :257], plain(ids).logits)
    assert conditioning.vocab_size == 257


def test_a_model_with_new_rows_is_loaded_as_it_was_saved(tmp_path):
    _, _, model = add_reward_tokens()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


@TIED
def test_an_adapter_trains_the_rows_of_the_reward_tokens_and_no_other(tied):
    conditioning, _, model = add_reward_tokens(architecture="llama", tied=tied)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    adapted = conditioning.add_adapter(model, config)
    assert config.trainable_token_indices is None  # The user's config is not changed.
    before = adapted.get_input_embeddings()(torch.arange(260)).detach().clone()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    adapted(input_ids=torch.tensor([[258, 64, 65]]), labels=torch.tensor([[258, 64, 65]])).loss.backward()
    optimizer.step()
    moved = (adapted.get_input_embeddings()(torch.arange(260)) != before).any(1).nonzero().flatten().tolist()
    assert 258 in moved and set(moved) <= {257, 258, 259}


def spread(weight: torch.Tensor, rows: int) -> None:
    """Give each dimension of the old rows its own mean and standard deviation."""
    width = weight[:rows].shape[1:].numel()
    mean, std = torch.linspace(-5, 5, width), torch.linspace(0.1, 3, width)
    with torch.no_grad():
        weight[:rows] = (mean + std * torch.randn(rows, width)).reshape(weight[:rows].shape)


def assert_standard_normal(z: torch.Tensor) -> None:
    """Check mean, deviation and two quantiles; the bounds are about four standard errors."""
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
    assert [values.shape for values in z] == [(20, 256), (20, 256), (20,)]
    assert_standard_normal(z[0])
    assert_standard_normal(z[1])
    assert abs(z[2].mean()) < 1 and 0.4 < z[2].std() < 1.6
    # The rows of the two layers are independent.
    assert abs(torch.corrcoef(torch.stack([z[0].flatten(), z[1].flatten()]))[0, 1]) < 0.06


def test_new_rows_depend_on_the_seed_alone():
    def rows(seed: int, global_seed: int) -> torch.Tensor:
        torch.manual_seed(global_seed)
        _, _, model = add_reward_tokens(seed=seed)
        return model.get_input_embeddings().weight[257:]

    assert torch.equal(rows(0, 1), rows(0, 2))
    assert not torch.allclose(rows(0, 1), rows(1, 1))


@TIED
def test_rows_that_pad_the_embedding_are_used_before_it_grows(tied):
    """As in Qwen, whose embedding is larger than its vocabulary."""
    tokenizer = tiny_tokenizer()
    plain = tiny_model("qwen3", tokenizer, tied=tied, rows=320)
    conditioning, _, model = add_reward_tokens(tokenizer, 5, architecture="qwen3", tied=tied, rows=320)
    weight = model.get_input_embeddings().weight
    assert conditioning.new_token_ids == [257, 258, 259, 260, 261] and conditioning.vocab_size == 257
    assert weight.shape[0] == 320 and torch.equal(weight[:257], plain.get_input_embeddings().weight[:257])
    assert not torch.isclose(weight[257:262], plain.get_input_embeddings().weight[257:262]).all(1).any()
    assert torch.equal(weight[262:], plain.get_input_embeddings().weight[262:])


def test_an_embedding_whose_padding_is_too_small_grows():
    conditioning, _, model = add_reward_tokens(num_quantiles=5, rows=259)
    assert conditioning.vocab_size == 257 and model.get_input_embeddings().weight.shape[0] == 262


def test_a_tokenizer_may_be_larger_than_the_embedding():
    """Tokens without an embedding row are never sampled, also when the embedding has grown."""
    conditioning, _, model = add_reward_tokens(num_quantiles=5, rows=200)
    assert conditioning.new_token_ids == [257, 258, 259, 260, 261] and conditioning.vocab_size == 200
    assert model.get_input_embeddings().weight.shape[0] == 262


# Saved and loaded


def test_a_saved_conditioning_is_loaded_from_a_directory(tmp_path):
    WITH_BOS.save(tmp_path, reward="toxicity")
    assert Conditioning.load(tmp_path) == Conditioning.load(str(tmp_path)) == WITH_BOS
    WITHOUT_BOS.save(tmp_path)
    assert Conditioning.load(tmp_path) == WITHOUT_BOS


def test_a_model_that_quark_did_not_train_has_no_conditioning(tmp_path):
    assert Conditioning.load(tmp_path) is None


GOOD = {"attributes": ["a", "b"], "prefixes": [[[5], [6]], [[7], [8]]], "start_ids": [1], "vocab_size": 5}
INCONSISTENT = {
    "attributes is a word": ({"attributes": "ab"}, "attributes"),
    "attributes are numbers": ({"attributes": [1, 2]}, "attributes"),
    "no attributes": ({"attributes": [], "prefixes": []}, "attributes"),
    "ids of one attribute missing": ({"prefixes": [[[5], [6]]]}, "prefixes"),
    "more quantiles for one attribute": ({"prefixes": [[[5], [6]], [[7], [8], [9]]]}, "prefixes"),
    "one quantile": ({"prefixes": [[[5]], [[7]]]}, "prefixes"),
    "ids that are not lists": ({"prefixes": [5, 6]}, "int"),
    "words for ids": ({"prefixes": [[["x"], ["y"]], [["z"], ["w"]]]}, "prefixes"),
    "one id twice": ({"prefixes": [[[5], [6]], [[6], [8]]]}, "prefixes"),
    "original ids above the reward tokens": ({"vocab_size": 6}, "vocab_size 6"),
    "no original ids": ({"vocab_size": 0}, "vocab_size 0"),
    "vocab_size is a word": ({"vocab_size": "5"}, "vocab_size '5'"),
    "BOS is a reward token": ({"start_ids": [5]}, "start_ids [5]"),
}


@pytest.mark.parametrize(("change", "problem"), INCONSISTENT.values(), ids=INCONSISTENT)
def test_an_inconsistent_conditioning_in_a_file_is_refused_in_one_line(tmp_path, change, problem):
    path = tmp_path / "quark.json"
    path.write_text(json.dumps({"conditioning": GOOD}), encoding="utf-8")
    assert Conditioning.load(tmp_path) == reward_tokens(("a", "b"), ((5, 6), (7, 8)), (1,), 5)
    path.write_text(json.dumps({"conditioning": {**GOOD, **change}}), encoding="utf-8")
    with pytest.raises(UserError, match=r"quark\.json is damaged") as caught:
        Conditioning.load(tmp_path)
    assert problem in str(caught.value) and len(str(caught.value).splitlines()) == 1


DAMAGED = {
    "empty": "",
    "cut off": '{"conditioning": {"attributes": ["rew',
    "no text": b"\xff\xfe\x00",
    "a list": "[]",
    "no conditioning": "{}",
    "no object": '{"conditioning": 3}',
    "null": '{"conditioning": null}',
    "a key is missing": '{"conditioning": {"attributes": ["reward"], "token_ids": [[1, 2]], "prefix_ids": []}}',
    "words for ids": '{"conditioning": {"attributes": ["a"], "token_ids": [["x"]], "prefix_ids": [], "vocab_size": 1}}',
    "flat ids": '{"conditioning": {"attributes": ["a"], "token_ids": [1, 2], "prefix_ids": [], "vocab_size": 1}}',
    "no ids": '{"conditioning": {"attributes": ["a"], "token_ids": [], "prefix_ids": [], "vocab_size": 1}}',
    "ids missing": '{"conditioning": {"attributes": ["a","b"], "token_ids": [[1]], "prefix_ids": [], "vocab_size": 1}}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "quark.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"quark\.json is damaged") as caught:
        Conditioning.load(tmp_path)
    assert str(tmp_path) in str(caught.value) and len(str(caught.value).splitlines()) == 1
