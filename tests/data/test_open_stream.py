"""Streams that the command opens: JSONL and Parquet files, directories, saved data sets."""

from __future__ import annotations

import gzip

import datasets
import pytest
from helpers.errors import error_message
from helpers.files import write
from helpers.prompt_helpers import TWO_LINES, save_dataset_dict, save_jsonl_directory, save_parquet

from quarkrl.data.readers import open_stream

SOURCES = {
    "jsonl": lambda d: write(d / "p.jsonl", TWO_LINES),
    "jsonl.gz": lambda d: write(d / "p.jsonl.gz", gzip.compress(TWO_LINES.encode())),
    "parquet": save_parquet,
    "directory": save_jsonl_directory,
    "saved": save_dataset_dict,
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_each_source_is_streamed(make, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    stream = open_stream(str(make(tmp_path)), "train")
    assert isinstance(stream, datasets.IterableDataset)
    assert [*stream] == [{"prompt": "one", "n": 1}, {"prompt": "two", "n": 2}]
    assert not [*(tmp_path / "cache").rglob("*.arrow")]  # Nothing was copied.


def test_the_column_of_the_prompt_is_renamed(tmp_path):
    path = write(tmp_path / "p.jsonl", '{"text": "one"}\n')
    assert [*open_stream(str(path), "train", "text")] == [{"prompt": "one"}]
    error_message(lambda: open_stream(str(path), "train", "nope"), "no column 'nope'", "Set --prompt_column text")


def test_what_cannot_be_streamed_is_one_line(tmp_path):
    text = write(tmp_path / "p.txt", "one\n")
    error_message(lambda: open_stream(str(text), "train"), "stream_prompts ", "'.jsonl', '.parquet'")
    error_message(lambda: open_stream(str(tmp_path / "no.jsonl"), "train"), "no.jsonl: no such file")
    error_message(lambda: open_stream(str(save_jsonl_directory(tmp_path)), "valid"), "no split 'valid'")
    error_message(lambda: open_stream(str(save_dataset_dict(tmp_path)), "valid"), "must be one of 'train', 'test'")
