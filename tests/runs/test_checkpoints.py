"""Checkpoints and states: no pickle, damage is detected and reported, and a full disk loses nothing."""

from __future__ import annotations

import os
import pickle
import random
import resource
import shutil
import subprocess
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.files import files_of
from helpers.killed_runs import SHORT, Trap, assert_same, assert_same_run, in_a_process, run, short_run, trainer_of

from quarkrl.errors import UserError
from quarkrl.runs.checkpoints import (
    find_damage,
    last_good_checkpoint,
    rotate,
    seal,
)
from quarkrl.runs.records import list_checkpoints, step_of
from quarkrl.runs.states import load_state, random_states, restore_random_states, save_state
from quarkrl.storage.json import write_json

# States, without pickle


def test_a_state_comes_back_as_it_was(tmp_path):
    state = {
        "state": {0: {"step": torch.tensor(3.0), "m": torch.arange(6.0).view(2, 3).T}, 7: {}},
        "groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 7], "foreach": None, "inf": float("inf")}],
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "tensor": "a word that means something",
        "dict": [1, True, OrderedDict(a=(1, (2,)))],
        (1, 2): np.float64(0.1),
    }
    save_state(tmp_path / "training/s.safetensors", state)
    assert_same(load_state(tmp_path / "training/s.safetensors"), state)
    with pytest.raises(TypeError, match="state of type function"):
        save_state(tmp_path / "f.safetensors", {"f": len.__class__ and (lambda: 0)})


def test_random_generators_go_on_where_they_were(tmp_path):
    torch.rand(3), random.gauss(0, 1), np.random.standard_normal(3)
    save_state(tmp_path / "r.safetensors", random_states())
    expected = torch.rand(4), random.gauss(0, 1), np.random.standard_normal(5)
    restore_random_states(load_state(tmp_path / "r.safetensors"))
    found = torch.rand(4), random.gauss(0, 1), np.random.standard_normal(5)
    assert torch.equal(found[0], expected[0]) and found[1] == expected[1] and found[2].tolist() == expected[2].tolist()


def test_a_damaged_state_is_named(tmp_path):
    path = tmp_path / "s.safetensors"
    save_state(path, {"a": torch.ones(3)})
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"s.safetensors: not a state that quarkrl wrote"):
        load_state(path)
    with pytest.raises(UserError, match="not a state"):
        load_state(tmp_path / "none.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return short_run(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def copied(tmp_path, whole) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def again(directory: Path, **options) -> None:
    resume = options.pop("resume", True)
    trainer = trainer_of(directory, **{**SHORT, **options})
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_final()


def test_a_run_writes_no_pickle_and_resuming_reads_none(copied, whole, monkeypatch):
    kinds = {Path(name).suffix for name in files_of(whole)}
    assert kinds <= {".md", ".json", ".jsonl", ".jinja", ".safetensors", ".parquet", ".lock"}
    for name in files_of(whole):
        content = (whole / name).read_bytes()
        # A pickle of protocol 2 and later, a zip as torch writes it, and its old format.
        assert (
            not content.startswith((b"\x80", b"PK")) and b"torch._utils" not in content and b"data.pkl" not in content
        )

    def read(*_, **__):
        raise AssertionError("something is unpickled")

    for owner, name in ((torch, "load"), (pickle, "load"), (pickle, "Unpickler")):
        monkeypatch.setattr(owner, name, read)
    shutil.rmtree(copied / "checkpoint-4")
    shutil.rmtree(copied / "final")
    again(copied)
    assert_same_run(copied, whole)


# Damage


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("harm", [flip, shorten, Path.unlink], ids=lambda harm: harm.__name__)
def test_harm_to_any_file_of_a_checkpoint_is_found(whole, tmp_path, harm):
    names = sorted(files_of(whole / "checkpoint-4"))
    assert find_damage(whole / "checkpoint-4") is None and "training/process-0.safetensors" in names
    for name in names:
        checkpoint = Path(shutil.copytree(whole / "checkpoint-4", tmp_path / "checkpoint-4", dirs_exist_ok=True))
        harm(checkpoint / name)
        found = find_damage(checkpoint)
        assert found is not None and (name in found or name == "manifest.json")


def test_a_damaged_checkpoint_is_skipped_with_a_note_and_the_run_ends_the_same(copied, whole, capsys):
    flip(copied / "checkpoint-4/model.safetensors")
    again(copied)
    said = " ".join(capsys.readouterr().err.split())
    assert f"resumed {copied} from iteration 2/2, step 2/4" in said
    assert "skipped checkpoint-4: model.safetensors is damaged" in said
    assert_same_run(copied, whole)


def test_where_no_checkpoint_is_whole_the_run_is_refused(copied):
    flip(copied / "checkpoint-4/training/optimizer.safetensors")
    shorten(copied / "checkpoint-2/trainer_state.json")
    with pytest.raises(
        UserError, match=r"every checkpoint is damaged \(checkpoint-4: .* damaged.*; checkpoint-2: .* bytes, expected "
    ):
        again(copied)
    with pytest.raises(UserError, match=r"checkpoint-2': trainer_state.json has [\d,]+ bytes, expected [\d,]+"):
        again(copied, resume=str(copied / "checkpoint-2"))


def test_a_damaged_sample_file_is_named(copied):
    shorten(copied / "pool/iteration-000000.parquet")
    with pytest.raises(UserError, match=r"iteration-000000.parquet: must be an undamaged pool file with reward"):
        again(copied)


def test_a_damaged_run_file_is_named(copied):
    shorten(copied / "run.json")
    with pytest.raises(UserError, match=r"run.json is damaged .*Restore it"):
        again(copied)


def test_rotation_keeps_the_checkpoints_that_the_options_name(tmp_path):
    def made(*steps: int) -> None:
        for step in steps:
            (tmp_path / f"checkpoint-{step}").mkdir(exist_ok=True)
        (tmp_path / "checkpoint-best").mkdir(exist_ok=True)  # Somebody else's.

    def left() -> list[int]:
        return [step_of(path) for path in list_checkpoints(tmp_path)]

    made(2, 10, 9)
    rotate(tmp_path, None, set())
    assert left() == [2, 9, 10]
    rotate(tmp_path, 2, {tmp_path / "checkpoint-2"})
    assert left() == [2, 10]
    made(20)
    rotate(tmp_path, 1, {tmp_path / "checkpoint-2", tmp_path / "checkpoint-10"})  # The best, and the one just saved.
    assert left() == [2, 10]
    assert (tmp_path / "checkpoint-best").exists()


def test_the_last_good_checkpoint_is_the_latest_that_is_whole(tmp_path):
    assert last_good_checkpoint(tmp_path) == (None, [])
    for step in (9, 10):
        save_state(tmp_path / f"checkpoint-{step}/training/optimizer.safetensors", {})
        write_json(tmp_path / f"checkpoint-{step}/trainer_state.json", {})
        seal(tmp_path / f"checkpoint-{step}")
    assert last_good_checkpoint(tmp_path)[0] == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-11").mkdir()
    good, wrong = last_good_checkpoint(tmp_path)
    assert good == tmp_path / "checkpoint-10" and wrong[0].startswith("checkpoint-11: it has no manifest.json")
    (tmp_path / "checkpoint-10/training/optimizer.safetensors").unlink()
    seal(tmp_path / "checkpoint-10")
    good, wrong = last_good_checkpoint(tmp_path)
    assert good == tmp_path / "checkpoint-9" and "checkpoint-10: it has no optimizer state (save_only_model)" in wrong


# A full disk


class Limit(Trap):
    """Limits the size of files instead of a kill. It begins after the trainer has tried to save its model."""

    def __init__(self, largest: int):
        super().__init__()
        self.largest = largest

    def set(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.largest, resource.RLIM_INFINITY))


def limited(directory: Path, resume: bool, largest: int, options: dict) -> int:
    """A run whose files may have so many bytes; a larger one is refused as by a disk that is full."""
    try:
        run(directory, resume, Limit(largest), options)
    except UserError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        os.write(1, f"\nerror: {error}".encode())
        return 2
    return 0


@pytest.mark.parametrize("largest", [200, 4_000, 20_000])  # Too little for run.json, a table, the model's weights.
def test_a_failed_write_is_one_error_and_the_run_resumes_once_there_is_space(tmp_path, whole, largest):
    code, said = in_a_process(limited, tmp_path / "run", False, largest, SHORT)
    assert code == 2, said
    assert "cannot be written: file too large." in said.splitlines()[-1]
    code, said = in_a_process(run, tmp_path / "run", (tmp_path / "run/run.json").exists(), None, SHORT)
    assert code == 0, said
    assert_same_run(tmp_path / "run", whole)


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of its own at `tmp_path/run`, of so many bytes; more with a second call."""
    place = tmp_path / "run"
    place.mkdir()

    def mount(size: int) -> None:
        options = f"size={size}" + (",remount" if os.path.ismount(place) else "")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")

    if shutil.which("mount") is None:
        pytest.skip("there is no mount here")
    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_again_and_again_loses_nothing(tmp_path, whole, small_disk):
    used = sum((whole / name).stat().st_size for name in files_of(whole))
    directory, seen, size = tmp_path / "run", set(), used // 16
    for _ in range(12):
        small_disk(size)
        resume = (directory / "run.json").exists()
        code, said = in_a_process(limited, directory, resume, resource.RLIM_INFINITY, SHORT)
        if code == 0:
            break
        assert code == 2 and "no space left on device." in said.splitlines()[-1], said
        seen.add(said.splitlines()[-1].split("'")[1])
        size += used // 4
    assert code == 0 and len(seen) > 1, seen  # It has failed in several places.
    assert_same_run(directory, whole)
