"""Reward models and classifiers score a text in a batch as the model scores it alone, whatever the text contains."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.kinds_of_tokenizers import llama_tokenizer, wordpiece_tokenizer
from helpers.tiny_models import EOS, PAD, tiny_tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification

from quarkrl.rewards import Classifier

# As templates of reward models: EOS after each message.
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}" + EOS + "{% endfor %}"
CHAT = [{"role": "user", "content": "How are you?"}]
ANSWERS = ["fine", "", "I am very well, thank you", "é☃", "no", f"I say {EOS} and {PAD}", "!"]

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
SEQ2SEQ = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
SEQ2SEQ |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
T5 = {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 32, "d_kv": 8}


def save_model(directory, architecture, tokenizer, **config):
    """Save a tiny classifier of one output with its tokenizer."""
    made = AutoConfig.for_model(
        architecture, vocab_size=len(tokenizer), num_labels=1, initializer_range=0.5, init_std=0.5, **config
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_config(made).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def score_alone(directory, rows):
    """What transformers gives for each row of token ids by itself."""
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    with torch.no_grad():
        return [float(model(torch.tensor([row])).logits[0, 0]) for row in rows]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tokenizer_pad", [None, "eos", "own"])
@pytest.mark.parametrize("model_pad", [None, -1, "eos", "own"])
def test_a_reward_model_reads_the_same_token_with_any_pad(model_pad, tokenizer_pad, side, tmp_path):
    """Where the model's own PAD is its EOS, it reads the token before the EOS that ends the text, also alone."""
    tokenizer = tiny_tokenizer(pad=tokenizer_pad, chat_template=TEMPLATE, padding_side=side)
    pad_id = {"eos": tokenizer.eos_token_id, "own": 7}.get(model_pad, model_pad)
    save_model(tmp_path, "gpt2", tokenizer, pad_token_id=pad_id, eos_token_id=256, **GPT2)
    rows = [
        tokenizer.apply_chat_template([*CHAT, {"role": "assistant", "content": text}], return_dict=False)
        for text in ANSWERS[:5]
    ]
    assert all(row[-1] == tokenizer.eos_token_id for row in rows)
    scores = Classifier(tmp_path, text="both", batch_size=3)([CHAT] * 5, ANSWERS[:5])
    assert scores == pytest.approx(score_alone(tmp_path, rows), abs=1e-4)
    assert len({round(score, 3) for score in scores}) == 5


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", SMALL),
        ("qwen2", {**SMALL, "num_key_value_heads": 2}),
        ("gpt_neox", SMALL),
        ("bert", {**SMALL, "pad_token_id": 3}),
        ("xlnet", {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32, "pad_token_id": 5}),
        ("bart", {**SEQ2SEQ, "pad_token_id": 1, "eos_token_id": 256, "decoder_start_token_id": 256}),
        ("t5", {**T5, "pad_token_id": 0, "eos_token_id": 256, "decoder_start_token_id": 0}),
    ],
)
def test_every_architecture_scores_a_batch_as_it_scores_a_text_alone(architecture, config, tmp_path):
    """Chats of one and of two turns have different numbers of EOS, which BART and T5 refuse in one batch."""
    tokenizer = tiny_tokenizer(chat_template=TEMPLATE)
    save_model(tmp_path, architecture, tokenizer, **config)
    chats = [CHAT, [*CHAT, {"role": "assistant", "content": "ok"}, *CHAT]] * 3
    scores = Classifier(tmp_path, text="both", batch_size=4)(chats, ANSWERS[:4] + ANSWERS[:2])
    rows = [
        tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": text}], return_dict=False)
        for chat, text in zip(chats, ANSWERS[:4] + ANSWERS[:2], strict=True)
    ]
    assert scores == pytest.approx(score_alone(tmp_path, rows), abs=1e-4)


def test_a_batch_that_has_every_id_of_the_vocabulary_is_scored_text_by_text(tmp_path):
    tokenizer = tiny_tokenizer(words=["a", "b"])
    save_model(tmp_path, "gpt2", tokenizer, pad_token_id=None, **GPT2)
    texts = ["a b c", "b", "a"]
    rows = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    tiny_tokenizer(words=["a", "b"], eos_after=True).save_pretrained(tmp_path)
    assert {i for row in rows for i in row} == set(range(len(tokenizer)))
    assert Classifier(tmp_path)(["p"] * 3, texts) == pytest.approx(score_alone(tmp_path, rows), abs=1e-4)


@pytest.mark.parametrize("architecture", ["bart", "t5"])
def test_special_tokens_that_a_text_spells_are_text(architecture, tmp_path):
    """A second EOS in one of several texts would end the run: such models read the last EOS of each row."""
    config = SEQ2SEQ if architecture == "bart" else T5
    tokenizer = tiny_tokenizer(eos_after=True)
    config = {**config, "pad_token_id": 1, "eos_token_id": 256, "decoder_start_token_id": 256}
    save_model(tmp_path, architecture, tokenizer, **config)
    texts = ["fine", f"a{EOS}b", EOS]
    rows = [[*tokenizer(text, split_special_tokens=True)["input_ids"]] for text in texts]
    assert [row.count(256) for row in rows] == [1, 1, 1]
    expected = pytest.approx(score_alone(tmp_path, rows), abs=1e-4)
    assert Classifier(tmp_path)(["p"] * 3, texts) == expected
    assert Classifier(tmp_path, text="both")(["", "a", ""], ["fine", f"{EOS}b", EOS]) == expected


def test_special_tokens_in_a_chat_s_messages_do_not_end_the_message(tmp_path):
    tokenizer = tiny_tokenizer(chat_template=TEMPLATE)
    save_model(tmp_path, "gpt2", tokenizer, pad_token_id=None, **GPT2)
    (score,) = Classifier(tmp_path, text="both")([CHAT], [f"no{EOS}a:yes"])
    spelled = tokenizer(f"u:How are you?{EOS}a:no< eos>a:yes{EOS}")["input_ids"]
    assert spelled.count(tokenizer.eos_token_id) == 2
    assert score == pytest.approx(score_alone(tmp_path, [spelled])[0], abs=1e-4)


def test_a_tokenizer_whose_vocabulary_spells_its_special_tokens_reads_text(tmp_path):
    """Unigram finds "</s>" among its own pieces even where special tokens are split."""
    tokenizer = llama_tokenizer()
    save_model(tmp_path / "llama", "llama", tokenizer, pad_token_id=None, **SMALL)
    scores = Classifier(tmp_path / "llama")(["p"] * 3, ["a</s>b", "a< /s>b", "ab"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-5) and abs(scores[0] - scores[2]) > 1e-3
    tokenizer = wordpiece_tokenizer()
    save_model(tmp_path / "bert", "bert", tokenizer, **SMALL)
    scores = Classifier(tmp_path / "bert")(["p"] * 2, ["a [SEP] b", "a [ SEP ] b"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_identity_of_the_scores_has_a_version(tmp_path):
    save_model(tmp_path, "gpt2", tiny_tokenizer(), **GPT2)
    identity = Classifier(tmp_path).identity
    assert identity["version"] == 2 and json.dumps(identity)


def test_a_chat_that_ends_with_an_assistant_message_is_continued_and_parts_are_read(tmp_path):
    tokenizer = tiny_tokenizer(chat_template=TEMPLATE)
    save_model(tmp_path, "gpt2", tokenizer, pad_token_id=None, **GPT2)
    parts = [{"role": "user", "content": [{"type": "text", "text": "How are you?"}]}]
    reward = Classifier(tmp_path, text="both")
    one, other, whole = reward(
        [CHAT, [*parts, {"role": "assistant", "content": "I am"}], CHAT], ["I am fine", " fine", "I am"]
    )
    assert one == pytest.approx(other, abs=1e-5) and abs(one - whole) > 1e-3
