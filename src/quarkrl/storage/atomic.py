"""Files that are whole or absent, whatever ends the process, and tables that know when they are damaged.

All that a run must not lose goes through here: written under a temporary name, flushed to the disk, renamed, and the
rename flushed with its directory. A process that dies, or a machine that loses its power, leaves the old state or the
new one.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from quarkrl.errors import UserError

# Keys of a Parquet file's own metadata: notes as JSON, and the SHA-256 of notes and values.
_NOTES, _DIGEST = b"quarkrl.notes", b"quarkrl.sha256"


@contextmanager
def written(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file that takes its name once it is whole and on the disk; of a failed one nothing remains.

    Raises:
        UserError: the disk is full, or does not take the file for another reason.
    """
    path = Path(path)
    temporary = path.with_suffix(".tmp")
    try:
        with told(path):
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)  # A full disk has use for the room.
        raise


@contextmanager
def staged(target: str | os.PathLike) -> Iterator[Path]:
    """An empty directory to fill, which then takes the name of `target`, in place of what is there.

    Raises:
        UserError: as `written`.
    """
    target = Path(target)
    temporary = target.with_name(f"_{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with told(target):
            temporary.mkdir(parents=True)
            yield temporary
            publish(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def publish(temporary: Path, target: Path) -> None:
    """Give a filled directory its name, once all of it is on the disk; what had the name before is removed."""
    sync_tree(temporary)
    old = target.with_name(f"_{target.name}.old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
    os.rename(temporary, target)
    sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove(directory: Path) -> None:
    """Remove a directory so that it is never half there under its name."""
    doomed = directory.with_name(f"_{directory.name}.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(directory, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def tidy(directory: Path) -> None:
    """Clear away what an interrupted `written`, `staged`, `publish` or `remove` left directly in `directory`."""
    for old in directory.glob("_*.old"):
        target = old.with_name(old.name[1 : -len(".old")])
        if target.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, target)  # Stopped between the two renames of `publish`.
    for left in directory.glob("*.tmp"):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


@contextmanager
def told(what: str | os.PathLike) -> Iterator[None]:
    """The system's refusal to write as a user's error in one line; the libraries below say it in several ways.

    Raises:
        UserError: in place of any exception that stems from the operating system.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (reason := _system_reason(error)) is None:
            raise
        raise UserError(
            f"{str(what)!r} cannot be written: {reason}; what was saved before is whole: mend this, then go on with "
            "--resume (resume_from_checkpoint=True)"
        ) from error


def _system_reason(error: Exception) -> str | None:
    """What the operating system said; safetensors and tokenizers wrap it as Rust prints it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    found = re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", str(error))
    return os.strerror(int(found[1] or found[2])).lower() if found else None


def sync_tree(directory: Path) -> None:
    """Flush all files and directories below, and the directory itself."""
    for folder, _, names in os.walk(directory):
        for name in names:
            with open(os.path.join(folder, name), "rb+") as file:
                os.fsync(file.fileno())
        sync_directory(folder)


def sync_directory(directory: str | os.PathLike) -> None:
    """Flush the names in a directory; where directories cannot be opened (Windows), names need no flushing."""
    if os.name == "nt":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(*paths: str | os.PathLike) -> str:
    """The digest of a file, in hexadecimal; of several, in the order given, as if they were one."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with written(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False).encode())


def write_table(path: str | os.PathLike, table: pa.Table, notes: dict[str, Any]) -> None:
    """Write a Parquet file, whole or not at all, with notes (JSON) and checksums of every page and of all values.

    Args:
        path: where to.
        table: columns of numbers and of lists of numbers.
        notes: what goes with them.
    """
    text = json.dumps(notes)
    facts = {_NOTES: text.encode(), _DIGEST: _digest(table, text).encode()}
    with written(path) as file:
        pq.write_table(table.replace_schema_metadata(facts), file, write_page_checksum=True)


def read_table(path: str | os.PathLike) -> tuple[pa.Table, dict[str, Any]]:
    """What `write_table` wrote: the table and its notes.

    Raises:
        ValueError, OSError, pyarrow.ArrowException: the file is damaged, or of somebody else.
    """
    table = pq.read_table(path, page_checksum_verification=True, partitioning=None)
    facts = table.schema.metadata or {}
    if _DIGEST not in facts or _NOTES not in facts:
        raise ValueError("it has no checksum")
    text = facts[_NOTES].decode()
    if _digest(table, text).encode() != facts[_DIGEST]:
        raise ValueError("its checksum is of other values")
    return table, json.loads(text)


def _digest(table: pa.Table, notes: str) -> str:
    """Of values rather than bytes: another version of the library may lay the same table out otherwise."""
    digest = hashlib.sha256(notes.encode())
    for name in table.column_names:
        column = table[name].combine_chunks()
        digest.update(f"\n{name} {len(column)} {column.null_count}\n".encode())
        if pa.types.is_list(column.type):
            digest.update(column.value_lengths().to_numpy(zero_copy_only=False).tobytes())
            column = column.flatten()
        digest.update(column.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()
