"""The standard streams: any character can be printed, and input is read as a file is."""

import io
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from quarkrl.errors import UserError

if TYPE_CHECKING:
    from quarkrl.data.readers import TextStream


def accept_any_character() -> None:
    r"""Let standard output and standard error take any character.

    Files and pipes receive UTF-8, which the other commands read, unless PYTHONIOENCODING is set. A character that the
    encoding of a terminal lacks is printed as an escape such as `\u2603`.
    """
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):  # There is none, or a test has replaced it.
            continue
        keeps_encoding = stream.isatty() or "PYTHONIOENCODING" in os.environ
        # Both handlers fail for some characters. Any other was chosen by the user.
        fails = stream.errors in ("strict", "surrogateescape")
        stream.reconfigure(
            encoding=stream.encoding if keeps_encoding else "utf-8",
            errors="backslashreplace" if fails else stream.errors,
        )


def print_json(row: Any) -> None:
    """Print a value as one line of JSON, which stays valid in any encoding."""
    encoding = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "")
    print(json.dumps(row, ensure_ascii=encoding != "utf8"))


def read_standard_input() -> "TextStream":
    """Return the bytes of standard input, to be read as the lines of a text file.

    Raises:
        UserError: standard input is closed.
    """
    from quarkrl.data.readers import TextStream

    if sys.stdin is None:
        raise UserError("standard input is closed. Give a file, or pipe text into the command.")
    return TextStream("standard input", sys.stdin.buffer.read())
