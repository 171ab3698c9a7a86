"""What README.md and docs/ tell people to type: every command and every option of it exists."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from quarkrl.cli.main import main
from quarkrl.cli.train_options import preset_names

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    """The options of each command, as its help lists them."""
    found = {}
    for command in ("train", "generate", "evaluate", "score", "demo"):
        with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit):
            main([command, "--help"])
        found[command] = set(re.findall(r"--\w+", said.getvalue()))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_the_page_have_the_options_they_are_given(page, flags):
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.S))
    for line in blocks.replace("\\\n", " ").splitlines():
        for command, rest in re.findall(r"quarkrl (\w+)(.*)", line.split("  #")[0]):
            assert set(re.findall(r"(?<=\s)--\w+", rest)) <= flags[command], line
            for name in re.findall(r"--config (\S+)", rest):
                assert name in preset_names() or name.startswith("runs/") or (ROOT / name).is_file(), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_named_in_the_text_exist(page, flags):
    known = set.union(*flags.values())
    assert set(re.findall(r"`(--\w+)", page.read_text(encoding="utf-8"))) <= known
