"""Prompts from a file, a data set or memory, checked row by row, and their token ids.

    prompts = load_prompts("train.jsonl").encode(tokenizer, max_length=64)

A source is a `.jsonl` or `.json` (one object a line), `.csv`, `.parquet` or `.txt` (one prompt a line) file,
a directory that `datasets.save_to_disk` wrote or `datasets.load_dataset` reads, a data set on the hub (NAME or
NAME:CONFIGURATION), a `datasets.Dataset`, or a list of strings or dicts. A prompt is a string, RealToxicityPrompts'
nested `{"text": …, "toxicity": …}`, or chat messages. A bad row stops the loading with its place, or is left out and
counted (`skip_bad`). Lines and rows count from 1; only a line feed ends a line, not U+2028 and its like.
"""

from __future__ import annotations

import csv
import difflib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, compress
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError

from quarkrl.errors import UserError

_BATCH = 4096  # rows at a time: bounds the memory that the tokenizer's own records take
_SURROGATE = re.compile("[\ud800-\udfff]")


class _Bad(NamedTuple):  # why a row cannot be used
    reason: str  # what such rows are counted under
    found: str
    remedy: str


_Row = tuple[str, Any]  # its location; the row as a dict, its prompt alone as a str, or a _Bad


@dataclass
class Prompts:
    """Prompts with their other columns, all lists aligned.

    Attributes:
        prompts: text, or chat messages.
        columns: every other column by name, None where a row has no value; handed to reward functions.
        locations: where each prompt came from, "train.jsonl:17" or "row 5 of NAME", for messages.
        left_out: the rows left out: before which of the prompts each stood, and why.
        ids: token ids of each prompt; filled by `encode`, empty before.
    """

    prompts: list[str | list[dict]]
    columns: dict[str, list]
    locations: list[str]
    left_out: list[tuple[int, str]] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def skipped(self) -> dict[str, int]:
        """How many rows were left out, by reason."""
        return dict(Counter(reason for _, reason in self.left_out))

    def first(self, count: int) -> Prompts:
        """The first `count` prompts, not encoded, and what was left out on the way to them."""
        columns = {name: values[:count] for name, values in self.columns.items()}
        left_out = [(place, reason) for place, reason in self.left_out if place < count]
        return Prompts(self.prompts[:count], columns, self.locations[:count], left_out)

    def without(self, reasons: Sequence[str | None]) -> Prompts:
        """The prompts, not encoded, for which no reason to leave them out is given."""
        keep = [reason is None for reason in reasons]
        places = list(accumulate(keep, initial=0))
        left_out = [(places[place], reason) for place, reason in self.left_out]
        left_out += [(place, reason) for place, reason in zip(places, reasons, strict=False) if reason is not None]
        return Prompts(
            prompts=list(compress(self.prompts, keep)),
            columns={name: list(compress(values, keep)) for name, values in self.columns.items()},
            locations=list(compress(self.locations, keep)),
            left_out=left_out,
        )

    def encode(self, tokenizer: Any, *, max_length: int, skip_bad: bool = False) -> Prompts:
        """Tokenise text as `tokenizer(text)` does, and messages by the tokenizer's chat template.

        An EOS that the tokenizer puts behind a text is taken off, since a completion goes on from there.

        Args:
            tokenizer: a `transformers` tokenizer.
            max_length: the most tokens a prompt may have, BOS and template included.
            skip_bad: leave out what is too long or gives no tokens, instead of raising.

        Returns: a new `Prompts` with `ids`, without the rows left out.

        Raises:
            UserError: a prompt is bad, none is left, or there are messages but no chat template.
        """
        if max_length < 1:
            raise UserError(f"a limit of {max_length} tokens leaves no prompt; set it to 1 or more")
        results: list[Any] = [_problem(prompt) for prompt in self.prompts]  # a _Bad or None, then the ids
        for kind, encode in ((str, _encode_texts), (list, _encode_chats)):
            todo = [i for i, bad in enumerate(results) if bad is None and isinstance(self.prompts[i], kind)]
            for start in range(0, len(todo), _BATCH):
                batch = todo[start : start + _BATCH]
                for i, ids in zip(batch, encode(tokenizer, [self.prompts[i] for i in batch]), strict=True):
                    results[i] = ids if isinstance(ids, _Bad) else _length_problem(ids, max_length) or ids
        reasons = _reasons("the prompts", self.locations, results, skip_bad)
        kept = self.without(reasons)
        kept.ids = [ids for ids, reason in zip(results, reasons, strict=True) if reason is None]
        return kept


def load_prompts(
    source: Any,
    *,
    split: str = "train",
    column: str | Sequence[str] = "prompt",
    skip_bad: bool = False,
    empty: bool = False,
) -> Prompts:
    """Read and check prompts from any source that the module docstring lists.

    Args:
        source: a path, a data set's name on the hub, a `datasets.Dataset` or `DatasetDict`, or a list of
            strings or dicts. A string is looked up as a path first.
        split: which split to take of a data set that has splits; nothing else looks at it.
        column: the column that holds the prompt, or several of which the first that is there does; `messages` is
            taken where there is no `prompt`. The other fields of a nested prompt become columns `{column}_{field}`,
            unless the row has such a column.
        skip_bad: leave bad rows out and count them, instead of raising at the first.
        empty: take empty texts, which no prompt may be and a completion can.

    Raises:
        UserError: the source cannot be read, a row is bad, or no row is left; in one line, with the place.
    """
    name, raw = _read(source, split)
    if not raw:
        raise UserError(f"{name}: there are no rows in it; give it at least one prompt")
    names = dict.fromkeys(key for _, row in raw if isinstance(row, dict) for key in row)
    wanted = [column] if isinstance(column, str) else [*column]
    known = [each for each in (*wanted, *(["messages"] if "prompt" in wanted else [])) if each in names]
    if names and not known:
        raise UserError(
            f"{name}: no column {' or '.join(map(repr, wanted))}; the columns are {_listed(names)}; name one"
        )
    chosen = (known or wanted)[0]
    results = [row if isinstance(row, _Bad) else _check_row(row, chosen, empty) for _, row in raw]
    locations = [location for location, _ in raw]
    reasons = _reasons(name, locations, results, skip_bad)
    rows: list[Any] = [("", {}) if reason else row for row, reason in zip(results, reasons, strict=True)]
    names = dict.fromkeys(key for _, others in rows for key in others)
    columns = {key: [others.get(key) for _, others in rows] for key in names}
    return Prompts([prompt for prompt, _ in rows], columns, locations).without(reasons)


def _reasons(name: str, locations: Sequence[str], results: Sequence[Any], skip_bad: bool) -> list[str | None]:
    """Why each result is left out, None where it is not; without `skip_bad` the first such reason is raised."""
    for location, bad in zip(locations, results, strict=True):
        if isinstance(bad, _Bad) and not skip_bad:
            remedy = f"{bad.remedy}, or leave such rows out with --skip_bad_prompts"
            raise UserError(f"{location}: {bad.found}; {remedy}")
    reasons = [result.reason if isinstance(result, _Bad) else None for result in results]
    if all(reasons):
        counts = dict(Counter(reasons))
        raise UserError(f"{name}: no prompt is left, rows left out: {counts}; give at least one good row")
    return reasons


def _check_row(row: object, column: str, empty: bool) -> tuple[str | list[dict], dict] | _Bad:
    """The row's prompt and its other columns."""
    if isinstance(row, str):
        row = {column: row}
    if not isinstance(row, dict):
        return _Bad("not an object", f"the row is {_show(row)}", "give an object with a prompt")
    if column not in row:
        return _Bad("no prompt", f"no {column!r} among {_listed(row)}", "give the row a prompt")
    others = {key: value for key, value in row.items() if key != column}
    prompt = row[column]
    if isinstance(prompt, dict):
        if "text" not in prompt:
            return _Bad("wrong type", f"a prompt object without 'text': {_show(prompt)}", "give it a 'text'")
        for key, value in prompt.items():
            if key != "text":
                others.setdefault(f"{column}_{key}", value)
        prompt = prompt["text"]
    return _problem(prompt, empty) or (prompt, others)


def _problem(prompt: object, empty: bool = False) -> _Bad | None:
    if prompt is None:
        return _Bad("no prompt", "the prompt is null", "give it text")
    if isinstance(prompt, str):
        texts = [prompt]
    elif not isinstance(prompt, list):
        return _Bad("wrong type", f"the prompt is {_show(prompt)}", "give a string or a list of messages")
    elif prompt and all(map(_is_message, prompt)):
        texts = [message["content"] for message in prompt]
    else:
        wanted = 'give a list of {"role": "…", "content": "…"} with string values'
        return _Bad("malformed messages", f"malformed chat messages {_show(prompt)}", wanted)
    if not empty and not any(text.strip() for text in texts):
        return _Bad("empty prompt", f"the prompt is empty: {_show(prompt)}", "give it text")
    if any(map(_SURROGATE.search, texts)):
        return _Bad("lone surrogate", f"half a character in {_show(prompt)}", "give text that UTF-8 can hold")
    return None


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _length_problem(ids: list[int], max_length: int) -> _Bad | None:
    if not ids:
        return _Bad("no tokens", "the prompt gives no tokens", "use text that the tokenizer knows")
    if len(ids) > max_length:
        return _Bad("too long", f"{len(ids)} tokens, limit {max_length}", "shorten it, raise the limit")
    return None


def _show(value: object, width: int = 60) -> str:
    text = " ".join(repr(value).splitlines())
    return text if len(text) <= width else text[: width - 3] + "..."


def _listed(names: Iterable[object]) -> str:
    return _show(list(names), 200)[1:].removesuffix("]") or "none"


def _one_line(error: BaseException) -> str:
    if "while generating the dataset" in str(error) and error.__cause__:
        error = error.__cause__  # the one that says what is wrong
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _encode_texts(tokenizer: Any, texts: list[Any]) -> Iterator[list[int]]:
    # The mask tells an EOS that the tokenizer added from one that the text itself ends with.
    encoded = tokenizer(texts, return_special_tokens_mask=True, verbose=False)
    for ids, added in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
        if all(added):
            yield []  # nothing of the text came through
        else:
            yield ids[:-1] if added[-1] and ids[-1] == tokenizer.eos_token_id else ids


def _encode_chats(tokenizer: Any, chats: list[Any]) -> list[Any]:
    try:
        tokenizer.get_chat_template()
    except ValueError as error:
        what = "the prompts are chat messages and the tokenizer has no chat template"
        raise UserError(f"{what}; give prompts as text, or a tokenizer with a chat template") from error
    try:
        return tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=False)
    except (TemplateError, TypeError, ValueError) as error:
        if middle := len(chats) // 2:  # find out which
            return _encode_chats(tokenizer, chats[:middle]) + _encode_chats(tokenizer, chats[middle:])
        found = f"the chat template refuses {_show(chats[0])} ({_one_line(error)})"
        return [_Bad("refused by the chat template", found, "change the messages")]


def _read(source: Any, split: str) -> tuple[str, list[_Row]]:
    """What to call the source in messages, and its rows."""
    if isinstance(source, (list, tuple)):
        return "the list", [(f"row {i} of the list", row) for i, row in enumerate(source, 1)]
    if not isinstance(source, (str, os.PathLike)):
        return _dataset_rows("the data set", source, split)
    name = os.path.expanduser(os.fspath(source))
    path = Path(name)
    reader = _READERS.get(path.suffix.lower())
    if not os.path.exists(name):
        path_like = not isinstance(source, str) or name.startswith((".", "/", "~")) or "\\" in name
        if path_like or reader or not name:
            raise UserError(f"{name or repr(name)}: no such file{_nearest(path)}; give one that exists")
    if not os.path.isfile(name):
        return _dataset_rows(name, _load_dataset(name, split), split)
    if not reader:
        raise UserError(f"{name}: unknown suffix {path.suffix!r}; give one of {_listed(_READERS)}")
    try:
        if not path.stat().st_size:
            raise UserError(f"{name}: the file is empty; give it at least one prompt")
        return name, list(reader(path))
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({_one_line(error)}); give a file that can") from error


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f", nor a directory {str(path.parent)!r}"
    near = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)
    return f" (did you mean {str(path.parent / near[0])!r}?)" if near else ""


def _load_dataset(name: str, split: str) -> Any:
    import datasets

    is_directory = os.path.isdir(name)
    try:
        if os.path.exists(f"{name}/state.json") or os.path.exists(f"{name}/dataset_dict.json"):
            return datasets.load_from_disk(name)
        # Absolute, because load_dataset("csv") means a format even where a directory is called so.
        names = [os.path.abspath(name)] if is_directory else name.split(":", 1)  # NAME, or NAME:CONFIGURATION
        return datasets.load_dataset(*names, split=split)
    except Exception as error:  # formats, network and hub fail in all ways; each is told with its cause
        what = "the directory" if is_directory else "no such file, and the hub"
        found = f"{_show(name, 200)}: {what} gives no split {split!r} ({_one_line(error)})"
        raise UserError(f"{found}; give a prompt file, a data set's directory or its name") from error


def _dataset_rows(name: str, dataset: Any, split: str) -> tuple[str, list[_Row]]:
    import datasets

    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise UserError(f"{name}: no split {split!r}; the splits are {_listed(dataset)}; name one")
        name, dataset = f"{name} ({split})", dataset[split]
    if not isinstance(dataset, datasets.Dataset):
        wanted = "a path, a data set's name, a datasets.Dataset (not a streamed one) or a list"
        raise UserError(f"prompts cannot be read from a {type(dataset).__name__}; give {wanted}")
    return name, [(f"row {i} of {name}", row) for i, row in enumerate(_decode(dataset), 1)]


def _decode(dataset: Any) -> list:
    try:
        return dataset.to_list()
    except UnicodeDecodeError as error:
        if len(dataset) == 1:
            return [_not_utf8(error.object[error.start])]
        halves = [dataset.shard(2, i, contiguous=True) for i in range(2)]  # find out which row
        return _decode(halves[0]) + _decode(halves[1])


def _parquet(path: Path) -> list[_Row]:
    import datasets
    import pyarrow.parquet

    try:  # by way of `datasets`, which stores columns of mixed types as JSON that Arrow alone does not decode
        dataset = datasets.Dataset(pyarrow.parquet.ParquetFile(path).read())
    except (pyarrow.ArrowException, ValueError) as error:
        remedy = "write it again, as Parquet of plain types"
        raise UserError(f"{path}: cannot be read ({_one_line(error)}); {remedy}") from error
    return _dataset_rows(str(path), dataset, split="")[1]


def _not_utf8(byte: int) -> _Bad:
    return _Bad("not UTF-8", f"byte 0x{byte:02x} is not UTF-8", "save the text as UTF-8")


def _lines(path: Path) -> list[tuple[str, str, _Bad | None]]:
    """Each line's location and text, and what is wrong where it is not UTF-8."""
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}: the file is UTF-16; save it as UTF-8")
    # A byte that is not UTF-8 becomes a surrogate, which UTF-8 proper never gives.
    lines = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff").split("\n")
    found = [None if line.isascii() else _SURROGATE.search(line) for line in lines]
    bad = [_not_utf8(ord(match.group()) - 0xDC00) if match else None for match in found]
    locations = [f"{path}:{number}" for number in range(1, len(lines) + 1)]
    return list(zip(locations, lines, bad, strict=True))[: None if lines[-1] else -1]


def _text(path: Path) -> list[_Row]:
    return [(location, bad or line.removesuffix("\r")) for location, line, bad in _lines(path)]


def _jsonl(path: Path) -> list[_Row]:
    return [(location, bad or _json_object(line)) for location, line, bad in _lines(path) if line.strip()]


def _json_object(line: str) -> dict | _Bad:
    remedy = "write one JSON object a line"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return _Bad("malformed JSON", f"malformed JSON {_show(line)} ({_one_line(error)})", remedy)
    return row if isinstance(row, dict) else _Bad("not an object", f"not a JSON object: {_show(row)}", remedy)


def _csv(path: Path) -> Iterator[_Row]:
    lines = _lines(path)
    at = 0  # lines read so far

    def rest() -> Iterator[str]:
        nonlocal at
        while at < len(lines):
            at += 1
            yield lines[at - 1][1] + "\n"

    header: list[str] = []
    reader = csv.reader(rest(), strict=True)
    while at < len(lines):
        first = at
        try:
            fields, error = next(reader), None
        except csv.Error as malformed:
            fields, error = [], malformed
            # A quote left open takes in all that follows: go on behind its line, or good rows are lost.
            at, reader = first + 1, csv.reader(rest(), strict=True)
        location, line, bad = next((each for each in lines[first:at] if each[2]), lines[first])
        if error and not bad:
            found = f"malformed CSV {_show(line)} ({error})"
            bad = _Bad("malformed CSV", found, "close the quotes and double those inside")
        elif header and fields and not bad and len(fields) != len(header):
            found = f"{len(fields)} fields where the header has {len(header)}: {_show(line)}"
            bad = _Bad("wrong field count", found, "quote text that contains commas")
        if not header and (bad or len(set(fields)) < len(fields)):
            raise UserError(f"{location}: {bad.found if bad else 'two columns of one name'}; mend the header")
        if header and (bad or fields):  # neither on a blank line
            yield location, bad or dict(zip(header, fields, strict=True))
        header = header or fields


_READERS: dict[str, Callable[[Path], Iterable[_Row]]] = {
    ".jsonl": _jsonl,
    ".json": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _text,
}
