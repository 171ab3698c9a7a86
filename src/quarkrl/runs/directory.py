"""A run's directory: who holds it, which run it is of, and whether that run can go on here."""

import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from transformers import TrainerCallback

from quarkrl.errors import UserError
from quarkrl.runs.checkpoints import find_damage, last_good_checkpoint, list_checkpoints, step_of
from quarkrl.storage.atomic import atomic_file, clean_up, report_write_errors
from quarkrl.storage.json import write_json

RUN_FILE, LOCK_FILE = "run.json", "run.lock"


@dataclass(frozen=True)
class RunIdentity:
    """What the result of a run depends on.

    Attributes:
        facts: the content of run.json: options by name under "options", digests, rewards, versions.
        fixed: names of the options that may not change even if a run branches off from a checkpoint.
    """

    facts: dict[str, Any]
    fixed: frozenset[str] = frozenset()


@contextmanager
def locked(directory: str | os.PathLike) -> Iterator[None]:
    """Lock a run's directory. The operating system releases the lock when the process ends, however it ends.

    Raises:
        UserError: another process holds it, or the directory cannot be written.
    """
    directory = Path(directory)
    with report_write_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        # One lock for a directory in a process, counted: `quarkrl train` takes it, and so does the trainer in it.
        lock = FileLock(directory.resolve() / LOCK_FILE, is_singleton=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"output_dir {str(directory)!r} is in use by another run: wait for its end, or choose another"
            ) from None
    try:
        yield
    finally:
        lock.release()


def holds_run(directory: Path) -> bool:
    """Whether a run has left something here that a new one would mix with."""
    return any((directory / name).exists() for name in ("pool", "final")) or bool(list_checkpoints(directory))


def opened(directory: Path, identity: RunIdentity, resume: bool | str | None) -> tuple[Path | None, list[str], bool]:
    """Start a run in a directory, or find the checkpoint from which its run resumes.

    Args:
        directory: the run's own; held by this process.
        identity: that of the run that wants to be in it.
        resume: False or None for a new run, True for the last good checkpoint, or a checkpoint's directory. A run with
            other options may branch from a named directory.

    Returns:
        The checkpoint, None for the beginning; what there is to say; and whether options have changed.

    Raises:
        UserError: the directory holds a run already, or none; or another one, or a damaged one.
    """
    path, facts = directory / RUN_FILE, identity.facts
    if not resume:
        if holds_run(directory):
            raise UserError(
                f"output_dir {str(directory)!r} already holds a run: choose another, or go on with it by --resume "
                "(resume_from_checkpoint=True)"
            )
        write_json(path, facts)
        return None, [], False
    if not path.exists():
        if holds_run(directory):
            raise UserError(f"{path} is missing, so that nobody can tell which run this was: want it back, to resume")
        raise UserError(f"output_dir {str(directory)!r} holds no run: nothing to resume; start one without --resume")
    for folder in (directory, directory / "pool"):
        clean_up(folder)
    was = _read(path)
    changed, others, notes = _compared(was, facts)
    branches = isinstance(resume, str) and not others and not changed.keys() & identity.fixed
    if (changed or others) and not branches:
        raise UserError(
            f"{str(directory)!r} holds another run ({'; '.join([*changed.values(), *others])}): resume with what it "
            "began with, or choose another output_dir"
        )
    if isinstance(resume, str):
        checkpoint: Path | None = Path(resume)
        if wrong := find_damage(Path(resume)):
            raise UserError(f"resume_from_checkpoint {resume!r}: {wrong}; want a checkpoint that is whole")
        if changed:
            aside = _set_aside(directory, Path(resume), was["options"]["steps_per_iteration"])
            notes.append(f"from here on {', '.join(changed.values())}; what had come after is in {aside}")
    else:
        checkpoint, damaged = last_good_checkpoint(directory)
        notes += [f"left out {text}" for text in damaged]
    write_json(path, facts)
    return checkpoint, notes, bool(changed)


def _set_aside(directory: Path, checkpoint: Path, steps_per_iteration: int) -> Path:
    """Move what a run left after a checkpoint out of the way of another that begins there; says where to."""
    step = step_of(checkpoint)
    begun = -(-step // steps_per_iteration)
    later = [path for path in list_checkpoints(directory) if step_of(path) > step]
    for path in (directory / "pool").glob("*-[0-9][0-9][0-9][0-9][0-9][0-9]*"):
        if int(path.stem.rpartition("-")[2]) >= begun:
            later.append(path)
    aside = next(path for n in itertools.count(1) if not (path := directory / f"aside-{n}").exists())
    aside.mkdir()
    for path in later:
        os.rename(path, aside / path.name)
    return aside


def _read(path: Path) -> dict[str, Any]:
    try:
        was = json.loads(path.read_text(encoding="utf-8"))
        dicts = [was[name] for name in ("options", "versions")] + was["rewards"]
        if all(isinstance(value, dict) for value in dicts) and "steps_per_iteration" in was["options"]:
            return was
        error: Exception = ValueError("it lacks what quarkrl writes")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as found:
        error = found
    raise UserError(f"{path} is damaged ({error}): nobody can tell which run this was; want it back, to resume")


def _compared(was: dict[str, Any], now: dict[str, Any]) -> tuple[dict[str, str], list[str], list[str]]:
    """How a run differs from what it was: options by name, other things, and what does no harm."""
    before, after = was["options"], now["options"]
    differ = [name for name in before if name in after and before[name] != after[name]]
    changed = {name: f"{name} was {_short(before[name])}, is {_short(after[name])}" for name in differ}
    kinds = {"model": "model", "reference": "reference model", "prompts": "prompts", "adapter": "adapter"}
    others = [f"other {what}" for name, what in kinds.items() if was.get(name) != now[name]]
    notes = []
    if [_settled(one) for one in was["rewards"]] != [_settled(one) for one in now["rewards"]]:
        others.append(f"rewards were {_short(was['rewards'])}, are {_short(now['rewards'])}")
    elif was["rewards"] != now["rewards"]:
        notes.append("the source of a reward has changed since")
    for name, version in now["versions"].items():
        if was["versions"].get(name) != version:
            notes.append(f"{name} was {was['versions'].get(name)}, is {version}: the same to rounding only")
    if was.get("num_iterations") != now["num_iterations"]:
        lengths = f"num_iterations was {was.get('num_iterations')}, is {now['num_iterations']}"
        notes.append(f"{lengths}: the learning rate follows the new length from here on")
    return changed, others, notes


def _settled(reward: dict[str, Any]) -> dict[str, Any]:
    """Of a reward's identity, what may not change: a plain function's source may, for it to be mended."""
    return {name: reward[name] for name in ("name", "weight")} if "qualname" in reward else reward


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


class ConfigFile(TrainerCallback):
    """Writes a run's options to `config.yaml` in its directory, once it is clear that it may begin.

    Args:
        options: as given by flags and file.
    """

    def __init__(self, options: dict[str, Any]):
        self.options = {name: value for name, value in options.items() if not name.startswith("resume")}

    def on_train_begin(self, args, state, control, **_):
        """Write the file, in the first process."""
        if state.is_world_process_zero:
            with atomic_file(Path(args.output_dir) / "config.yaml") as file:
                file.write(yaml.safe_dump(self.options, sort_keys=False).encode())
