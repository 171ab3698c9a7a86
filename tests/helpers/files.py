"""Files of a test: write one, list those of a directory."""

from __future__ import annotations

from pathlib import Path


def write(path: Path, data: str | bytes) -> Path:
    """Write text or bytes to a file; return its path."""
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def files_of(directory: Path) -> set[str]:
    """The paths of all files below a directory, relative to it."""
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
