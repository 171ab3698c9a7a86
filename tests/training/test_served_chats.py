"""Chats in a run: `final/` reads what was trained, or the run is refused before it samples."""

from __future__ import annotations

import pytest
from helpers.chat_templates import CHAT_TEMPLATES, CHATML, CHATS, chat_tokenizer
from helpers.errors import error_message
from helpers.tiny_models import SMALL_RUN, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from quarkrl import QuarkConfig, QuarkGenerator, QuarkTrainer
from quarkrl.data.prompts import Prompts
from quarkrl.models.chat_template import end_of_turn_id
from quarkrl.models.conditioning import Conditioning
from quarkrl.models.quark_json import read_quark_json
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
        QuarkConfig(
            output_dir=str(tmp_path / "run"), **{**SMALL_RUN, "num_iterations": 1, "last_assistant_turn": "continue"}
        ),
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


def make_trainer(directory, tokenizer, chats, **options):
    """A trainer of a tiny model on chats, with a reward that does not matter."""
    return QuarkTrainer(
        tiny_model("gpt2", tokenizer, n_positions=300),
        lambda completions, **_: [float(len(text)) for text in completions],
        QuarkConfig(output_dir=str(directory / "run"), **{**SMALL_RUN, "num_iterations": 1, **options}),
        train_dataset=[{"messages": chat} for chat in chats],
        processing_class=tokenizer,
    )


def test_final_has_the_system_prompt_and_the_arguments_of_training_by_default(tmp_path):
    tokenizer, question = chat_tokenizer("Qwen 3"), CHATS["one question"]
    defaults = {"system_prompt": 'Be "brief".', "chat_template_kwargs": '{"enable_thinking": false}'}
    trainer = make_trainer(tmp_path, tokenizer, [question, CHATS["a system message"]], **defaults)
    trainer.explore(0)
    trainer.quantize(0)
    final = trainer.save_final()
    best = trainer.conditioning.best
    trained = [trainer.conditioning.prefix(ids, best) for ids in trainer.prompts.ids]
    served = AutoTokenizer.from_pretrained(final)
    assert served.apply_chat_template(question, return_dict=False, add_generation_prompt=True) == trained[0]
    text = served.decode(trained[0])
    assert text.startswith('<|reward_1|><|im_start|>system\nBe "brief".<|im_end|>') and text.endswith("</think>\n\n")
    assert QuarkGenerator.from_pretrained(final).encode([question, CHATS["a system message"]]) == trained
    config = read_quark_json(final)["config"]
    assert (config["system_prompt"], config["chat_template_kwargs"]) == ('Be "brief".', {"enable_thinking": False})
    other = QuarkGenerator.from_pretrained(
        final, system_prompt="Other.", chat_template_kwargs={"enable_thinking": True}
    )
    assert "system\nOther.<" in other.tokenizer.decode(other.encode([question])[0])


def test_a_chat_that_ends_with_the_assistant_is_refused_continued_or_answered_anew(tmp_path):
    tokenizer = chat_tokenizer("SmolLM 2")
    chats = [CHATS["one question"], CHATS["an unfinished answer"]]
    error_message(
        lambda: make_trainer(tmp_path, tokenizer, chats),
        "row 2 of the list: the chat ends with a message of the assistant",
        "--last_assistant_turn drop",
    )
    dropped = make_trainer(tmp_path, tokenizer, chats, last_assistant_turn="drop").prompts
    assert dropped.prompts == [CHATS["one question"]] * 2 and dropped.ids[0] == dropped.ids[1]
    continued = make_trainer(tmp_path, tokenizer, chats, last_assistant_turn="continue").prompts
    assert continued.prompts == chats and continued.ids[0] != continued.ids[1]
    skipped = make_trainer(tmp_path, tokenizer, chats * 2, skip_bad_prompts=True).prompts
    assert skipped.skipped == {"ends with the assistant": 2}


@pytest.mark.parametrize(
    ("name", "end"), [("ChatML", "<|im_end|>"), ("Llama 3", "<|eot|>"), ("Gemma 3", "<end_of_turn>")]
)
def test_the_end_of_a_turn_ends_a_completion_whatever_eos_is(name, end, tmp_path):
    tokenizer = chat_tokenizer(name)
    trainer = make_trainer(tmp_path, tokenizer, [CHATS["one question"], CHATS["one letter"]])
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)]
    assert trainer.end_ids == ends
    trainer.explore(0)
    trainer.quantize(0)
    final = trainer.save_final()
    assert AutoModelForCausalLM.from_pretrained(final).generation_config.eos_token_id == ends
    assert QuarkGenerator.from_pretrained(final).end_ids == ends


def test_a_template_without_an_end_of_turn_has_no_more_ends():
    assert end_of_turn_id(tiny_tokenizer()) is None
    assert end_of_turn_id(tiny_tokenizer(chat_template="{{ messages[0].content }}")) is None
    assert end_of_turn_id(chat_tokenizer("Mistral")) == chat_tokenizer("Mistral").eos_token_id


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
