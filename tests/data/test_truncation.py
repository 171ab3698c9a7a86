"""Prompts truncated from texts."""

import json

import pytest

from quarkrl.builtin import model_path
from quarkrl.cli.main import main
from quarkrl.data.prompts import load_prompts
from quarkrl.data.truncation import truncate_to_prompts
from quarkrl.errors import UserError
from quarkrl.models.loading import load_tokenizer

TEXTS = ["The waiter smiled and brought the soup.", "No.", "My sister was delighted because the tea was hot."]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(model_path())


def test_a_prompt_is_the_first_tokens_of_a_text(tokenizer):
    found = truncate_to_prompts(load_prompts(TEXTS), tokenizer, 4)
    assert [len(tokenizer(prompt)["input_ids"]) for prompt in found.prompts] == [4, 4]
    assert all(text.startswith(prompt) for text, prompt in zip([TEXTS[0], TEXTS[2]], found.prompts, strict=True))


def test_short_texts_are_skipped_and_counted_with_their_columns(tokenizer):
    rows = [{"prompt": text, "number": i} for i, text in enumerate(TEXTS)]
    found = truncate_to_prompts(load_prompts(rows), tokenizer, 4)
    assert found.columns["number"] == [0, 2]
    assert [a + b for a, b in zip(found.prompts, found.columns["continuation"], strict=True)] == [TEXTS[0], TEXTS[2]]
    assert found.skipped == {"short": 1}


def test_no_character_is_split(tokenizer):
    text = "naïve 🙂🙂🙂🙂"
    for tokens in range(1, len(tokenizer(text)["input_ids"]) + 1):
        try:
            (prompt,) = truncate_to_prompts(load_prompts([text]), tokenizer, tokens).prompts
        except UserError:
            continue  # Nothing but a part of a character was left.
        assert text.startswith(prompt)


def test_texts_that_are_all_too_short_and_chats_are_errors(tokenizer):
    with pytest.raises(UserError, match="prompt_tokens 500: no text has so many tokens"):
        truncate_to_prompts(load_prompts(TEXTS), tokenizer, 500)
    with pytest.raises(UserError, match=r"prompt_tokens 1: .*row 1 of the list is a chat"):
        truncate_to_prompts(load_prompts([{"messages": [{"role": "user", "content": "hi"}]}]), tokenizer, 1)


def test_evaluate_truncates_a_column_of_texts(tmp_path, capsys):
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    options = ["--prompt_column", "text", "--prompt_tokens", "4", "--samples", "2", "--resamples", "10"]
    reward = f"{tmp_path / 'reward.py'}:length"
    (tmp_path / "reward.py").write_text("def length(completions):\n    return [len(c) for c in completions]\n")
    output = tmp_path / "results.json"
    command = ["evaluate", "builtin", "--prompts", str(source), "--reward", reward, *options, "--output", str(output)]
    assert main(command) == 0, capsys.readouterr().err
    (prompts,) = json.loads(output.read_text(encoding="utf-8"))["protocol"]["prompts"].values()
    assert prompts["count"] == 2
    assert prompts["left_out"] == {"short": 1}
