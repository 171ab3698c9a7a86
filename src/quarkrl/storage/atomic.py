"""Atomic files and directories: after a crash, a name holds either the old content or the complete new content.

New content is written under a temporary name, flushed to the disk, and renamed; then the directory that holds the name
is flushed. This survives a killed process and a power failure. Temporary names end in `.tmp` or `.old`; `clean_up`
removes those that a crash leaves behind.

Two kinds of file are written without these functions. `metrics.jsonl` is appended to. A file in a directory that will
be renamed as a whole is written under its own name.
"""

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from quarkrl.errors import UserError


@contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a binary file that replaces `path` when the block ends; after an error `path` is unchanged.

    Raises:
        UserError: the operating system refuses the write, for example on a full disk.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with report_write_errors(path):
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _flush_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)  # A full disk needs the space.
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file atomically, in UTF-8 and with line feeds as they are.

    Raises:
        UserError: the operating system refuses the write, for example on a full disk.
    """
    with atomic_file(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def atomic_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Create an empty directory to fill, which replaces `path` when the block ends; after an error it is removed.

    Raises:
        UserError: the operating system refuses the write, for example on a full disk.
    """
    path = Path(path)
    temporary = path.with_name(f"_{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with report_write_errors(path):
            temporary.mkdir(parents=True)
            yield temporary
            replace_directory(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_directory(source: Path, target: Path) -> None:
    """Flush a complete directory to the disk and rename it to `target`; a directory of that name is removed.

    Whoever can read the directory can read its files: safetensors 0.8 writes files that only their owner can read.
    """
    _share_files(source)
    _flush_tree(source)
    old = target.with_name(f"_{target.name}.old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
    os.rename(source, target)
    _flush_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Remove a directory; it is renamed first, so that a crash never leaves part of it under its name."""
    temporary = path.with_name(f"_{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    os.rename(path, temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def clean_up(directory: Path) -> None:
    """Remove temporary files and directories that a crash left directly in `directory`.

    An interrupted `replace_directory` is undone if the new directory does not have its name yet.
    """
    for old in directory.glob("_*.old"):
        target = old.with_name(old.name[1 : -len(".old")])
        if target.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, target)  # The crash came between the two renames of `replace_directory`.
    for temporary in directory.glob("*.tmp"):
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink()


@contextmanager
def report_write_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turn each error of the operating system in the block into a one-line `UserError` that names `path`.

    Libraries report a failed write with different exception types; safetensors and tokenizers use plain ones.

    Raises:
        UserError: in place of an exception that an error of the operating system caused.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (reason := _system_reason(error)) is None:
            raise
        raise UserError(
            f"{str(path)!r} cannot be written: {reason}. Files saved before are complete. Fix the cause."
        ) from error


def _system_reason(error: Exception) -> str | None:
    """The operating system's message for the error; None if the error has another cause."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    # safetensors and tokenizers print the error number as Rust does, pyarrow as Python does.
    match = re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", str(error))
    return os.strerror(int(match[1] or match[2])).lower() if match else None


def _share_files(directory: Path) -> None:
    """Give each file below a directory the permissions of its folder, without those to execute."""
    for folder, _, names in os.walk(directory):
        mode = stat.S_IMODE(os.stat(folder).st_mode) & 0o666
        for name in names:
            os.chmod(os.path.join(folder, name), mode)


def _flush_tree(directory: Path) -> None:
    """Flush all files and directories below `directory`, and the directory itself."""
    for folder, _, names in os.walk(directory):
        for name in names:
            with open(os.path.join(folder, name), "rb+") as file:
                os.fsync(file.fileno())
        _flush_directory(folder)


def _flush_directory(directory: str | os.PathLike) -> None:
    """Flush the names in a directory. Windows cannot open a directory and does not need this."""
    if os.name == "nt":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(*paths: str | os.PathLike) -> str:
    """Return the SHA-256 of a file in hexadecimal; of several files, that of their concatenation."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def weights_digest(model: str | os.PathLike) -> str:
    """Return the SHA-256 of a model's file, or of the weight files in its directory in the order of their names."""
    return sha256(*(sorted(Path(model).glob("*.safetensors")) if os.path.isdir(model) else [model]))
