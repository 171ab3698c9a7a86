"""`quark.json`: written atomically, read back, and refused in one line when it is damaged."""

from __future__ import annotations

import json
import os

import pytest

from quarkrl.errors import UserError
from quarkrl.models.quark_json import read_quark_json, reference_name, write_quark_json


def test_facts_are_read_as_they_were_written(tmp_path):
    write_quark_json(tmp_path, {"reward": "toxicity", "edges": (0.1, 0.2), "name": "güte"})
    assert (
        read_quark_json(tmp_path)
        == read_quark_json(str(tmp_path))
        == {
            "reward": "toxicity",
            "edges": [0.1, 0.2],
            "name": "güte",
        }
    )
    assert [path.name for path in tmp_path.iterdir()] == ["quark.json"]


def test_the_file_is_strict_json_for_people_to_read(tmp_path):
    write_quark_json(tmp_path, {"edges": [float("nan"), float("-inf"), 0.5], "kl": {"mean": float("inf")}})
    text = (tmp_path / "quark.json").read_text(encoding="utf-8")
    assert text.startswith('{\n  "edges": [\n    null,\n    null,\n    0.5') and text.endswith("}\n")
    assert json.loads(text) == {"edges": [None, None, 0.5], "kl": {"mean": None}}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_quark_json(tmp_path, {"step": 1})

    def no_space(_file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match=r"quark\.json.*no space left on device"):
        write_quark_json(tmp_path, {"step": 2})
    assert read_quark_json(tmp_path) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["quark.json"]


def test_a_model_that_quark_did_not_train_has_no_facts_and_no_reference(tmp_path):
    assert read_quark_json(tmp_path) is None and reference_name(tmp_path) is None


NOT_AN_OBJECT = {
    "empty": b"",
    "truncated": b'{"conditioning": {"attributes": ["rew',
    "not UTF-8": b"\xff\xfe\x00",
    "a list": b"[]",
    "a word": b'"a"',
    "too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", NOT_AN_OBJECT.values(), ids=NOT_AN_OBJECT)
def test_a_file_that_is_not_a_json_object_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "quark.json").write_bytes(content)
    with pytest.raises(UserError, match=r"quark\.json is damaged") as caught:
        read_quark_json(tmp_path)
    assert str(tmp_path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ({"reference": {"name": "gpt2", "sha256": "00"}}, "gpt2"),
        ({"reference": {"name": None}}, None),
        ({"reference": {}}, None),
        ({"reference": None}, None),
        ({}, None),
    ],
    ids=str,
)
def test_the_reference_is_named_where_the_file_names_it(tmp_path, facts, name):
    write_quark_json(tmp_path, facts)
    assert reference_name(tmp_path) == name


@pytest.mark.parametrize("reference", ["gpt2", [1], 3, {"name": 3}, {"name": ["gpt2"]}], ids=str)
def test_a_reference_of_another_form_is_refused(tmp_path, reference):
    write_quark_json(tmp_path, {"reference": reference})
    with pytest.raises(UserError, match=r"quark\.json is damaged \(reference"):
        reference_name(tmp_path)
