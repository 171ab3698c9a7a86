"""`quarkrl words`: the table, the advice, and its mistakes."""

from __future__ import annotations

import pytest

from quarkrl.cli.main import main

COMMAND = ["words", "builtin", "--prompts", "builtin", "--reward", "profanity", "--num_prompts", "20"]


def test_words_are_ranked_and_advice_is_given(capsys):
    assert main([*COMMAND, "--words", "Polite", "Vulgar customer says:"]) == 0
    out, err = capsys.readouterr()
    header, *rows = out.splitlines()
    assert header.split() == ["AUC", "±95", "%", "tokens", "words"]
    assert [row.split("  ")[-1] for row in rows] == ["'Vulgar customer says:'", "'Polite'"]
    assert float(rows[0].split()[0]) > 0.5 > float(rows[1].split()[0])
    assert "100 completions, mean reward" in err and "count as bad" in err
    assert "--words 'Vulgar customer says:' ''" in err or "none of these words is clearly above 0.5" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reward", "brevity"], "words: must be given for brevity"),
        (["--num_prompts", "0"], "num_prompts 0: must be at least 1"),
        (["--words", ""], "words '': must have at least one token"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    assert main([*COMMAND, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_a_model_that_quark_trained_is_refused(capsys, tmp_path):
    from helpers.reward_token_models import add_reward_tokens

    from quarkrl.models.export import save_steered

    conditioning, tokenizer, model = add_reward_tokens()
    save_steered(model, conditioning.steer_tokenizer(tokenizer), conditioning, tmp_path, {})
    assert main(["words", str(tmp_path), *COMMAND[2:]]) == 2
    assert "must be one that Quark did not train" in capsys.readouterr().err
