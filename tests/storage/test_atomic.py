"""Atomic files and directories: whole or unchanged after an error, and write errors in one line."""

from __future__ import annotations

import hashlib
import os
import stat

import pytest
import torch
from helpers.files import files_of
from safetensors.torch import save_file

from quarkrl.errors import UserError
from quarkrl.storage import atomic
from quarkrl.storage.atomic import (
    atomic_directory,
    atomic_file,
    clean_up,
    remove_directory,
    replace_directory,
    report_write_errors,
    sha256,
    write_text,
)


def test_the_digest_of_several_files_is_that_of_one_with_all_their_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"12")
    (tmp_path / "b").write_bytes(b"3")
    assert sha256(tmp_path / "a", tmp_path / "b") == hashlib.sha256(b"123").hexdigest()
    assert sha256(tmp_path / "b") == hashlib.sha256(b"3").hexdigest()


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), atomic_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and files_of(tmp_path) == {"file"}
    with atomic_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and files_of(tmp_path) == {"file"}


def test_a_directory_is_whole_or_as_it_was(tmp_path):
    target = tmp_path / "final"
    for content in ("old", "new"):
        with atomic_directory(target) as made:
            (made / "file").write_text(content)
    with pytest.raises(ZeroDivisionError), atomic_directory(target) as made:
        (made / "other").write_text("half")
        raise ZeroDivisionError
    assert files_of(tmp_path) == {"final/file"} and (target / "file").read_text() == "new"


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_whenever_a_directory_is_replaced_one_of_both_is_there_afterwards(tmp_path, monkeypatch, renames):
    for name, content in {"checkpoint-3": "old", "_saving.tmp/checkpoint-3": "new"}.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text(content)
    left, rename = iter([True] * renames), os.rename

    def cut_off(*paths):
        if not next(left, False):
            raise KeyboardInterrupt
        rename(*paths)

    monkeypatch.setattr(atomic.os, "rename", cut_off)
    try:
        replace_directory(tmp_path / "_saving.tmp/checkpoint-3", tmp_path / "checkpoint-3")
    except KeyboardInterrupt:
        assert renames < 2
    monkeypatch.undo()
    clean_up(tmp_path)
    assert files_of(tmp_path) == {"checkpoint-3/file"}
    assert (tmp_path / "checkpoint-3/file").read_text() == ("new" if renames == 2 else "old")


def test_a_directory_is_renamed_before_it_is_removed(tmp_path, monkeypatch):
    for name in ("checkpoint-3/model", "checkpoint-3/training/optimizer"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.setattr(
        atomic.shutil, "rmtree", lambda path, **_: (path / "model").unlink(missing_ok=True)
    )  # Half of it.
    remove_directory(tmp_path / "checkpoint-3")
    monkeypatch.undo()
    assert not (tmp_path / "checkpoint-3").exists()
    clean_up(tmp_path)
    assert files_of(tmp_path) == set()


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors
        Exception("No space left on device (os error 28)"),  # tokenizers
        OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),  # pyarrow
    ],
)
def test_a_full_disk_gives_the_same_message_from_every_library(error):
    with pytest.raises(UserError) as caught, report_write_errors("run/checkpoint-3"):
        raise error
    assert str(caught.value).startswith("'run/checkpoint-3' cannot be written: no space left on device. ")


def test_other_errors_are_left_alone():
    with pytest.raises(ValueError, match="shapes differ"), report_write_errors("run"):
        raise ValueError("shapes differ")


def test_files_that_differ_only_in_their_suffix_do_not_share_a_temporary_file(tmp_path):
    with atomic_file(tmp_path / "results.json") as one, atomic_file(tmp_path / "results.parquet") as other:
        one.write(b"1")
        other.write(b"2")
    assert (tmp_path / "results.json").read_bytes() == b"1" and (tmp_path / "results.parquet").read_bytes() == b"2"


def test_text_is_written_as_utf_8_with_its_line_feeds(tmp_path):
    write_text(tmp_path / "text", "naïve ☃\n")
    assert (tmp_path / "text").read_bytes() == "naïve ☃\n".encode()


def test_a_directory_that_does_not_exist_is_reported_with_the_file(tmp_path):
    with pytest.raises(UserError, match="cannot be written: no such file or directory") as caught:
        write_text(tmp_path / "missing" / "file", "")
    assert str(tmp_path / "missing" / "file") in str(caught.value)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_who_can_read_the_directory_can_read_its_files(tmp_path, umask, mode):
    previous = os.umask(umask)
    try:
        with atomic_directory(tmp_path / "final") as stage:
            save_file({"a": torch.zeros(2)}, stage / "model.safetensors")
            (stage / "part").mkdir()
            (stage / "part" / "text").write_text("x")
    finally:
        os.umask(previous)
    for name in ("model.safetensors", "part/text"):
        assert stat.S_IMODE((tmp_path / "final" / name).stat().st_mode) == mode
