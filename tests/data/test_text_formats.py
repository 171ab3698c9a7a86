"""Text formats that people have: JSON arrays, gzip, tabs, semicolons, UTF-16, and columns of any size and kind."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import json
from functools import partial

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.errors import error_message
from helpers.files import write
from helpers.prompt_helpers import CHAT, byte_tokenizer

from quarkrl.data.prompts import Prompts, load_prompts
from quarkrl.data.readers import TextStream
from quarkrl.data.stream import PromptStream

ROWS = [{"prompt": "one, two", "n": 1}, {"prompt": "naïve ☃", "n": 2}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)

TEXTS = {
    "p.json": json.dumps(ROWS),
    "pretty.json": json.dumps(ROWS, indent=2),
    "blank.json": f"\n\n {json.dumps(ROWS)}\n\n",
    "lines.json": JSONL,
    "p.jsonl": JSONL,
    "comma.csv": 'prompt,n\n"one, two",1\nnaïve ☃,2\n',
    "semicolon.csv": "prompt;n\none, two;1\nnaïve ☃;2\n",
    "n-first.csv": "n;prompt\n1;one, two\n2;naïve ☃\n",
    "bar.csv": "prompt|n\none, two|1\nnaïve ☃|2\n",
    "tab.csv": "prompt\tn\none, two\t1\nnaïve ☃\t2\n",
    "excel.csv": "sep=;\nprompt;n\none, two;1\nnaïve ☃;2\n",
    "p.tsv": "prompt\tn\none, two\t1\nnaïve ☃\t2\n",
    "p.TSV": 'prompt\tn\n"one, two"\t1\n"naïve ☃"\t2\n',
}


def is_same(prompts) -> bool:
    return prompts.prompts == ["one, two", "naïve ☃"] and [*map(int, prompts.columns["n"])] == [1, 2]


@pytest.mark.parametrize(("name", "text"), TEXTS.items(), ids=TEXTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_each_format_in_each_encoding_plain_and_compressed(tmp_path, name, text, encoding, ending):
    data = text.replace("\n", ending).encode(encoding)
    assert is_same(load_prompts(write(tmp_path / name, data)))
    assert is_same(load_prompts(write(tmp_path / f"{name}.gz", gzip.compress(data))))
    assert is_same(load_prompts(write(tmp_path / name, gzip.compress(data))))  # Compressed, under the plain name.


def test_text_lines_in_each_encoding(tmp_path):
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le"):
        bom = "\ufeff" if encoding == "utf-16-le" else ""
        data = f"{bom}one, two\r\nnaïve ☃\r\n".encode(encoding)
        assert load_prompts(write(tmp_path / "p.txt", data)).prompts == ["one, two", "naïve ☃"]
        assert load_prompts(write(tmp_path / "p.txt.gz", gzip.compress(data))).prompts == ["one, two", "naïve ☃"]
        assert load_prompts(TextStream("standard input", data)).locations == ["standard input:1", "standard input:2"]


def test_an_array_may_hold_texts_and_names_its_bad_rows(tmp_path):
    path = write(tmp_path / "p.json", json.dumps(["a", {"prompt": "b"}, {"prompt": ""}, 3]))
    error_message(lambda: load_prompts(path), f"row 3 of {path}: the prompt is empty", "--skip_bad_prompts")
    prompts = load_prompts(path, skip_bad=True)
    assert (prompts.prompts, prompts.skipped) == (["a", "b"], {"empty prompt": 1, "not an object": 1})
    assert prompts.locations == [f"row 1 of {path}", f"row 2 of {path}"]
    assert load_prompts(write(tmp_path / "p.json", '{\n "prompt": "a"\n}')).prompts == ["a"]


def test_the_separator_is_that_of_the_header_not_of_the_texts(tmp_path):
    assert load_prompts(write(tmp_path / "p.csv", "prompt\na;b;c\n")).prompts == ["a;b;c"]
    prompts = load_prompts(write(tmp_path / "p.csv", 'prompt,a;b\n"x;y;z",1\n'))
    assert (prompts.prompts, prompts.columns) == (["x;y;z"], {"a;b": ["1"]})


def test_a_column_of_any_size(tmp_path):
    large = "x" * 1_000_000  # Python's csv module reads fields of 128 KB by default.
    limit = csv.field_size_limit()
    prompts = load_prompts(write(tmp_path / "p.csv", f"prompt,other\na,{large}\n"))
    assert (prompts.prompts, prompts.columns) == (["a"], {"other": [large]})
    assert csv.field_size_limit() == limit
    source = write(tmp_path / "p.json", json.dumps([{"prompt": "a", "other": large}]))
    assert load_prompts(source).columns == {"other": [large]}


def test_parquet_with_columns_of_any_kind(tmp_path):
    columns = {
        "prompt": pa.array(["a"]),
        "decimal": pa.array([decimal.Decimal("1.50")]),
        "date": pa.array([datetime.date(2026, 11, 26)]),
        "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
        "bytes": pa.array([b"\xff\x00"]),
        "nested": pa.array([{"deep": [{"x": 1}]}]),
        "nothing": pa.nulls(1),
        "large": pa.array(["y" * 300_000], pa.large_string()),
        "words": pa.array(["w"]).dictionary_encode(),
    }
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    prompts = load_prompts(tmp_path / "p.parquet")
    assert prompts.prompts == ["a"]
    assert {name: values[0] for name, values in prompts.columns.items()} == {
        "decimal": decimal.Decimal("1.50"),
        "date": datetime.date(2026, 11, 26),
        "map": [("k", 1)],
        "bytes": b"\xff\x00",
        "nested": {"deep": [{"x": 1}]},
        "nothing": None,
        "large": "y" * 300_000,
        "words": "w",
    }


def call(**arguments: object) -> dict:
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


def test_a_chat_is_the_same_from_every_source(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    chats = [
        [*CHAT, call(city="Rome"), CHAT[1]],
        [*CHAT, call(unit="km"), {"role": "tool", "content": "3", "name": "f"}],
        CHAT,
    ]
    lines = write(tmp_path / "p.jsonl", "".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    pq.write_table(pa.table({"messages": chats, "n": [None, None, 1]}), tmp_path / "p.parquet")
    dataset = datasets.Dataset.from_list([{"messages": chat} for chat in chats])
    for source in (lines, tmp_path / "p.parquet", dataset):
        assert load_prompts(source).prompts == chats
    encode = partial(Prompts.encode, tokenizer=byte_tokenizer(None, "{{ messages[-1].content }}x"), max_length=99)
    assert PromptStream(dataset.to_iterable_dataset(), encode, group_size=3, skip_bad=False).group(0).prompts == chats
    assert load_prompts(tmp_path / "p.parquet").columns == {"n": [None, None, 1]}  # Other columns keep their nulls.


def test_parquet_with_chats_as_nested_structs(tmp_path):
    pq.write_table(pa.table({"messages": [CHAT], "meta": [{"source": {"name": "x"}}]}), tmp_path / "p.parquet")
    prompts = load_prompts(tmp_path / "p.parquet")
    assert (prompts.prompts, prompts.columns) == ([CHAT], {"meta": [{"source": {"name": "x"}}]})
