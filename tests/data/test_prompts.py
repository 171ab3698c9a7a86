"""Prompts: every source is read, and each bad row is reported in one line with its location."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.errors import error_message
from helpers.files import write
from helpers.prompt_helpers import (
    CHAT,
    TWO_LINES,
    TWO_ROWS,
    byte_tokenizer,
    save_dataset_dict,
    save_jsonl_directory,
    save_parquet,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quarkrl.data.prompts import Prompts, load_prompts
from quarkrl.errors import UserError

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def write_csv(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


# Good sources


SOURCES = {
    "jsonl": lambda d: write(d / "p.jsonl", TWO_LINES),
    "json": lambda d: write(d / "p.json", '{"prompt": "one", "n": 1}\n{"prompt": "two", "n": 2}'),
    "parquet": save_parquet,
    "dataset": lambda d: datasets.Dataset.from_dict(TWO_ROWS),
    "list of dicts": lambda d: [{"prompt": "one", "n": 1}, {"prompt": "two", "n": 2}],
}


def save_dataset(directory: Path) -> Path:
    datasets.Dataset.from_dict(TWO_ROWS).save_to_disk(directory / "saved")
    return directory / "saved"


SOURCES |= {
    "save_to_disk": save_dataset,
    "save_to_disk, dict": save_dataset_dict,
    "load_dataset directory": save_jsonl_directory,
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_each_source_gives_the_same_prompts_and_columns(make, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = make(tmp_path)
    prompts = load_prompts(source)
    assert (prompts.prompts, prompts.columns) == (["one", "two"], {"n": [1, 2]})
    assert len(prompts) == 2 and len(prompts.locations) == 2
    assert prompts.skipped == {} and prompts.ids == []
    if isinstance(source, Path):
        assert load_prompts(str(source)) == prompts


def test_csv_and_text(tmp_path):
    table = write(tmp_path / "p.csv", "prompt,n\none,1\n\ntwo,2\n")
    prompts = load_prompts(table)
    assert (prompts.prompts, prompts.columns) == (["one", "two"], {"n": ["1", "2"]})  # CSV has no types
    assert prompts.locations == [f"{table}:2", f"{table}:4"]
    text = write(tmp_path / "p.txt", "one\n  two, and \n")
    assert load_prompts(text).prompts == ["one", "  two, and "]
    assert load_prompts(text).columns == {}
    assert load_prompts(["one", "two"]).prompts == load_prompts(("one", "two")).prompts == ["one", "two"]


def test_locations_name_physical_lines_and_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl", '\n{"prompt": "a"}\n   \n{"prompt": "b"}\n\n')
    assert load_prompts("train.jsonl").locations == ["train.jsonl:2", "train.jsonl:4"]
    write(tmp_path / "p.csv", 'n,prompt\r\n1,"two\r\nlines"\r\n2,x\r\n')
    multi = load_prompts("p.csv")
    assert (multi.prompts, multi.locations) == (["two\r\nlines", "x"], ["p.csv:2", "p.csv:4"])
    assert load_prompts(save_dataset_dict(tmp_path), split="test").locations == [f"row 1 of {tmp_path}/saved (test)"]
    assert load_prompts(["a", "b"]).locations == ["row 1 of the list", "row 2 of the list"]


def test_splits(tmp_path):
    saved = save_dataset_dict(tmp_path)
    assert load_prompts(saved, split="test").prompts == ["three"]
    assert load_prompts(datasets.load_from_disk(saved), split="test").columns == {"n": [3]}
    error_message(lambda: load_prompts(saved, split="valid"), "saved", "no split 'valid'", "'train', 'test'")
    files = save_jsonl_directory(tmp_path)
    error_message(lambda: load_prompts(files, split="valid"), "files", "'valid'", "train")


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_line_ends_bom_and_unicode_separators(tmp_path, ending, bom):
    texts = ["a\u2028b", "c\u0085d\x0be", "f\x1cg\u2029"]
    dumped = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    for name, lines in {"p.txt": texts, "p.jsonl": dumped, "p.csv": ["prompt", *texts]}.items():
        for last in ("", ending):
            path = write(tmp_path / name, bom + ending.join(lines) + last)
            assert load_prompts(path).prompts == texts


def test_nested_prompts_give_columns(tmp_path):
    rows = [
        {"prompt": {"text": "a", "toxicity": 0.5, "threat": None}, "continuation": {"text": "b"}},
        {"prompt": {"text": "c", "insult": 1}, "prompt_insult": "mine"},
        {"prompt": "d"},
    ]
    prompts = load_prompts(write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows))))
    assert prompts.prompts == ["a", "c", "d"]
    assert prompts.columns == {
        "continuation": [{"text": "b"}, None, None],
        "prompt_toxicity": [0.5, None, None],
        "prompt_threat": [None, None, None],
        "prompt_insult": [None, "mine", None],
    }
    again = load_prompts([{"q": {"text": "a", "n": 1}}], column="q")
    assert (again.prompts, again.columns) == (["a"], {"q_n": [1]})


def test_columns_of_skipped_rows_are_removed():
    prompts = load_prompts([{"prompt": "", "x": 1}, {"prompt": "b", "y": 2}, {"prompt": "c"}], skip_bad=True)
    assert prompts.columns == {"y": [2, None]} and prompts.skipped == {"empty prompt": 1}


def test_column_names():
    assert load_prompts([{"text": "a", "prompt": "b"}], column="text").columns == {"prompt": ["b"]}
    assert load_prompts([{"messages": CHAT, "n": 1}]) == Prompts([CHAT], {"n": [1]}, ["row 1 of the list"])
    both = load_prompts([{"prompt": "a", "messages": CHAT}])
    assert (both.prompts, both.columns) == (["a"], {"messages": [CHAT]})
    error_message(lambda: load_prompts([{"text": "a", "n": 1}]), "no column 'prompt'", "'text', 'n'")
    error_message(lambda: load_prompts([{"messages": CHAT}], column="q"), "no column 'q'", "'messages'")
    many = {f"column_{i}": 0 for i in range(200)}
    error_message(lambda: load_prompts([many]), "'column_0', 'column_1'")


def test_messages_from_files_and_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = write(tmp_path / "p.jsonl", json.dumps({"prompt": CHAT}) + '\n{"prompt": "text"}\n')
    assert load_prompts(path).prompts == [CHAT, "text"]
    dataset = datasets.Dataset.from_list([{"prompt": CHAT}])
    assert load_prompts(dataset).prompts == [CHAT]
    dataset.to_parquet(tmp_path / "p.parquet")
    assert load_prompts(tmp_path / "p.parquet").prompts == [CHAT]
    # Text and messages in one column: `datasets` stores them as JSON, and they come back as they were.
    (tmp_path / "mixed").mkdir()
    path.rename(tmp_path / "mixed" / "train.jsonl")
    assert load_prompts(tmp_path / "mixed").prompts == [CHAT, "text"]
    mixed = datasets.load_dataset(str(tmp_path / "mixed"), split="train")
    mixed.to_parquet(tmp_path / "mixed.parquet")
    assert load_prompts(tmp_path / "mixed.parquet").prompts == [CHAT, "text"]


def test_a_selected_and_formatted_dataset():
    dataset = datasets.Dataset.from_dict({"prompt": list("abcd"), "n": range(4)})
    dataset = dataset.select([3, 1]).with_format("numpy")
    prompts = load_prompts(dataset)
    assert (prompts.prompts, prompts.columns) == (["d", "b"], {"n": [3, 1]})


# Bad rows: a good one stands on each side of the bad one, on lines 1 and 3


JSONL = {
    b'{"prompt": ""}': ("empty prompt", "empty: ''"),
    b'{"prompt": " \\n\\t "}': ("empty prompt", r"' \n\t '"),
    b'{"prompt": null}': ("no prompt", "null"),
    b'{"text": "a"}': ("no prompt", "no 'prompt' among 'text'"),
    b"{}": ("no prompt", "among none"),
    b'{"prompt": 5}': ("wrong type", "the prompt is 5"),
    b'{"prompt": true}': ("wrong type", "True"),
    b'{"prompt": {"toxicity": 1}}': ("wrong type", "without 'text'"),
    b'{"prompt": {"text": null}}': ("no prompt", "null"),
    b'{"prompt": {"text": 7}}': ("wrong type", "the prompt is 7"),
    b'{"prompt": []}': ("malformed messages", "[]"),
    b'{"prompt": ["a"]}': ("malformed messages", "['a']"),
    b'{"prompt": [{"role": "user"}]}': ("malformed messages", '"content"'),
    b'{"prompt": [{"role": "user", "content": 5}]}': ("malformed messages", "5"),
    b'{"prompt": [{"role": null, "content": "a"}]}': ("malformed messages", "None"),
    b'{"prompt": [{"role": "user", "content": " "}]}': ("empty prompt", "empty"),
    b'{"prompt": "a",}': ("malformed JSON", "column"),
    b'{"prompt": "a"} {"prompt": "b"}': ("malformed JSON", "Extra data"),
    b"just text": ("malformed JSON", "'just text'"),
    b"[" * 100_000: ("malformed JSON", "[[[…"),
    b'["prompt"]': ("not an object", "['prompt']"),
    b"null": ("not an object", "None"),
    b'{"prompt": "a\xff"}': ("not UTF-8", "0xff"),
    b'{"prompt": "\xed\xa0\x80"}': ("not UTF-8", "0xed"),
    b'{"prompt": "a\\ud800"}': ("lone surrogate", r"\ud800"),
    b'{"prompt": "a\nb"}': None,  # split into two malformed lines: see below
}


@pytest.mark.parametrize("line", [line for line, wanted in JSONL.items() if wanted], ids=lambda x: repr(x[:40]))
def test_bad_jsonl_line(tmp_path, line):
    reason, found = JSONL[line]
    path = write(tmp_path / "bad.jsonl", b'{"prompt": "a"}\n' + line + b'\n{"prompt": "c"}\n')
    message = error_message(lambda: load_prompts(path), "bad.jsonl:2: ", found, "--skip_bad_prompts")
    assert len(message) < 400
    prompts = load_prompts(path, skip_bad=True)
    assert (prompts.prompts, prompts.skipped) == (["a", "c"], {reason: 1})
    assert prompts.locations == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize(
    ("row", "reason", "found"),
    [
        ("", "empty prompt", "''"),
        (None, "not an object", "None"),
        (3, "not an object", "3"),
        ({"prompt": float("nan")}, "wrong type", "nan"),
        ({"prompt": b"bytes"}, "wrong type", "b'bytes'"),
        ({"prompt": "x" * 1000 + "\udc80"}, "lone surrogate", "xxx…"),
        ({"prompt": [{"role": "user", "content": "\ud800"}]}, "lone surrogate", r"\ud800"),
    ],
)
def test_bad_row_in_memory(row, reason, found):
    rows = [{"prompt": "a"}, row, {"prompt": "c"}]
    error_message(lambda: load_prompts(rows), "row 2 of the list: ", found, "--skip_bad_prompts")
    prompts = load_prompts(rows, skip_bad=True)
    assert (prompts.prompts, prompts.skipped) == (["a", "c"], {reason: 1})


@pytest.mark.parametrize(
    ("body", "line", "reason", "found"),
    [
        (b"a,1\nb\nc,3\n", 3, "wrong field count", "1 fields where the header has 2: 'b'"),
        (b"a,1\nb,2,3\nc,3\n", 3, "wrong field count", "Quote text that contains commas"),
        (b"a,1\n,2\nc,3\n", 3, "empty prompt", "''"),
        (b'a,1\n"b"x,2\nc,3\n', 3, "malformed CSV", "Close the quotes"),
        (b'a,1\n"b,2\nc,3\n', 3, "malformed CSV", "unexpected end of data"),  # c is not swallowed
        (b'a,1\n"b,2\nc,3', 3, "malformed CSV", "unexpected end of data"),
        (b"a,1\nb\xff,2\nc,3\n", 3, "not UTF-8", "0xff"),
        (b'a,1\n"x\ny\n\xe9z",2\nc,3\n', 5, "not UTF-8", "0xe9"),  # the line of the byte, not the record's
        (b'a,1\n"\n ",2\nc,3\n', 3, "empty prompt", r"'\n '"),
    ],
)
def test_bad_csv_record(tmp_path, body, line, reason, found):
    path = write(tmp_path / "bad.csv", b"prompt,n\n" + body)
    error_message(lambda: load_prompts(path), f"bad.csv:{line}: ", found, "--skip_bad_prompts")
    prompts = load_prompts(path, skip_bad=True)
    assert (prompts.prompts, prompts.columns) == (["a", "c"], {"n": ["1", "3"]})
    assert prompts.skipped == {reason: 1}


def test_an_open_quote_over_the_csv_field_limit_loses_no_row(tmp_path):
    rows = "".join(f"prompt number {i}\n" for i in range(20_000))  # 360 KB; Python's field limit is 128 KB
    path = write(tmp_path / "bad.csv", 'prompt\n"open\n' + rows)
    prompts = load_prompts(path, skip_bad=True)
    assert len(prompts) == 20_000 and prompts.skipped == {"malformed CSV": 1}
    assert prompts.locations[0] == f"{path}:3"


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"text,n\na,1\n", "no column 'prompt'; must be one of 'text', 'n'"),
        (b"prompt,prompt\na,1\n", ":1: two columns have the same name"),
        (b"prompt\xff,n\na,1\n", ":1: byte 0xff"),
        (b'"prompt\na\n', ":1: malformed CSV"),
        (b"prompt,n\n", "no rows"),
        (b"\n\n", "no rows"),
    ],
)
def test_bad_csv_file(tmp_path, data, found):
    path = write(tmp_path / "bad.csv", data)
    error_message(lambda: load_prompts(path, skip_bad=True), "bad.csv", found)


@pytest.mark.parametrize(
    ("data", "line", "reason"),
    [
        (b"a\n\nc\n", 2, "empty prompt"),
        (b"a\r\n\r\nc\r\n", 2, "empty prompt"),
        (b"a\nc\n\n", 3, "empty prompt"),  # one trailing line end is the file's, two are an empty line
        (b"a\n \t\nc", 2, "empty prompt"),
        (b"a\n\xe9t\xe9\nc\n", 2, "not UTF-8"),
    ],
)
def test_bad_text_line(tmp_path, data, line, reason):
    path = write(tmp_path / "bad.txt", data)
    error_message(lambda: load_prompts(path), f"bad.txt:{line}: ", "--skip_bad_prompts")
    prompts = load_prompts(path, skip_bad=True)
    assert (prompts.prompts, prompts.skipped) == (["a", "c"], {reason: 1})


def invalid_strings() -> pa.Array:
    """ "a", two bytes that are not UTF-8, "c"."""
    offsets = pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0\4\0\0\0")
    return pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"a\xff\xfec"))


@pytest.mark.parametrize(
    ("values", "reason", "found"),
    [
        (pa.array(["a", None, "c"]), "no prompt", "null"),
        (pa.array(["a", " ", "c"]), "empty prompt", "' '"),
        (invalid_strings(), "not UTF-8", "0xff"),
        (pa.array(["a", "", "c"]).dictionary_encode(), "empty prompt", "''"),
    ],
)
def test_bad_parquet_row(tmp_path, values, reason, found):
    pq.write_table(pa.table({"prompt": values}), tmp_path / "bad.parquet")
    source = tmp_path / "bad.parquet"
    error_message(lambda: load_prompts(source), "row 2 of ", "bad.parquet: ", found, "--skip_bad_prompts")
    prompts = load_prompts(source, skip_bad=True)
    assert (prompts.prompts, prompts.skipped) == (["a", "c"], {reason: 1})
    assert prompts.locations == [f"row 1 of {source}", f"row 3 of {source}"]


def test_the_first_bad_row_is_named_and_all_are_counted(tmp_path):
    path = write(tmp_path / "p.jsonl", '{"prompt": "a"}\n{"prompt": ""}\nx\ny\n{"prompt": "b\nb"}\n')
    error_message(lambda: load_prompts(path), "p.jsonl:2")
    assert load_prompts(path, skip_bad=True).skipped == {"empty prompt": 1, "malformed JSON": 4}


@pytest.mark.parametrize("rows", [["", " "], [None], [{"prompt": ""}, {"prompt": None}]])
def test_no_row_left(rows):
    error_message(lambda: load_prompts(rows, skip_bad=True), "the list", "no prompt is left (rows skipped: ")


# Files


def damaged_parquet(directory: Path) -> Path:
    good = SOURCES["parquet"](directory)
    return write(directory / "damaged.parquet", good.read_bytes()[:-20])


def empty_saved(directory: Path) -> Path:
    return write(save_dataset(directory) / "state.json", "{").parent


FILES = {
    "empty jsonl": (lambda d: write(d / "e.jsonl", ""), "e.jsonl: the file is empty"),
    "empty parquet": (lambda d: write(d / "e.parquet", ""), "e.parquet: the file is empty"),
    "blank jsonl": (lambda d: write(d / "b.jsonl", "\n\n"), "b.jsonl: there are no rows"),
    "only a BOM": (lambda d: write(d / "b.txt", "\ufeff"), "b.txt: there are no rows"),
    "damaged UTF-16": (
        lambda d: write(d / "u.txt", "a".encode("utf-16")[:-1]),
        "u.txt: the file is damaged UTF-16. Save it as UTF-8.",
    ),
    "unknown suffix": (
        lambda d: write(d / "p.xlsx", "a"),
        "p.xlsx: unknown suffix '.xlsx'; must be one of '.jsonl'",
    ),
    "no suffix": (lambda d: write(d / "prompts", "a"), "unknown suffix ''"),
    "not Parquet": (lambda d: write(d / "p.parquet", "a" * 100), "p.parquet: cannot be read"),
    "damaged Parquet": (damaged_parquet, "damaged.parquet: cannot be read"),
    "no data set": (lambda d: d, "the directory has no split 'train'"),
    "damaged data set": (empty_saved, "saved': the directory has no split"),
    "missing": (lambda d: d / "zzz.jsonl", "zzz.jsonl: no such file. Provide"),
    "missing, string": (lambda d: str(d / "zzz"), "zzz: no such file. Provide"),
    "missing, relative": (lambda d: "./zzz", "./zzz: no such file"),
    "missing, Windows": (lambda d: "data\\zzz", "data\\zzz: no such file"),
    "missing, suffix": (lambda d: "owner/zzz.csv", "no such file, and no directory 'owner'"),
    "missing directory": (lambda d: d / "nowhere" / "p.jsonl", "and no directory"),
    "nothing": (lambda d: "", "'': no such file"),
    "None": (lambda d: None, "not NoneType"),
    "number": (lambda d: 5, "not int"),
    "stream": (
        lambda d: datasets.Dataset.from_list([{"prompt": "a"}]).to_iterable_dataset(),
        "must be finite here, not of type IterableDataset",
    ),
    "empty list": (lambda d: [], "the list: there are no rows"),
    "empty data set": (lambda d: datasets.Dataset.from_dict({"prompt": []}), "there are no rows"),
}


@pytest.mark.parametrize(("make", "found"), FILES.values(), ids=FILES)
def test_bad_source(tmp_path, monkeypatch, make, found):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = make(tmp_path)
    for skip_bad in (False, True):
        error_message(lambda skip_bad=skip_bad: load_prompts(source, skip_bad=skip_bad), found)


def test_a_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "train.jsonl", "")
    error_message(lambda: load_prompts(tmp_path / "trian.jsonl"), "trian.jsonl: no such file", "train.jsonl'?")


def test_a_bad_line_in_a_directory_of_files_tells_its_cause(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(save_jsonl_directory(tmp_path) / "train.jsonl", '{"prompt": "a"}\n{"prompt": "b\n')
    message = error_message(lambda: load_prompts(tmp_path / "files"), "JSON")
    assert "while generating" not in message


def test_a_directory_beats_a_format_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    save_jsonl_directory(tmp_path).rename(tmp_path / "csv")
    assert load_prompts("csv").prompts == ["one", "two"]


@pytest.mark.parametrize("name", ["nobody/no-such-data-set", "imdbb", "Once upon\na time", "x" * 5000, "a\0b"])
def test_a_hub_name_that_cannot_be_had_fails_at_once(monkeypatch, name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # read at import, hence the two below as well
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network is used"))
    error_message(
        lambda: load_prompts(name), repr(name)[:50], "no such file, the hub cannot be reached (HF_HUB_OFFLINE is set)"
    )


# Properties


def readable(text: str) -> bool:
    return bool(text.strip())


# No NUL: the csv module of Python 3.10 refuses it.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
brief = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@brief
@given(rows=st.lists(texts.filter(readable), min_size=1, max_size=5))
def test_any_text_comes_back_from_every_format(tmp_path, rows):
    lines = [json.dumps({"prompt": text}, ensure_ascii=len(text) % 2 == 0) for text in rows]
    write(tmp_path / "p.jsonl", "\n".join(lines))
    write_csv(tmp_path / "p.csv", [["n", "prompt"], *(["x", text] for text in rows)])
    pq.write_table(pa.table({"prompt": rows}), tmp_path / "p.parquet")
    sources = [tmp_path / "p.jsonl", tmp_path / "p.csv", tmp_path / "p.parquet", rows]
    if not any("\n" in text or text.endswith("\r") for text in rows) and not rows[0].startswith("\ufeff"):
        sources.append(write(tmp_path / "p.txt", "".join(text + "\n" for text in rows)))
    for source in sources:
        assert load_prompts(source).prompts == rows


bad_lines = st.sampled_from([line for line in JSONL if len(line) < 100])


@brief
@given(rows=st.lists(st.one_of(texts.filter(readable), bad_lines), min_size=1, max_size=8))
def test_skip_bad_never_loses_a_good_row(tmp_path, rows):
    good = [row for row in rows if isinstance(row, str)]
    lines = [json.dumps({"prompt": row}).encode() if isinstance(row, str) else row for row in rows]
    path = write(tmp_path / "p.jsonl", b"\n".join(lines))
    if not good:
        error_message(lambda: load_prompts(path, skip_bad=True))
        return
    prompts = load_prompts(path, skip_bad=True)
    assert prompts.prompts == good
    physical = sum(len(line.split(b"\n")) for line in lines)
    assert len(prompts) + sum(prompts.skipped.values()) == physical
    numbers = [int(location.rsplit(":", 1)[1]) for location in prompts.locations]
    assert [json.loads(path.read_bytes().split(b"\n")[n - 1])["prompt"] for n in numbers] == good
    for row in (path, rows):
        if len(good) < len(rows):
            error_message(lambda row=row: load_prompts(row))


plain = st.text(st.characters(exclude_categories=["Cs"], exclude_characters='"\r\n,\0'), min_size=1, max_size=20)
broken = ['"open', '"a"b', "one,two", "", '"a""', " ", ","]


@brief
@given(rows=st.lists(st.one_of(plain.filter(readable), st.sampled_from(broken)), min_size=1, max_size=8))
def test_skip_bad_never_loses_a_good_csv_row_behind_a_broken_one(tmp_path, rows):
    path = write(tmp_path / "p.csv", "prompt\n" + "".join(row + "\n" for row in rows))
    good = [row for row in rows if row not in broken]
    try:
        kept = load_prompts(path, skip_bad=True).prompts
    except UserError:
        kept = []
    assert kept == good


# Real data


@pytest.mark.parametrize(
    ("name", "column", "count"),
    [
        ("realtoxicityprompts.train.jsonl", "prompt", 3496),
        ("realtoxicityprompts.test.jsonl", "prompt", 500),
        ("writingprompts.test.jsonl", "prompt", 1000),
        ("movie_sentences.jsonl", "text", 8541),
    ],
)
def test_real_data(name, column, count):
    if not (DATA / name).exists():
        pytest.skip(f"{name} is not here")
    prompts = load_prompts(DATA / name, column=column)
    assert len(prompts) == count and prompts.skipped == {}
    assert prompts.locations[-1].endswith(f"{name}:{count}")
    if name.startswith("real"):
        assert len(prompts.columns["prompt_toxicity"]) == count
        assert {type(value) for value in prompts.columns["prompt_toxicity"]} <= {float, int, type(None)}
        assert "text" in prompts.columns["continuation"][0]
        encoded = prompts.encode(byte_tokenizer("<s> $A"), max_length=10_000)
        assert all(re.fullmatch(r"\d+", str(ids[0])) and ids[0] == 0 for ids in encoded.ids)
