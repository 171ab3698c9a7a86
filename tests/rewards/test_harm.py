"""What a reward does to its arguments, the working directory, signals and processes cannot harm a run."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from helpers.killed_runs import command, impatient_command, in_a_process
from helpers.reward_helpers import IDS, PROMPTS, TEXTS, length
from helpers.runs import distinct_rewards, logs_of, small_trainer
from helpers.tiny_models import make_home, tiny_tokenizer

from quarkrl.cli.main import main
from quarkrl.rewards import Scorer
from quarkrl.rewards.copying import copy_value

CHATS = tiny_tokenizer(words=[*"abcdefgh"], chat_template="{% for m in messages %}{{ m.content }} {% endfor %}")
SHORT = {"num_iterations": 1, "steps_per_iteration": 1, "per_device_train_batch_size": 2}

# Arguments


def ruin(prompts, completions, completion_ids, topic, end_ids, **_):
    """Change every argument in place, at every depth."""
    for chat in prompts:
        if isinstance(chat, list):
            chat[0]["content"] = "ruined"
            chat.append({"role": "user", "content": "ruined"})
    for ids in completion_ids:
        ids.clear()
    for value in topic:
        value["a"].append("ruined")
    count = len(completions)
    for argument in (prompts, completions, completion_ids, topic, end_ids):
        argument.clear()
    return [0.0] * count


def test_a_reward_that_changes_its_arguments_changes_nothing_for_the_next_one():
    def chats():
        return [[{"role": "user", "content": text}] for text in PROMPTS]

    def topics():
        return [{"a": [n]} for n in range(4)]

    seen = {}

    def second(prompts, completion_ids, topic, end_ids):
        seen.update(prompts=prompts, ids=completion_ids, topic=topic, end_ids=end_ids)
        return [1.0] * 4

    prompts, texts, ids, columns, end_ids = chats(), [*TEXTS], [[*row] for row in IDS], {"topic": topics()}, [4]
    scorer = Scorer([ruin, second])
    for _ in range(2):
        assert scorer(prompts, texts, ids, columns, end_ids).rewards[:, 0].tolist() == [1, 1, 1, 1]
        assert seen == {"prompts": chats(), "ids": IDS, "topic": topics(), "end_ids": [4]}
    assert (prompts, texts, ids, columns, end_ids) == (chats(), TEXTS, IDS, {"topic": topics()}, [4])


def test_the_pool_and_the_prompts_of_a_run_are_as_sampled_whatever_a_reward_does_to_its_arguments(tmp_path):
    prompts = [{"prompt": [{"role": "user", "content": text}], "topic": {"a": []}} for text in ("a b", "c", "d", "h")]

    def samples(directory, rewards):
        options = {**SHORT, "processing_class": CHATS, "on_collapse": "warn"}
        trainer = small_trainer(directory, rewards, prompts=prompts, **options)
        trainer.explore(0)
        trainer.quantize(0)
        return trainer.prompts.prompts, [(s.prompt_ids.tolist(), s.completion_ids.tolist()) for s in trainer.pool]

    assert samples(tmp_path / "a", [ruin, distinct_rewards]) == samples(tmp_path / "b", [distinct_rewards])


def test_the_state_of_the_trainer_is_a_copy(tmp_path):
    def ruins_the_state(completions, trainer_state):
        trainer_state.global_step = 10**6
        trainer_state.log_history.clear()
        return length(completions)

    trainer = small_trainer(tmp_path, ruins_the_state, **SHORT, on_collapse="warn")
    trainer.train()
    assert trainer.state.global_step == 1 and len(trainer.state.log_history) >= 2


def test_copies_share_nothing_that_can_be_changed_and_equal_their_originals():
    class Refuses:
        def __deepcopy__(self, memo):
            raise TypeError

    value = {"list": [1, [2, {"x": "y"}], None], "set": {1, 2}, "tuple": ([1], "a"), "number": 1.5}
    copy = copy_value(value)
    assert copy == value
    assert copy["list"][1][1] is not value["list"][1][1]
    assert copy["set"] is not value["set"] and copy["tuple"][0] is not value["tuple"][0]
    refuses = Refuses()
    assert copy_value([refuses])[0] is refuses


# The working directory

WORDS = [*map(str, range(10, 60))]
MOVES = """
import os
MOVE_AT_IMPORT = {at_import}
if MOVE_AT_IMPORT:
    os.chdir("elsewhere")

def moves(completion_ids):
    if not MOVE_AT_IMPORT and os.path.exists("elsewhere"):
        os.chdir("elsewhere")
    return [sum(ids) for ids in completion_ids]

moves.identity = {{"version": 1}}
"""


def home_of(directory: Path, rewards: str, **options) -> Path:
    prompts = [f"{a} {b}" for a, b in pairwise(WORDS)]
    short = {"steps_per_iteration": 2, "num_iterations": 1, "prompts_per_iteration": 12, "generation_batch_size": 4}
    return make_home(directory, tiny_tokenizer(words=WORDS), prompts, rewards, **{**short, **options})


@pytest.mark.parametrize("at_import", [False, True])
def test_a_reward_that_changes_the_working_directory_leaves_the_run_where_it_was(tmp_path, monkeypatch, at_import):
    home = home_of(tmp_path, MOVES.format(at_import=at_import))
    (home / "elsewhere").mkdir()
    monkeypatch.chdir(home)
    relative = ["--model", "model", "--prompts", "prompts.txt", "--eval_prompts", "prompts.txt"]
    relative += ["--reward", "rewards.py:moves", "--score_cache", "scores", "--output_dir", "run"]
    assert main(["train", "--config", "run.yaml", *relative]) == 0
    # What the import does is undone; what a call does stays.
    assert Path.cwd() == (home if at_import else home / "elsewhere")
    assert list((home / "elsewhere").iterdir()) == []
    assert {"config.yaml", "final", "metrics.jsonl", "pool", "run.json"} <= {path.name for path in home.glob("run/*")}
    assert (home / "scores").is_file()
    assert "output_dir: run\n" in (home / "run/config.yaml").read_text()  # As typed: a project can be moved.


# Signals and child processes

FORKS = """
import multiprocessing, os, signal, subprocess, sys, time

CONTEXT = multiprocessing.get_context("fork")

def with_pool(completions):
    with CONTEXT.Pool(2) as pool:
        return pool.map(len, completions)

def with_terminate(completions):
    for end in ("terminate", "kill"):
        process = CONTEXT.Process(target=time.sleep, args=(600,))
        process.start()
        getattr(process, end)()
        process.join()
        assert process.exitcode == -(signal.SIGTERM if end == "terminate" else signal.SIGKILL)
    return [0.0] * len(completions)

def with_subprocess(completions):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    child.terminate()
    assert child.wait() == -signal.SIGTERM
    return [0.0] * len(completions)

def with_fork(completions):
    for number in (signal.SIGTERM, signal.SIGINT):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(writing, f"{signal.getsignal(signal.SIGINT)} {signal.getsignal(signal.SIGTERM)}".encode())
                for _ in range(6000):  # A signal that comes just before a sleep does not shorten it.
                    time.sleep(0.1)
            finally:
                os._exit(7)
        handlers = os.read(reading, 1000).decode()
        assert "_receive" not in handlers, handlers
        os.kill(child, number)
        status = os.waitpid(child, 0)[1]
        assert os.waitstatus_to_exitcode(status) == (-number if number == signal.SIGTERM else 7)
    return [0.0] * len(completions)
"""


@pytest.mark.slow
def test_children_that_a_reward_forks_in_a_run_can_be_score_to_the_end(tmp_path):
    home = home_of(tmp_path, FORKS, generation_batch_size=12)
    names = ("with_pool", "with_terminate", "with_subprocess", "with_fork")
    flags = ["--config", home / "run.yaml", "--output_dir", home / "run", "--on_collapse", "warn"]
    rewards = ["--reward", *(f"{home / 'rewards.py'}:{name}" for name in names)]
    code, said = in_a_process(command, tmp_path / "run", ["train", *flags, *rewards])
    assert code == 0, said
    assert len(logs_of(home / "run", "pool_size")) == 1


# Rewards that are given up

LEAVES = """
import asyncio, concurrent.futures, multiprocessing, pathlib, re, subprocess, sys, threading, time

def starts_all(completions):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=False)
    process.start()
    pathlib.Path(__file__).with_name("children").write_text(f"{child.pid} {process.pid}")
    threading.Thread(target=time.sleep, args=(600,), daemon=False).start()
    executor = concurrent.futures.ThreadPoolExecutor()
    return list(executor.map(time.sleep, [600] * len(completions)))

async def blocks_a_thread(completions):
    await asyncio.to_thread(time.sleep, 600)

def fails_beside_a_thread(completions):
    concurrent.futures.ThreadPoolExecutor().submit(time.sleep, 600)
    raise KeyError("no such")

def backtracks(completions):
    return [len(re.findall("(a|aa)+$", "a" * 100 + "b")) for _ in completions]
"""


def score_to_the_end(home: Path, reward: str) -> tuple[int | None, str]:
    """The exit code and the output of `quarkrl score` with a reward that is given up; None if it hung."""
    (home / "rewards.py").write_text(LEAVES, encoding="utf-8")
    (home / "texts.txt").write_text("a\nb\n", encoding="utf-8")
    flags = ["--reward", f"{home / 'rewards.py'}:{reward}", "--reward_timeout", "0.5"]
    return in_a_process(impatient_command, home / "log", ["score", home / "texts.txt", *flags])


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("starts_all", "did not score 2 completions within 0.5 s (REWARDS:"),
        ("blocks_a_thread", "did not score 2 completions within 0.5 s."),
        ("fails_beside_a_thread", "raised KeyError: 'no such' (REWARDS:"),
    ],
)
def test_a_process_ends_whatever_a_reward_that_is_given_up_has_started(reward, message, tmp_path):
    code, said = score_to_the_end(tmp_path, reward)
    assert code == 2
    (line,) = said.splitlines()
    assert line.startswith(f"error: reward {reward!r} {message}".replace("REWARDS", str(tmp_path / "rewards.py")))
    if reward == "starts_all":
        for pid in map(int, (tmp_path / "children").read_text().split()):
            assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_reward_that_never_lets_another_thread_run_ends_the_process_with_the_stacks(tmp_path):
    code, said = score_to_the_end(tmp_path, "backtracks")
    assert code == 1 and "Timeout" in said
    assert f'"{tmp_path / "rewards.py"}", line 21 in ' in said  # <listcomp>, or the function from Python 3.12 on.


# One behaviour

ALARM = """
import signal

def with_alarm(completions):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(10)
    return [0.0] * len(completions)
"""


def test_a_reward_that_sets_an_alarm_fails_alike_in_score_and_in_training_with_the_remedy(tmp_path, capsys):
    home = home_of(tmp_path, ALARM)
    (home / "texts.txt").write_text("a\n", encoding="utf-8")
    reward = ("--reward", f"{home / 'rewards.py'}:with_alarm")
    commands = (
        ["score", str(home / "texts.txt"), *reward],
        ["train", "--config", str(home / "run.yaml"), "--output_dir", str(home / "run"), *reward],
    )
    lines = []
    for words in commands:
        assert main(words) == 2
        lines += capsys.readouterr().err.splitlines()[-1:]
    assert lines[0] == lines[1] and lines[0].startswith("error: reward 'with_alarm' raised ValueError: signal only")
    assert "use the time-out of a library, or a child process" in lines[0]


def test_score_calls_a_reward_in_batches_of_training_in_a_thread_with_a_time_out(tmp_path, capsys):
    (tmp_path / "rewards.py").write_text(
        "import threading\n"
        "def batch(completions):\n"
        "    in_thread = threading.current_thread() is not threading.main_thread()\n"
        "    return [len(completions) * in_thread] * len(completions)\n",
        encoding="utf-8",
    )
    (tmp_path / "texts.txt").write_text("a\n" * 130, encoding="utf-8")
    assert main(["score", str(tmp_path / "texts.txt"), "--reward", f"{tmp_path / 'rewards.py'}:batch", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["reward"] for row in rows] == [128.0] * 128 + [2.0] * 2
