"""JSON files, and values that JSON cannot hold."""

from __future__ import annotations

import json
import math

from helpers.files import files_of

from quarkrl.storage.json import nan_to_null, write_json


def test_a_json_file_is_written_atomically_and_readable(tmp_path):
    write_json(tmp_path / "run.json", {"name": "naïve", "values": [1, 2.5, None]})
    text = (tmp_path / "run.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"name": "naïve", "values": [1, 2.5, None]}
    assert "naïve" in text and files_of(tmp_path) == {"run.json"}


def test_nan_and_infinity_become_null_at_any_depth():
    value = {"a": math.nan, "b": [1.0, math.inf, {"c": (-math.inf, 2)}], "d": "nan"}
    assert nan_to_null(value) == {"a": None, "b": [1.0, None, {"c": [None, 2]}], "d": "nan"}
