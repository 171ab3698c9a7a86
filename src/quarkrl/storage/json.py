"""JSON files, and values that JSON can hold."""

import json
import math
import os
from typing import Any

from quarkrl.storage.atomic import write_text


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write a value as a JSON file, atomically.

    Raises:
        UserError: the operating system refuses the write, for example on a full disk.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False))


def nan_to_null(value: Any) -> Any:
    """Return a copy of the value with None (null in JSON) for each NaN and infinity; tuples become lists."""
    if isinstance(value, dict):
        return {key: nan_to_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [nan_to_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
