"""Reward functions of the user's own, from a file or a module."""

import sys

import pytest
from helpers.errors import error_message
from helpers.reward_helpers import IDS, PROMPTS, TEXTS

from quarkrl.rewards import Scorer, resolve


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_a_file_may_import_its_neighbours_and_an_edit_is_noticed(folder):
    (folder / "neighbour_a.py").write_text("FACTOR = 3\n")
    code = "from neighbour_a import FACTOR\n\ndef triple(completions):\n"
    code += "    return [FACTOR * len(c) for c in completions]\n"
    (folder / "mine.py").write_text(code)
    reward = resolve("mine.py:triple")
    assert Scorer(reward)(PROMPTS, TEXTS, IDS).rewards[:, 0].tolist() == [3, 6, 0, 12]
    assert resolve(str(folder / "mine.py") + ":triple") is reward  # One file, one module.
    (folder / "mine.py").write_text(code.replace("len(c)", "(1 + len(c))"))
    assert Scorer("mine.py:triple")(PROMPTS, TEXTS, IDS).rewards[0, 0] == 6.0


def test_a_function_of_a_module_in_the_current_directory_is_found(folder):
    (folder / "my_package").mkdir()
    (folder / "my_package" / "rewards.py").write_text(
        "class Rewards:\n    @staticmethod\n    def good(prompts):\n        return [1] * len(prompts)\n"
    )
    assert Scorer("my_package.rewards:Rewards.good")(PROMPTS, TEXTS, IDS).rewards.sum() == 4


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("absent.py:f", "reward 'absent.py': must be an existing file"),
        ("mine.py", "reward 'mine.py': must name a function"),
        ("mine.py:kindnes", "mine.py has no 'kindnes'. Did you mean 'kindness'?"),
        ("mine.py:xyz", "mine.py has no 'xyz'. It has kindness."),
        ("mine.py:NUMBER", "reward 'mine.py:NUMBER': must be a function, a name or a path, not of type int"),
        ("mine.py:Kind", "not a class. Use Kind(…)"),
        ("mine:xyz", "mine has no 'xyz'. It has kindness."),
        ("broken.py:f", "reward file broken.py: cannot import it: ModuleNotFoundError: No module named 'nothing_here'"),
        ("broken:f", "reward module 'broken': cannot import it: ModuleNotFoundError: No module named 'nothing_here'"),
        ("wrong.py:f", "reward file wrong.py: cannot import it: SyntaxError: "),
        ("leaves.py:f", "reward file leaves.py: cannot import it: SystemExit: 3"),
        ("absent_module.part:f", "reward module 'absent_module': must be installed or in the current directory"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_an_error_of_one_line(spec, expected, folder):
    (folder / "mine.py").write_text("def kindness(completions): ...\nNUMBER = 3\nclass Kind: ...\n")
    (folder / "broken.py").write_text("import nothing_here\n")
    (folder / "wrong.py").write_text("def f(:\n")
    (folder / "leaves.py").write_text("raise SystemExit(3)\n")
    message = error_message(lambda: resolve(spec))
    assert expected in message
    if spec == "broken.py:f":
        assert f"({folder / 'broken.py'}:1)" in message
