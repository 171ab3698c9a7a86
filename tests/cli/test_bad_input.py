"""Bad input: each case ends in one line and exit code 2, and leaves no partial output.

Most cases are bad files; test_main.py has mistakes in flags. A case is the arguments of a command and what its line
must say, or a function that spoils a copy of the working directory and returns both.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import bad_models, bad_sources
from helpers.bad_sources import TRAIN
from helpers.eight_letters import TOKENIZER
from helpers.tiny_models import make_home

from quarkrl.cli.main import main

WORDS = [*"abcdefgh"]
REWARDS = """
import functools, sys

def good(completions):
    return [sum(map(ord, text)) for text in completions]

def raises(completions): raise ValueError("first line\\nsecond")
def recurses(completions): return recurses(completions)
def leaves(completions): sys.exit(0)
def asserts(completions): assert not completions
def iterates(completions): return (1.0 for _ in completions)
def nothing(completions): return None
def text(completions): return "abcd"
def table(completions): return {text: 1.0 for text in completions}
def number(completions): return 1.0
def too_many(completions): return [1.0] * (len(completions) + 1)
def nested(completions): return [[1.0] for _ in completions]
def words(completions): return ["good" for _ in completions]
def complex_numbers(completions): return [1j for _ in completions]
def nan(completions): return [float("nan") for _ in completions]
def none(completions): return [None for _ in completions]
def huge(completions): return [10**400 for _ in completions]
def wants(completions, toxicity): return toxicity
def takes_nothing(): return []
async def fails_later(completions): raise OSError(28, "No space left on device")
async def returns_later(completions): return "abcd"
def limited(completions, limit: int, strict: bool = False): return [1.0 for _ in completions]

class Kind:
    def __call__(self, completions): return [1.0 for _ in completions]

NUMBER = 3
BROKEN = functools.partial(good, nonsense=1)
"""

CASES = bad_sources.CASES | bad_models.CASES


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A model, prompts, rewards, a finished run; copied for each case."""
    home = tmp_path_factory.mktemp("original")
    relative = {"model": "model", "prompts": "prompts.txt", "reward": "rewards.py:good"}  # The home is copied.
    make_home(home, TOKENIZER, ["a b", "c", "d e f", "h g"], REWARDS, **relative)
    here = os.getcwd()
    os.chdir(home)
    try:
        assert main(["train", "--config", "run.yaml", "--output_dir", "run"]) == 0
    finally:
        os.chdir(here)
    return home


@pytest.fixture
def home(original, tmp_path, monkeypatch) -> Path:
    shutil.copytree(original, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.delenv("PERSPECTIVE_API_KEY", raising=False)
    return tmp_path / "home"


def outputs(home: Path) -> set[str]:
    """What a command might leave half done: results, plots, a model; a run may leave what it can be resumed from."""
    found = (path.relative_to(home).as_posix() for path in home.rglob("*"))
    run = ("new/run.json", "new/pool/")
    made = (".json", ".parquet", ".png", ".tmp", ".safetensors")
    return {name for name in found if name.endswith(made) and not name.startswith(run)}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_leaves_nothing(name, home, capsys):
    case = CASES[name]
    arguments, said = case if isinstance(case, tuple) else case(home)
    before = outputs(home)
    capsys.readouterr()
    code = main(arguments)
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
    (line,) = err.splitlines()
    assert line.startswith("error: ") and said in line
    assert len(line) < 1000 and "Traceback" not in line
    assert outputs(home) == before


def test_bad_rows_among_good_ones_are_left_out_and_counted(home, capsys):
    """Each bad kind of row twice; what is good is explored, what is not is told by its kind."""
    bad = [
        ("malformed JSON", '{"prompt": "a"'),
        ("not an object", "[1]"),
        ("no prompt", '{"text": "a"}'),
        ("no prompt", '{"prompt": null}'),
        ("wrong type", '{"prompt": 3}'),
        ("malformed messages", '{"prompt": [{"role": 1}]}'),
        ("empty prompt", '{"prompt": " "}'),
        ("lone surrogate", '{"prompt": "\\udc00"}'),
        ("not UTF-8", b'{"prompt": "\xe9"}'),
        ("too long", json.dumps({"prompt": "a " * 500})),
    ]
    good = [f'{{"prompt": "{word}"}}' for word in WORDS]
    rows = [*good[:4], *(row for _, row in bad), *good[4:], *(row for _, row in bad)]
    (home / "mixed.jsonl").write_bytes(b"\n".join(row if isinstance(row, bytes) else row.encode() for row in rows))
    assert main([*TRAIN, "--prompts", "mixed.jsonl", "--skip_bad_prompts"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prompts skipped: ")]
    counts = {reason: 2 * sum(reason == known for known, _ in bad) for reason, _ in bad}
    found = (part.split(" ", 1) for part in line.removeprefix("prompts skipped: ").split(", "))
    assert {reason: int(count) for count, reason in found} == counts
    assert json.loads((home / "new" / "metrics.jsonl").read_text().splitlines()[0])["pool_size"] == len(WORDS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "prompts deep.jsonl",
        "config: a bomb in an option",
        "reward 'rewards.py:leaves'",
        "model: weights cut short",
        "reward tokens: beyond the model",
        "run: weights are missing",
    ],
)
def test_a_process_ends_as_main_does(name, home):
    """Real ones: nothing is said beside the line, whatever was imported on the way."""
    case = CASES[name]
    arguments, said = case if isinstance(case, tuple) else case(home)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "quarkrl.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and said in line
