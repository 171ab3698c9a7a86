"""`quarkrl score`: files and standard input, empty completions, prompts of rewards, and the summary."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from quarkrl.cli.main import main
from quarkrl.data.prompts import load_prompts

REWARDS = """
def few_a(completions, **_):
    return [None if text == "?" else -text.split().count("a") for text in completions]

def length(completions, **_):
    return [len(text) for text in completions]

def both(prompts, completions, **_):
    return [len(prompt + text) for prompt, text in zip(prompts, completions)]
"""


@pytest.fixture
def rewards(tmp_path) -> Path:
    (tmp_path / "rewards.py").write_text(REWARDS, encoding="utf-8")
    return tmp_path / "rewards.py"


def score(capsys, source: object, *arguments: object) -> tuple[list[str], str]:
    """The rewards and texts that a command has scored, and the text of standard error."""
    out, err = printed(capsys, source, *arguments, "--json")
    rows = [{"text": row.get("completion"), **row} for row in map(json.loads, out.splitlines())]
    return [f"{'-' if row['reward'] is None else format(row['reward'], '.4f')}\t{row['text']}" for row in rows], err


def printed(capsys, source: object, *arguments: object) -> tuple[str, str]:
    """The standard output and the standard error of a command that succeeds."""
    code = main(["score", *map(str, (source, *arguments))])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_each_line_of_a_text_file_has_a_reward_and_the_summary_their_distribution(rewards, capsys, tmp_path):
    (tmp_path / "texts.txt").write_text("a b\nc\n?\na a a\n", encoding="utf-8")
    out, err = score(capsys, tmp_path / "texts.txt", "--reward", f"{rewards}:few_a")
    assert out == ["-1.0000\ta b", "0.0000\tc", "-\t?", "-3.0000\ta a a"]
    # Of -3, -1 and 0: mean -4/3, 10th percentile -3 + 0.2 · 2, median -1, 90th percentile -1 + 0.8 · 1.
    assert "4 texts, 1 without a reward" in err
    assert "mean -1.3333, 10th percentile -2.6000, median -1.0000, 90th percentile -0.2000" in err


def test_texts_without_a_reward_are_counted_even_if_no_text_has_one(rewards, capsys, tmp_path):
    (tmp_path / "texts.txt").write_text("?\n?\n", encoding="utf-8")
    out, err = score(capsys, tmp_path / "texts.txt", "--reward", f"{rewards}:few_a")
    assert out == ["-\t?", "-\t?"] and err == "2 texts, 2 without a reward\n"


def test_json_lines_have_the_score_of_each_of_several_rewards(rewards, capsys, tmp_path):
    (tmp_path / "texts.txt").write_text("a b\n?\n", encoding="utf-8")
    one, _ = printed(capsys, tmp_path / "texts.txt", "--reward", f"{rewards}:few_a", "--json")
    assert [json.loads(line) for line in one.splitlines()] == [
        {"text": "a b", "reward": -1.0},
        {"text": "?", "reward": None},
    ]
    two, _ = printed(capsys, tmp_path / "texts.txt", "--reward", f"{rewards}:few_a", f"{rewards}:length", "--json")
    assert [json.loads(line) for line in two.splitlines()] == [
        {"text": "a b", "reward": 2.0, "scores": {"few_a": -1.0, "length": 3.0}},
        {"text": "?", "reward": None, "scores": {"few_a": None, "length": 1.0}},
    ]


def test_the_report_has_the_distribution_of_each_reward_and_the_best_and_worst_texts(rewards, capsys, tmp_path):
    (tmp_path / "texts.txt").write_text("".join("a " * i + "b\n" for i in range(10)) + "?\n", encoding="utf-8")
    source, spec = tmp_path / "texts.txt", f"{rewards}:few_a"
    out, err = printed(capsys, source, "--reward", spec, f"{rewards}:length", "--limit", "1")
    lines = out.splitlines()
    assert lines[0] == "11 texts, 1 without a reward" and not err
    # Of 0 to -9: mean -4.5, standard deviation √8.25, 10th percentile -8.1. The length is 1 - 2 · few_a.
    cells = [line.split() for line in lines]
    assert ["few_a", "-4.5", "2.872", "-9", "-8.1", "-4.5", "-0.9", "0"] in cells
    assert [line.split()[:2] for line in lines if line.startswith(("best", "worst"))] == [
        ["best", "10"],
        ["worst", "1"],
    ]
    assert all(len(line) <= 80 for line in lines)


def test_a_reward_of_few_values_is_shown_with_the_share_of_each(rewards, capsys, tmp_path):
    (tmp_path / "texts.txt").write_text("a\nb\nb\nb\n", encoding="utf-8")
    out, _ = printed(capsys, tmp_path / "texts.txt", "--reward", f"{rewards}:few_a")
    assert "values: -1: 25%, 0: 75%" in out


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_all_scores_are_saved_to_a_file(rewards, capsys, tmp_path, suffix):
    (tmp_path / "texts.txt").write_text("a b\n?\n", encoding="utf-8")
    file = tmp_path / f"scores{suffix}"
    printed(capsys, tmp_path / "texts.txt", "--reward", f"{rewards}:few_a", f"{rewards}:length", "--output", file)
    rows = load_prompts(file, column="text")
    assert rows.prompts == ["a b", "?"]
    assert [None if value in (None, "") else float(value) for value in rows.columns["reward"]] == [2.0, None]


def test_an_output_of_another_format_is_one_line(rewards, capsys, tmp_path):
    (tmp_path / "texts.txt").write_text("a\n", encoding="utf-8")
    assert main(["score", str(tmp_path / "texts.txt"), "--reward", f"{rewards}:few_a", "--output", "x.txt"]) == 2
    assert "output 'x.txt': must end in .jsonl, .csv, .parquet." in capsys.readouterr().err


def test_the_text_is_in_a_named_column_or_in_completion(rewards, capsys, tmp_path):
    (tmp_path / "texts.csv").write_text("completion,other\na a,b\nc,d\n", encoding="utf-8")
    reward = ("--reward", f"{rewards}:few_a")
    assert score(capsys, tmp_path / "texts.csv", *reward)[0] == ["-2.0000\ta a", "0.0000\tc"]
    assert score(capsys, tmp_path / "texts.csv", "--column", "other", *reward)[0] == ["0.0000\tb", "0.0000\td"]


def test_the_completions_of_generate_are_scored_and_not_its_prompts(rewards, capsys, tmp_path):
    path = write(
        tmp_path / "generated.jsonl",
        {"prompt": "a a a a", "completions": ["a", "b a a"]},
        {"prompt": "c", "completions": [""]},
    )
    out, err = score(capsys, path, "--reward", f"{rewards}:few_a")
    assert out == ["-1.0000\ta", "-2.0000\tb a a", "0.0000\t"] and "3 texts" in err
    both, _ = score(capsys, path, "--reward", f"{rewards}:both")
    assert both == ["8.0000\ta", "12.0000\tb a a", "1.0000\t"]  # Rewards get the prompt of each.
    prompts, _ = score(capsys, path, "--reward", f"{rewards}:few_a", "--column", "prompt")
    assert prompts == ["-4.0000\ta a a a", "0.0000\tc"]


def test_standard_input_has_one_text_per_line(rewards, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a a a\r\nb\n"), encoding="utf-8"))
    assert score(capsys, "-", "--reward", f"{rewards}:few_a")[0] == ["-3.0000\ta a a", "0.0000\tb"]


def test_a_byte_on_standard_input_that_is_not_utf8_is_an_error_or_skipped(rewards, capsys, monkeypatch):
    for skip in ([], ["--skip_bad_prompts"]):
        monkeypatch.setattr(
            sys, "stdin", io.TextIOWrapper(io.BytesIO("a\ncafé\nb\n".encode("latin-1")), encoding="utf-8")
        )
        code = main(["score", "-", "--reward", f"{rewards}:few_a", "--json", *skip])
        out, err = capsys.readouterr()
        if skip:
            texts = [json.loads(line)["text"] for line in out.splitlines()]
            assert code == 0 and texts == ["a", "b"] and "1 skipped (not UTF-8)" in err
        else:
            assert code == 2 and err.startswith("error: standard input:2: byte 0xe9 is not UTF-8.")


def test_a_closed_standard_input_is_one_line(rewards, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["score", "-", "--reward", f"{rewards}:few_a"]) == 2
    assert capsys.readouterr().err.startswith("error: standard input is closed.")


def test_an_empty_completion_is_scored_and_a_missing_one_is_an_error_or_skipped(rewards, capsys, tmp_path):
    rows = [{"prompt": "a a", "completion": "a"}, {"prompt": "a a", "completion": ""}]
    texts = write(tmp_path / "texts.jsonl", *rows)
    reward = ("--reward", f"{rewards}:few_a")
    assert score(capsys, texts, *reward)[0] == ["-1.0000\ta", "0.0000\t"]
    write(texts, *rows, {"prompt": "a a", "completion": None})
    assert main(["score", str(texts), *reward]) == 2
    assert "texts.jsonl:3" in capsys.readouterr().err
    out, err = score(capsys, texts, *reward, "--skip_bad_prompts")
    assert out == ["-1.0000\ta", "0.0000\t"]
    assert "2 texts, 0 without a reward, 1 skipped (no prompt)" in err


def test_a_reward_receives_the_text_of_a_nested_prompt(rewards, capsys, tmp_path):
    texts = write(tmp_path / "texts.jsonl", {"prompt": {"text": "ab", "toxicity": 0.5}, "completion": "c"})
    assert score(capsys, texts, "--reward", f"{rewards}:both")[0] == ["3.0000\tc"]


def test_the_summary_counts_scores_from_the_cache(capsys, tmp_path):
    pytest.importorskip("vaderSentiment")
    (tmp_path / "texts.txt").write_text("good\nbad\n", encoding="utf-8")
    for hits in (0, 2):
        arguments = ("--reward", "vader", "--score_cache", tmp_path / "cache")
        assert f", {hits} from cache;" in score(capsys, tmp_path / "texts.txt", *arguments)[1]
