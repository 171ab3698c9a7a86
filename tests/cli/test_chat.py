"""`quarkrl chat` and `generate --chat`, as their users run them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest
from helpers.chat_templates import chat_tokenizer
from helpers.errors import error_message
from helpers.reward_token_models import add_reward_tokens
from helpers.tiny_models import tiny_model, tiny_tokenizer

from quarkrl import QuarkGenerator
from quarkrl.cli.chat import ChatOptions, Talk
from quarkrl.cli.main import main
from quarkrl.sampling.strategy import Sampling


@pytest.fixture(scope="module")
def final(tmp_path_factory):
    """A model with two quantiles and a chat template."""
    directory = tmp_path_factory.mktemp("chat") / "final"
    conditioning, extended, model = add_reward_tokens(chat_tokenizer("SmolLM 2"), 2, max_position_embeddings=400)
    model.save_pretrained(directory)
    conditioning.steer_tokenizer(extended).save_pretrained(directory)
    conditioning.save(directory)
    return directory


@pytest.fixture(scope="module")
def generator(final):
    return QuarkGenerator.from_pretrained(final)


def new_talk(generator, **options):
    return Talk(generator, ChatOptions(max_new_tokens=8, **options), "best", 1.0)


@pytest.mark.slow
def test_a_conversation_through_a_pipe(final, generator):
    """Answers go to standard output, the rest to standard error. Ctrl-C stops an answer and not the program."""
    command = [sys.executable, "-u", "-m", "quarkrl", "chat", str(final), "--greedy", "--max_new_tokens", "200"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, "--min_new_tokens", "200"], **pipes) as process:
        try:
            assert b"quantiles 0 (worst) to 1 (best)" in process.stderr.readline()
            process.stdin.write(b"hello\n")
            process.stdin.flush()
            beginning = process.stdout.read(1)
            process.send_signal(signal.SIGINT)
            assert process.stderr.readline() + process.stderr.readline() == b"\nstopped\n"
            lines = "/reset\n/quantile worst\n\n/quantile 7\n/nope\nagain ☃\n/quit\nnever\n"
            output, errors = process.communicate(lines.encode(), timeout=120)
        finally:
            process.kill()
    assert process.returncode == 0
    reset, quantile, no_quantile, no_command = errors.decode().splitlines()
    assert (reset, quantile) == ("the conversation starts again", "quantile: worst")
    assert no_quantile.startswith("error: quantile") and no_command.startswith("error: command /nope: must be one of")
    options = {"max_new_tokens": 200, "min_new_tokens": 200, "do_sample": False}
    first, second = (
        generator.generate([{"role": "user", "content": text}], quantile, **options)[0][0]
        for text, quantile in (("hello", "best"), ("again ☃", "worst"))
    )
    stopped = (beginning + output).decode().removesuffix(f"{second}\n")
    assert stopped and first.startswith(stopped) and stopped != first


def test_a_streamed_answer_is_the_generated_one(generator):
    chat = [{"role": "user", "content": "hi"}]
    for guidance_scale in (1.0, 2.0):
        sampling = Sampling(max_new_tokens=12, do_sample=False)
        pieces = [*generator.stream(chat, guidance_scale=guidance_scale, sampling=sampling)]
        texts = generator.generate(chat, guidance_scale=guidance_scale, max_new_tokens=12, do_sample=False)
        assert "".join(pieces) == texts[0][0]
    sampled = [[*generator.stream(chat, seed=(3,), sampling=Sampling(max_new_tokens=30))] for _ in range(2)]
    assert sampled[0] == sampled[1] and len(sampled[0]) > 1


def test_commands_change_the_next_answer(generator):
    talk = new_talk(generator, greedy=True)
    assert "".join(talk.answer("hi"))
    assert [message["role"] for message in talk.conversation.messages] == ["user", "assistant"]
    assert talk.command("/guidance 2") == "guidance: 2" and talk.guidance_scale == 2
    assert talk.command("/system Be brief.") == "system message: Be brief."
    assert talk.command("/system") == "system message: default"
    assert "Ctrl-D" in talk.command("/help")
    assert talk.command("/quantile 0") == "quantile: 0" and talk.command("/quit") is None
    error_message(lambda: talk.command("/guidance much"), "guidance 'much': must be a number")
    error_message(lambda: talk.command("/guidance 2"), "must differ from quantile")
    error_message(lambda: talk.command("/quantil best"), "Did you mean '/quantile'?")
    talk.command("/reset")
    assert talk.conversation.messages == ()


def test_a_stopped_answer_is_kept_and_a_refused_message_is_not(generator):
    talk = new_talk(generator)
    answer = talk.answer("hi")
    piece = next(answer)
    with pytest.raises(KeyboardInterrupt):
        answer.throw(KeyboardInterrupt)
    assert [message["content"] for message in talk.conversation.messages] == ["hi", piece]
    error_message(lambda: [*talk.answer("x" * 500)], "the context length is 400")
    assert len(talk.conversation.messages) == 2


def test_a_prompt_as_a_message_of_the_user(final, generator, capsys):
    command = ["generate", str(final), "--prompt", "hi", "--chat", "--greedy", "--json"]
    assert main([*command, "--system_prompt", "Be brief."]) == 0
    row = json.loads(capsys.readouterr().out)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert row == {"prompt": "hi", "completions": generator.generate(chat, do_sample=False)[0]}
    assert main(command[:-1]) == 0
    assert capsys.readouterr().out == generator.generate(chat[1:], do_sample=False)[0][0] + "\n"


def test_a_model_without_a_chat_template_cannot_talk(tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    tiny_model("gpt2", tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert main(["chat", str(tmp_path)]) == 2
    assert "must have a chat template. Use quarkrl generate" in capsys.readouterr().err
    assert main(["generate", str(tmp_path), "--prompt", "a", "--chat"]) == 2
    assert "has no chat template" in capsys.readouterr().err
