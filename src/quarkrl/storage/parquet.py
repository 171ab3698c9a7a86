"""Parquet tables with checksums: damage is detected when a table is read."""

import hashlib
import json
import os
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from quarkrl.storage.atomic import atomic_file

# Keys of the Parquet file's metadata: notes as JSON, and the SHA-256 of notes and values.
_NOTES, _DIGEST = b"quarkrl.notes", b"quarkrl.sha256"


def write_table(path: str | os.PathLike, table: pa.Table, notes: dict[str, Any]) -> None:
    """Write a Parquet file atomically, with checksums of each page and of all values.

    Args:
        path: the file.
        table: columns of numbers, of lists of numbers, or of texts.
        notes: facts about the table that JSON can hold; `read_table` returns them.

    Raises:
        UserError: the operating system refuses the write, for example on a full disk.
    """
    notes_json = json.dumps(notes)
    metadata = {_NOTES: notes_json.encode(), _DIGEST: _digest(table, notes_json).encode()}
    with atomic_file(path) as file:
        pq.write_table(table.replace_schema_metadata(metadata), file, write_page_checksum=True, compression="zstd")


def read_table(path: str | os.PathLike) -> tuple[pa.Table, dict[str, Any]]:
    """Read a table and its notes from a file that `write_table` wrote, and verify the checksums.

    Raises:
        ValueError, OSError, pyarrow.ArrowException: the file is damaged, or another program wrote it.
    """
    table = pq.read_table(path, page_checksum_verification=True, partitioning=None)
    metadata = table.schema.metadata or {}
    if _DIGEST not in metadata or _NOTES not in metadata:
        raise ValueError("it has no checksum")
    notes_json = metadata[_NOTES].decode()
    if _digest(table, notes_json).encode() != metadata[_DIGEST]:
        raise ValueError("its values do not match its checksum")
    return table, json.loads(notes_json)


def _digest(table: pa.Table, notes_json: str) -> str:
    """SHA-256 of the values, not of the file's bytes: another pyarrow may encode the same table differently."""
    digest = hashlib.sha256(notes_json.encode())
    for name in table.column_names:
        column = table[name].combine_chunks()
        digest.update(f"\n{name} {len(column)} {column.null_count}\n".encode())
        if pa.types.is_list(column.type):
            digest.update(column.value_lengths().to_numpy(zero_copy_only=False).tobytes())
            column = column.flatten()
        if pa.types.is_string(column.type):
            digest.update(json.dumps(column.to_pylist()).encode())
            continue
        digest.update(column.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()
