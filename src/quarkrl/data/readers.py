"""Readers of prompt sources: files, directories and data sets become rows with their locations.

A row that cannot be read becomes a `BadRow`, so that the rows around it are kept.
"""

import gzip
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quarkrl.builtin import BUILTIN, BUILTIN_CHATS, near_builtin
from quarkrl.data.rows import Row, choose_column, not_utf8, quote_names, restore_chats
from quarkrl.data.text_formats import read_csv, read_json, read_jsonl, read_text, read_tsv
from quarkrl.errors import UserError, near_file, one_line, shorten
from quarkrl.hub_access import only_cache_if_unreachable, why_unreachable

_TEXT_FORMATS: dict[str, Callable[[str, bytes], list[Row]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".txt": read_text,
}
_SUFFIXES = (*_TEXT_FORMATS, ".parquet")
_STREAMED = {".jsonl": "json", ".parquet": "parquet"}  # The builders of `datasets`.
_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class TextStream:
    """Bytes of a text with one prompt per line, such as standard input.

    Attributes:
        name: of the stream, for messages.
        data: its content.
    """

    name: str
    data: bytes


def read_rows(source: Any, split: str) -> tuple[str, list[Row]]:
    """Read all rows of a source.

    Args:
        source: a path, the name of a data set, a `datasets.Dataset` or `DatasetDict`, a list, or a `TextStream`. A
            string is looked up as a path first.
        split: the split of a data set that has several.

    Returns:
        The name of the source for messages, and its rows.

    Raises:
        UserError: the source does not exist or cannot be read.
    """
    if isinstance(source, TextStream):
        return source.name, read_text(source.name, source.data)
    if isinstance(source, (list, tuple)):
        return "the list", [(f"row {i} of the list", row) for i, row in enumerate(source, 1)]
    if not isinstance(source, (str, os.PathLike)):
        return _read_dataset("the data set", source, split)
    name = os.path.expanduser(os.fspath(source))
    suffix = _format_suffix(name)
    check_exists(source)
    if not os.path.isfile(name):
        return _read_dataset(name, _load_dataset(name, split), split)
    return name, _read_file(name, suffix)


def check_exists(source: str | os.PathLike) -> None:
    """Check that a source exists, unless it may be the name of a data set on the hub.

    Raises:
        UserError: it names a file or directory that does not exist.
    """
    name = os.path.expanduser(os.fspath(source))
    is_path = not isinstance(source, str) or name.startswith((".", "/", "~")) or "\\" in name
    if not os.path.exists(name) and (is_path or _format_suffix(name) in _SUFFIXES or not name):
        raise UserError(_describe_missing(Path(name), name))
    if hint := near_builtin(name, BUILTIN, BUILTIN_CHATS):
        raise UserError(f"{name}: no such file.{hint}")


def _format_suffix(name: str) -> str:
    """Return the suffix that names a file's format: ".jsonl" of "prompts.JSONL.gz"."""
    return Path(name.lower().removesuffix(".gz")).suffix


def _read_file(name: str, suffix: str) -> list[Row]:
    if suffix not in _SUFFIXES:
        raise UserError(
            f"{name}: unknown suffix {suffix!r}; must be one of {quote_names(_SUFFIXES)}, or such a text file with "
            "'.gz' behind it."
        )
    try:
        if not os.path.getsize(name):
            raise UserError(f"{name}: the file is empty. Write at least one prompt into it.")
        if suffix == ".parquet":
            return _read_parquet(name)
        data = Path(name).read_bytes()
        if name.lower().endswith(".gz") or data.startswith(_GZIP_MAGIC):
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{name}: cannot be read ({one_line(error)}). Fix the cause.") from error
    return _TEXT_FORMATS[suffix](name, data)


def _describe_missing(path: Path, name: str) -> str:
    if not path.parent.is_dir():
        return f"{name}: no such file, and no directory {str(path.parent)!r}. Provide an existing file."
    suggestion = near_file(path, os.listdir(path.parent)) or " Provide an existing file."
    return f"{name or repr(name)}: no such file.{suggestion}"


# Data sets and Parquet


def _load_dataset(name: str, split: str, streaming: bool = False) -> Any:
    import datasets

    is_directory = os.path.isdir(name)
    try:
        if os.path.exists(f"{name}/state.json") or os.path.exists(f"{name}/dataset_dict.json"):
            return datasets.load_from_disk(name)
        # An absolute path, because load_dataset("csv") is a format even if there is a directory of that name.
        names = [os.path.abspath(name)] if is_directory else name.split(":", 1)  # NAME, or NAME:CONFIGURATION
        with only_cache_if_unreachable(names[0]):
            return datasets.load_dataset(*names, split=split, streaming=streaming)
    except Exception as error:  # Formats, network and hub raise many types; the message keeps the cause.
        cause: BaseException = error
        if "while generating the dataset" in str(error) and error.__cause__:
            cause = error.__cause__  # The more specific error.
        origin = "the directory has" if is_directory else "there is no such file, and the hub has"
        if not is_directory and (reason := why_unreachable()):
            origin = f"there is no such file, the hub cannot be reached ({reason}), and its cache has"
        raise UserError(
            f"{shorten(name, 200)}: {origin} no split {split!r} that can be read ({one_line(cause)}). "
            "Provide a prompt file, or the directory or name of a data set."
        ) from error


def open_stream(name: str, split: str, column: str = "prompt") -> Any:
    """Open a data set as a `datasets.IterableDataset`, which is read while it is used.

    Args:
        name: a `.jsonl` or `.parquet` file, a directory, or the name of a data set on the hub.
        split: the split of a data set that has several.
        column: the column of the prompt. It is renamed to "prompt".

    Raises:
        UserError: there is no such data set, split or column, or the file has another format.
    """
    import datasets

    name = os.path.expanduser(name)
    suffix = _format_suffix(name)
    if os.path.isfile(name) or suffix in _SUFFIXES:
        if not os.path.isfile(name):
            raise UserError(_describe_missing(Path(name), name))
        if suffix not in _STREAMED:
            raise UserError(f"stream_prompts {name}: must be a data set, or a file of {quote_names(_STREAMED)}.")
        dataset: Any = _stream_file(name, _STREAMED[suffix])
    else:
        dataset = _load_dataset(name, split, streaming=True)
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise UserError(f"{name}: there is no split {split!r}; must be one of {quote_names(dataset)}.")
        dataset = dataset[split]
    if isinstance(dataset, datasets.Dataset):  # From `save_to_disk`: it is read from the disk as it is used.
        dataset = dataset.to_iterable_dataset()
    if column == "prompt":
        return dataset
    choose_column(name, list(dataset.take(1)), column)  # `datasets` would report it at the first row, as a ValueError.
    return dataset.rename_column(column, "prompt")


def _stream_file(name: str, file_format: str) -> Any:
    import datasets

    try:
        builder = datasets.load_dataset_builder(file_format, data_files=os.path.abspath(name))
        return builder.as_streaming_dataset(split="train")
    except Exception as error:  # Formats raise many types; the message keeps the cause.
        raise UserError(f"{shorten(name, 200)}: must be readable as {file_format} ({one_line(error)}).") from error


def _read_dataset(name: str, dataset: Any, split: str) -> tuple[str, list[Row]]:
    import datasets

    if isinstance(dataset, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise UserError(
            f"prompts: must be finite here, not of type {type(dataset).__name__}. Stream only train_dataset of "
            "QuarkTrainer; elsewhere, pass list(dataset.take(1000))."
        )
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise UserError(f"{name}: there is no split {split!r}; must be one of {quote_names(dataset)}.")
        name, dataset = f"{name} ({split})", dataset[split]
    if not isinstance(dataset, datasets.Dataset):
        raise UserError(
            f"prompts: must be a path, the name of a data set, a datasets.Dataset or a list, "
            f"not {type(dataset).__name__}."
        )
    rows = _decode_rows(lambda start, end: dataset.select(range(start, end)).to_list(), 0, len(dataset))
    return name, [(f"row {i} of {name}", restore_chats(row)) for i, row in enumerate(rows, 1)]


def _decode_rows(read: Callable[[int, int], list[Any]], start: int, end: int) -> list[Any]:
    """Return the rows from `start` up to `end`; those whose text is not UTF-8 are BadRows."""
    try:
        return read(start, end)
    except UnicodeDecodeError as error:
        if end - start == 1:
            return [not_utf8(error.object[error.start])]
        middle = (start + end) // 2  # Bisect for the bad rows.
        return _decode_rows(read, start, middle) + _decode_rows(read, middle, end)


def _read_parquet(name: str) -> list[Row]:
    import datasets
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(name).read()
        if b"huggingface" in (table.schema.metadata or {}):
            # `datasets` decodes columns of mixed types, which it stores as JSON and Arrow alone does not decode.
            return _read_dataset(name, datasets.Dataset(table), split="")[1]
        rows = _decode_rows(lambda start, end: table.slice(start, end - start).to_pylist(), 0, len(table))
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{name}: cannot be read ({one_line(error)}). Write it again, as Parquet of plain types."
        ) from error
    return [(f"row {i} of {name}", restore_chats(row)) for i, row in enumerate(rows, 1)]
