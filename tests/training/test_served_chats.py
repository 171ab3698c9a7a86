"""Chats in a run: `final/` reads what was trained, or the run is refused before it samples."""

from __future__ import annotations

import pytest
from helpers.chat_templates import CHAT_TEMPLATES, CHATML, CHATS, chat_tokenizer
from helpers.errors import error_message
from helpers.tiny_models import SMALL_RUN, tiny_model, tiny_tokenizer
from transformers import AutoTokenizer

from quarkrl import QuarkConfig, QuarkGenerator, QuarkTrainer
from quarkrl.data.prompts import Prompts
from quarkrl.models.conditioning import Conditioning
from quarkrl.training import served
from quarkrl.training.served import check_served_ids


def check(tokenizer, prompts, max_length=10_000):
    """Check a tokenizer as a run does; return the conditioning and the encoded prompts."""
    model = tiny_model("gpt2", tokenizer)
    conditioning, extended = Conditioning.add_to(tokenizer, model, 3)
    encoded = Prompts(prompts, {}, [""] * len(prompts)).encode(tokenizer, max_length=max_length)
    check_served_ids(tokenizer, conditioning.steer_tokenizer(extended), conditioning, model.config, encoded)
    return conditioning, encoded


@pytest.mark.parametrize("name", sorted(CHAT_TEMPLATES.keys() - {"Llama 3, dated"}))
def test_the_templates_of_popular_models_pass_the_check(name):
    check(chat_tokenizer(name), [CHATS["one question"], CHATS["several turns"], CHATS["BOS first"], "a text"])


def test_a_run_on_chats_serves_the_ids_of_training(tmp_path):
    tokenizer = chat_tokenizer("SmolLM 2")
    chats = [CHATS[name] for name in ("one letter", "an unfinished answer", "a tool call")]
    trainer = QuarkTrainer(
        tiny_model("gpt2", tokenizer, n_positions=300),
        lambda completions, **_: [float(len(text)) for text in completions],
        QuarkConfig(output_dir=str(tmp_path / "run"), **{**SMALL_RUN, "num_iterations": 1}),
        train_dataset=[{"messages": chat} for chat in chats],
        processing_class=tokenizer,
    )
    trained = [trainer.conditioning.prefix(ids, trainer.conditioning.best) for ids in trainer.prompts.ids]
    trainer.explore(0)
    trainer.quantize(0)
    final = trainer.save_final()
    plain = AutoTokenizer.from_pretrained(final)
    for chat, ids in zip(chats, trained, strict=True):
        continued = chat[-1]["role"] == "assistant"
        ends = {"continue_final_message": continued, "add_generation_prompt": not continued}
        assert plain.apply_chat_template(chat, return_dict=False, **ends) == ids
    assert QuarkGenerator.from_pretrained(final).encode(chats) == trained


def test_a_run_whose_template_cannot_be_steered_is_refused():
    tokenizer = tiny_tokenizer(bos=True, chat_template=CHATML, split_special_tokens=True)
    message = error_message(
        lambda: check(tokenizer, [CHATS["one letter"]]),
        "chat template of",
        "must give the ids of training",
        "Train on text",
    )
    assert len(message) < 400


def test_a_run_on_text_warns_of_a_template_that_cannot_be_steered(caplog):
    check(tiny_tokenizer(bos=True, chat_template=CHATML, split_special_tokens=True), ["a text"])
    assert "chat template of" in caplog.text


@pytest.mark.parametrize("prompts", [["a"], [CHATS["one letter"]]], ids=["text", "chat"])
def test_a_template_without_valid_syntax_is_refused_where_it_is_used(prompts):
    tokenizer = tiny_tokenizer(chat_template="{{ 'a {% generation ")
    if prompts == ["a"]:
        check(tokenizer, prompts)
    else:
        error_message(lambda: check(tokenizer, prompts), "the chat template refuses", "unexpected")


def test_named_templates_without_a_default_do_not_matter_to_a_run_on_text():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"short": CHATML}
    check(tokenizer, ["a"])


def test_the_probes_are_of_each_kind():
    roles = {tuple(message["role"] for message in chat) for chat in served.CHAT_PROBES}
    assert {("user",), ("system", "user"), ("user", "assistant"), ("user", "assistant", "tool")} <= roles
