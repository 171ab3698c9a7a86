"""The small files of a run's directory, for readers that must start at once: this module imports no torch."""

import json
from pathlib import Path
from typing import Any

from filelock import FileLock

RUN_FILE, LOCK_FILE, OPTIONS_FILE, METRICS_FILE = "run.json", "run.lock", "config.yaml", "metrics.jsonl"


def is_in_use(directory: Path) -> bool:
    """Return whether a process of this machine has locked the directory; the system releases a killed one's lock."""
    file = directory.resolve() / LOCK_FILE
    if not file.is_file():
        return False
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except OSError:  # A time-out; or a directory in which this user may not write, whose lock cannot be tried.
        return True
    lock.release()
    return False


def recorded_fact(directory: Path, name: str) -> Any:
    """Return a fact of the identity of the run in a directory; None if it has none, or none that can be read."""
    try:
        return json.loads((directory / RUN_FILE).read_text(encoding="utf-8")).get(name)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # `open_run` reports a damaged file.
