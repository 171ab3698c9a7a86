"""`UserError` and the helpers that word messages. The command line prints a `UserError` as one line, exit code 2."""

import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from traceback import extract_tb


class UserError(ValueError):
    """A mistake that the user can fix.

    The message is one line: `<option> <value>: must be <limit>. <Remedy>.`
    """


def did_you_mean(word: str, known: Iterable[str], prefix: str = "", cutoff: float = 0.6) -> str:
    """Return " Did you mean 'NAME'?" with the known name that is closest to `word`, or "" if none is close.

    Args:
        word: what the user wrote.
        known: the valid names.
        prefix: put before the name, such as "--".
        cutoff: similarity from 0 to 1 that a name needs (`difflib.get_close_matches`).
    """
    matches = get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f" Did you mean {prefix + matches[0]!r}?" if matches else ""


def near_file(path: Path, names: Iterable[str]) -> str:
    """Return " Did you mean 'FILE'?" with the file beside a missing one whose name is closest, or "" if none is close.

    Suffixes are not compared, as they would make any two text files similar.

    Args:
        path: of the missing file or directory.
        names: of the files beside it.
    """
    names = sorted(names, key=lambda name: Path(name).suffix != path.suffix)  # Of equal stems, that with the suffix.
    by_stem = {Path(name).stem: name for name in reversed(names)}
    matches = get_close_matches(path.stem, by_stem, n=1, cutoff=0.7)
    prefix = "" if path.parent == Path() else f"{path.parent}{os.sep}"
    return f" Did you mean {prefix + by_stem[matches[0]]!r}?" if matches else ""


def truncate(text: str, width: int) -> str:
    """Return at most `width` characters of a text; an ellipsis is the last of them if some are left out."""
    return text if len(text) <= width else text[: width - 1] + "…"


def shorten(value: object, width: int = 60) -> str:
    """Return `repr(value)` on one line, truncated to `width` characters with an ellipsis."""
    return truncate(" ".join(repr(value).split()), width)


def one_line(error: BaseException, width: int = 200) -> str:
    """Return the first line of an exception's message without its full stop, or its type if it has no message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return truncate(lines[0].rstrip("."), width)


def describe_exception(error: BaseException, width: int = 400) -> str:
    """Return an exception's type, its message of at most `width` characters, and the file and line, on one line."""
    message = truncate(" ".join(str(error).split()), width)
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    if isinstance(error, SyntaxError):
        return text  # Its message already has the file and the line.
    frames = [frame for frame in extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    return f"{text} ({frames[-1].filename}:{frames[-1].lineno})" if frames else text


def format_seconds(seconds: float) -> str:
    """Return a duration in the largest unit that suits it, such as `45 s`, `8 min` or `2 h 10 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes <= 90 else f"{minutes // 60} h {minutes % 60} min"
