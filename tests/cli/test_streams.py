"""The standard streams in other encodings than UTF-8: each command prints any character."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest
from rich.table import Table

from quarkrl.cli.common import console
from quarkrl.cli.streams import accept_any_character, print_json

SNOWMAN = "naïve ☃ 😀"


@pytest.fixture
def stdout(monkeypatch):
    """A function that replaces standard output by one with an encoding, and returns what reads its bytes."""

    def replace(encoding: str, is_terminal: bool = False, **settings: str):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, **settings)
        monkeypatch.setattr(stream, "isatty", lambda: is_terminal, raising=False)
        monkeypatch.setattr(sys, "stdout", stream)
        accept_any_character()

        def read() -> bytes:
            stream.flush()
            return stream.buffer.getvalue()

        return read

    return replace


def test_a_file_or_pipe_is_utf8_in_any_locale(stdout, monkeypatch):
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    for encoding in ("ascii", "latin-1", "cp1252", "utf-8"):
        read = stdout(encoding)
        sys.stdout.write(f"{SNOWMAN}\n")
        assert read().decode("utf-8").splitlines() == [SNOWMAN]


def test_a_terminal_keeps_its_encoding_and_shows_escapes(stdout, monkeypatch):
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    read = stdout("latin-1", is_terminal=True)
    sys.stdout.write(f"{SNOWMAN}\n")
    assert read().decode("latin-1").splitlines() == ["naïve \\u2603 \\U0001f600"]


def test_pythonioencoding_is_kept_with_its_error_handler(stdout, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    read = stdout("ascii", errors="replace")
    sys.stdout.write(f"{SNOWMAN}\n")
    assert read().splitlines() == [b"na?ve ? ?"]


def test_tables_and_notes_print_in_ascii(stdout, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    read = stdout("ascii")
    table = Table("±")
    table.add_row(SNOWMAN)
    console(stderr=False).print(table, SNOWMAN)
    lines = read().decode("ascii").splitlines()
    assert any("\\xb1" in line for line in lines) and lines[-1] == "na\\xefve \\u2603 \\U0001f600"


def test_half_a_character_can_be_printed(stdout):
    for errors in ("strict", "surrogateescape"):
        read = stdout("utf-8", errors=errors)
        sys.stdout.write("\ud800\udce9\n")
        assert read().splitlines() == [b"\\ud800\\udce9"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "utf-16"])
def test_json_stays_valid_in_any_encoding(stdout, monkeypatch, encoding):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    read = stdout(encoding)
    print_json({"text": SNOWMAN + "\ud800"})
    assert json.loads(read().decode(encoding)) == {"text": SNOWMAN + "\ud800"}


def test_streams_that_are_closed_or_replaced_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    accept_any_character()
    assert sys.stdout is None and isinstance(sys.stderr, io.StringIO)


@pytest.mark.parametrize("json_lines", [False, True])
def test_score_in_a_process_whose_encoding_is_ascii(tmp_path, json_lines):
    (tmp_path / "rewards.py").write_text("def length(completions, **_):\n    return [*map(len, completions)]\n")
    command = [sys.executable, "-m", "quarkrl", "score", "-", "--reward", "rewards.py:length"]
    ended = subprocess.run(
        command + ["--json"] * json_lines,
        input=f"{SNOWMAN}\n".encode(),
        capture_output=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert ended.returncode == 0, ended.stderr
    if json_lines:
        assert json.loads(ended.stdout) == {"text": SNOWMAN, "reward": 9.0}
    else:
        assert ended.stdout.splitlines()[-1].endswith(b"na\\xefve \\u2603 \\U0001f600")
