"""Plain texts for a chat model: wrapped in its chat template by the commands, left alone with `--raw`."""

from __future__ import annotations

import json

import pytest
from helpers.chat_templates import chat_tokenizer
from helpers.runs import small_trainer
from helpers.tiny_models import tiny_model

from quarkrl import QuarkGenerator
from quarkrl.cli.common import IN_TEMPLATE_NOTE
from quarkrl.cli.main import main
from quarkrl.data.chats import as_question
from quarkrl.data.prompts import load_prompts

TEXTS = ["hi", "what is it", "say a word", "go on"]


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer("SmolLM 2")


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    directory = tmp_path_factory.mktemp("chat")
    tiny_model("llama", tokenizer, max_position_embeddings=400).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_texts_are_encoded_as_messages_and_stay_texts(tokenizer):
    prompts = load_prompts(TEXTS).encode(tokenizer, max_length=300, in_template=True)
    assert prompts.prompts == TEXTS and prompts.are_chats
    chats = load_prompts([{"messages": as_question(text)} for text in TEXTS]).encode(tokenizer, max_length=300)
    assert prompts.ids == chats.ids
    assert prompts.first(1).in_template and prompts.where([True, False, True, False]).as_encoded == [
        as_question("hi"),
        as_question("say a word"),
    ]


def test_generate_wraps_a_text_and_says_so_once(model, capsys):
    expected = QuarkGenerator.from_pretrained(model).generate([as_question("hi"), "hi"], do_sample=False)
    assert main(["generate", str(model), "hi", "--greedy", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"prompt": "hi", "completions": expected[0]} and err.count(IN_TEMPLATE_NOTE) == 1
    assert main(["generate", str(model), "hi", "--greedy", "--json", "--raw"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"prompt": "hi", "completions": expected[1]} and IN_TEMPLATE_NOTE not in err


def test_rewards_of_a_wrapped_run_receive_texts_and_its_model_is_used_as_trained(tmp_path, model, tokenizer, capsys):
    received = []

    def length(prompts, completions, **_):
        received.extend(zip(prompts, completions, strict=True))
        return [float(len(text)) for text in completions]

    options = {"processing_class": tokenizer, "num_quantiles": 2, "num_iterations": 1, "on_collapse": "warn"}
    trainer = small_trainer(
        tmp_path / "run", length, model=tiny_model("llama", tokenizer, max_position_embeddings=400), prompts=TEXTS,
        raw=False, **options,
    )  # fmt: skip
    trainer.train()
    final = trainer.save_final()
    assert received and all(prompt in TEXTS and isinstance(completion, str) for prompt, completion in received)
    assert json.loads((final / "quark.json").read_text(encoding="utf-8"))["prompts"]["reads"] == "chats"
    assert main(["generate", str(final), "hi", "--greedy"]) == 0
    out, err = capsys.readouterr()
    assert IN_TEMPLATE_NOTE in err
    assert out == QuarkGenerator.from_pretrained(final).generate(as_question("hi"), do_sample=False)[0][0] + "\n"


def test_a_model_that_was_trained_on_texts_continues_texts(tmp_path, tokenizer, capsys):
    trainer = small_trainer(
        tmp_path / "run",
        lambda completions, **_: [float(len(text)) for text in completions],
        model=tiny_model("llama", tokenizer, max_position_embeddings=400),
        prompts=TEXTS,
        processing_class=tokenizer,
        num_iterations=1,
        on_collapse="warn",
    )
    trainer.train()
    assert main(["generate", str(trainer.save_final()), "hi", "--greedy"]) == 0
    out, err = capsys.readouterr()
    assert IN_TEMPLATE_NOTE not in err and out.startswith("hi")


def test_train_wraps_texts_by_default_and_a_resumed_run_keeps_it(tmp_path, model):
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    directory = tmp_path / "run"
    options = "--num_quantiles 2 --num_iterations 1 --steps_per_iteration 1 --max_completion_length 4 --held_out 0"
    source = ["--model", str(model), "--prompts", str(tmp_path / "prompts.txt"), "--reward", "brevity"]
    small = ["--per_device_train_batch_size", "4", "--on_collapse", "warn", "--min_completion_length", "1"]
    command = ["train", *source, *options.split(), *small, "--output_dir", str(directory)]
    assert main(command) == 0
    assert json.loads((directory / "run.json").read_text(encoding="utf-8"))["options"]["raw"] is False
    assert main(["train", "--resume", str(directory)]) == 0
    assert main([*command[:-1], str(tmp_path / "raw"), "--raw"]) == 0
    assert json.loads((tmp_path / "raw" / "run.json").read_text(encoding="utf-8"))["options"]["raw"] is True
