"""SmolLM2-135M-Instruct, trained briefly, in llama.cpp: the ids and the greedy tokens of transformers."""

from __future__ import annotations

import pytest
import torch
from helpers.llama_cpp import LlamaServer
from helpers.real_runs import CHATS, QUESTIONS, TEXTS

from quarkrl.cli.main import main
from quarkrl.models.loading import load_model, load_tokenizer

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(3600)]


def test_llama_cpp_gives_the_greedy_tokens_of_transformers_for_texts_and_chats(text_run, tmp_path, capsys):
    directory = text_run
    file = tmp_path / "model.gguf"
    assert main(["export", str(directory), "--gguf", str(file), "--gguf_type", "f32"]) == 0
    assert "start each text with <|reward_1|>" in capsys.readouterr().err
    model, tokenizer = load_model(directory / "final"), load_tokenizer(directory / "final")
    server = LlamaServer(file, model.generation_config.suppress_tokens)

    def greedy(ids):
        return model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()

    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert server.ids_of(f"<|reward_1|>{text}") == ids
        assert server.complete(f"<|reward_1|>{text}", 12) == greedy(ids)
    for question, chat in zip(QUESTIONS, CHATS, strict=True):
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert server.ids_of(server.render(question)) == ids
        assert server.answer(question, 12) == tokenizer.decode(greedy(ids), skip_special_tokens=True)
