"""Hints for a name that no reward has: how a function of the user's own is named, and what may be meant."""

import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

_DEFINITION = re.compile(r"^(?:async )?def (\w+)\(", re.MULTILINE)
_MOST_FILES = 50


def own_function_hint(name: str) -> str:
    """Return how to name a function, with the nearest one in the Python files of the current directory, if any.

    The files are read, not imported.
    """
    specs = {function: f"{file}:{function}" for file, function in _functions()}
    if near := get_close_matches(name, specs, n=1):
        return f" Did you mean {specs[near[0]]!r}?"
    return " A function of your own is FILE.py:FUNCTION."


def _functions() -> Iterator[tuple[str, str]]:
    """Yield file and name of each function at the top of a Python file in the current directory."""
    for path in sorted(Path().glob("*.py"))[:_MOST_FILES]:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError):
            continue
        for match in _DEFINITION.finditer(text):
            if not match[1].startswith("_"):
                yield path.name, match[1]
