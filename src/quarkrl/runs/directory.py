"""The directory of a run: its lock, the identity of the run in it, and the checkpoint from which it resumes."""

import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from filelock import FileLock, Timeout
from transformers import TrainerCallback

from quarkrl.errors import UserError
from quarkrl.models.quark_json import read_quark_json
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
        # Reentrant within a process: `quarkrl train` takes the lock, and so does the trainer that it creates.
        lock = FileLock(directory.resolve() / LOCK_FILE, is_singleton=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"output_dir {str(directory)!r} is in use by another run. Wait for its end, or set another."
            ) from None
    try:
        yield
    finally:
        lock.release()


def holds_run(directory: Path) -> bool:
    """Return whether the directory has samples, checkpoints or a final model of a run."""
    return any((directory / name).exists() for name in ("pool", "final")) or bool(list_checkpoints(directory))


def model_of_run(path: str | os.PathLike, form: Literal["final", "checkpoint"]) -> str:
    """Return the directory of a run's trained model; a path that is no run's directory is returned as it is.

    Args:
        path: the directory of a run, or of a model, or a model's name on the hub.
        form: "final" for `final/`. "checkpoint" for the checkpoint with its weights, which need not be the last.
            Without `final/`, both are the last checkpoint.

    Raises:
        UserError: the run has no such checkpoint.
    """
    run = Path(path)
    if not holds_run(run):
        return os.fspath(path)
    final = run / "final"
    if not final.is_dir():
        checkpoint, _ = last_good_checkpoint(run)
        if checkpoint is None:
            raise UserError(f"model {str(path)!r}: must hold final/ or a checkpoint. Resume its run.")
        return str(checkpoint)
    if form == "final":
        return str(final)
    iterations = (read_quark_json(final) or {}).get("iterations")
    for checkpoint in list_checkpoints(run):
        if (read_quark_json(checkpoint) or {}).get("iterations") == iterations:
            return str(checkpoint)
    raise UserError(
        f"model {str(path)!r}: must hold the checkpoint of final/, and it was not kept. Name another checkpoint, or "
        "use --merge."
    )


def open_run(directory: Path, identity: RunIdentity, resume: bool | str | None) -> tuple[Path | None, list[str], bool]:
    """Start a run in a directory, or find the checkpoint from which its run resumes.

    Args:
        directory: the run's directory, locked by this process.
        identity: the identity of the run that starts or resumes.
        resume: False or None for a new run, True for the last good checkpoint, or a checkpoint's directory. A run with
            other options may branch from a named directory.

    Returns:
        The checkpoint, or None to start at the beginning; notes for the user; whether options have changed.

    Raises:
        UserError: a new run finds an old one, or a resumed run finds none, another one or a damaged one.
    """
    if not resume:
        check_no_run(directory)
        write_json(directory / RUN_FILE, identity.facts)
        return None, [], False
    saved = _read_run_file(directory)
    for folder in (directory, directory / "pool"):
        clean_up(folder)
    changed, differences, notes = _compare(saved, identity.facts)
    can_branch = isinstance(resume, str) and not differences and not changed.keys() & identity.fixed
    if (changed or differences) and not can_branch:
        raise UserError(
            f"output_dir {str(directory)!r}: must hold the run to resume, but holds another "
            f"({'; '.join([*changed.values(), *differences])}). Resume with the same options, or set another "
            "--output_dir."
        )
    if isinstance(resume, str):
        checkpoint: Path | None = Path(resume)
        if damage := find_damage(Path(resume)):
            raise UserError(f"resume_from_checkpoint {resume!r}: {damage}. Set an undamaged checkpoint.")
        if changed:
            aside = _set_aside(directory, Path(resume), saved["options"]["steps_per_iteration"])
            notes.append(f"from here on {', '.join(changed.values())}; later files were moved to {aside}")
    else:
        checkpoint, damaged = last_good_checkpoint(directory)
        notes += [f"skipped {text}" for text in damaged]
    write_json(directory / RUN_FILE, identity.facts)
    return checkpoint, notes, bool(changed)


def recorded_fact(directory: Path, name: str) -> Any:
    """Return a fact of the identity of the run in a directory; None if it has none, or none that can be read."""
    try:
        return json.loads((directory / RUN_FILE).read_text(encoding="utf-8")).get(name)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # `open_run` reports a damaged file.


def check_no_run(directory: Path) -> None:
    """Check that a directory holds no run.

    Raises:
        UserError: it does.
    """
    if holds_run(directory):
        raise UserError(
            f"output_dir {str(directory)!r}: must not hold a run already. Set another --output_dir, or resume the run "
            "with --resume (resume_from_checkpoint=True)."
        )


def _set_aside(directory: Path, checkpoint: Path, steps_per_iteration: int) -> Path:
    """Move what a run wrote after a checkpoint into a folder of its own, and return the folder."""
    step = step_of(checkpoint)
    iterations_begun = -(-step // steps_per_iteration)
    later = [path for path in list_checkpoints(directory) if step_of(path) > step]
    for path in (directory / "pool").glob("*-[0-9][0-9][0-9][0-9][0-9][0-9]*"):
        if int(path.stem.rpartition("-")[2]) >= iterations_begun:
            later.append(path)
    aside = next(path for n in itertools.count(1) if not (path := directory / f"aside-{n}").exists())
    aside.mkdir()
    for path in later:
        os.rename(path, aside / path.name)
    return aside


def _read_run_file(directory: Path) -> dict[str, Any]:
    """Read the identity of the run in a directory.

    Raises:
        UserError: there is no run, or its file is missing or damaged.
    """
    path = directory / RUN_FILE
    if not path.exists():
        if holds_run(directory):
            raise UserError(f"{path} is missing, so the run cannot be identified. Restore it to resume.")
        raise UserError(f"output_dir {str(directory)!r}: must hold a run to resume. Start one without --resume.")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        dicts = [saved[name] for name in ("options", "versions")] + saved["rewards"]
        if all(isinstance(value, dict) for value in dicts) and "steps_per_iteration" in saved["options"]:
            return saved
        error: Exception = ValueError("an entry is missing")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as caught:
        error = caught
    raise UserError(f"{path} is damaged ({error}), so the run cannot be identified. Restore it to resume.")


def _compare(saved: dict[str, Any], now: dict[str, Any]) -> tuple[dict[str, str], list[str], list[str]]:
    """Compare two identities.

    Returns:
        The options that differ, by name; other differences that prevent resuming; differences that do not.
    """
    before, after = saved["options"], now["options"]
    names = [name for name in before if name in after and before[name] != after[name]]
    changed = {name: f"{name} was {_to_short_json(before[name])}, is {_to_short_json(after[name])}" for name in names}
    kinds = {"model": "model", "reference": "reference model", "prompts": "prompts", "adapter": "adapter"}
    differences = [f"other {kind}" for name, kind in kinds.items() if saved.get(name) != now[name]]
    notes = []
    if [_unchangeable(one) for one in saved["rewards"]] != [_unchangeable(one) for one in now["rewards"]]:
        rewards = _to_short_json(saved["rewards"]), _to_short_json(now["rewards"])
        differences.append(f"rewards were {rewards[0]}, are {rewards[1]}")
    elif saved["rewards"] != now["rewards"]:
        notes.append("the source of a reward has changed since")
    for name, version in now["versions"].items():
        if saved["versions"].get(name) != version:
            notes.append(f"{name} was {saved['versions'].get(name)}, is {version}: results are equal to rounding only")
    if saved.get("num_iterations") != now["num_iterations"]:
        lengths = f"num_iterations was {saved.get('num_iterations')}, is {now['num_iterations']}"
        notes.append(f"{lengths}: the learning rate follows the new length from here on")
    return changed, differences, notes


def _unchangeable(reward: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a reward's identity that may not change. The source of a plain function may."""
    return {name: reward[name] for name in ("name", "weight")} if "qualname" in reward else reward


def _to_short_json(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


class ConfigFile(TrainerCallback):
    """Writes the options of a run to `config.yaml` in its directory, once the run may begin.

    Args:
        options: the options from flags and file.
    """

    def __init__(self, options: dict[str, Any]):
        self.options = {name: value for name, value in options.items() if not name.startswith("resume")}

    def on_train_begin(self, args, state, control, **_):
        """Write the file, in the first process."""
        if state.is_world_process_zero:
            with atomic_file(Path(args.output_dir) / "config.yaml") as file:
                file.write(yaml.safe_dump(self.options, sort_keys=False).encode())
