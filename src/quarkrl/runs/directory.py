"""The directory of a run: its lock, the identity of the run in it, and the checkpoint from which it resumes."""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import yaml
from filelock import FileLock, Timeout
from transformers import TrainerCallback

from quarkrl.errors import UserError
from quarkrl.models.quark_json import read_quark_json
from quarkrl.runs.checkpoints import find_damage, last_good_checkpoint
from quarkrl.runs.records import (
    LOCK_FILE,
    OPTIONS_FILE,
    RUN_FILE,
    check_no_run,
    check_resumable,
    holds_run,
    list_checkpoints,
    resume_call,
    step_of,
)
from quarkrl.storage.atomic import atomic_file, clean_up, report_write_errors
from quarkrl.storage.json import write_json


class Differences(NamedTuple):
    """How a run differs from an earlier one, in clauses for the user.

    Attributes:
        options: by name, the options that differ and that a run may change if it branches off from a checkpoint.
        obstacles: other differences, with which no run resumes.
        notes: differences with which a run resumes.
    """

    options: dict[str, str]
    obstacles: list[str]
    notes: list[str]


class RunIdentity(Protocol):
    """What the result of a run depends on."""

    @property
    def facts(self) -> dict[str, Any]:
        """The content of run.json."""

    def compare(self, saved: Any) -> Differences:
        """Compare with the facts of the run in a directory.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: `saved` is not what a run has written.
        """


class OpenedRun(NamedTuple):
    """Where a run starts or resumes.

    Attributes:
        checkpoint: None to start at the beginning.
        notes: what the user should know.
        changed_options: the options that differ from those of the checkpoint's run, because this run branches off.
    """

    checkpoint: Path | None
    notes: list[str]
    changed_options: frozenset[str]


@contextmanager
def locked(directory: str | os.PathLike) -> Iterator[None]:
    """Lock a run's directory. The operating system releases the lock when the process ends, however it ends.

    Raises:
        UserError: another process holds it, or the directory cannot be written.
    """
    directory = Path(directory)
    created = [path for path in (directory, *directory.parents) if not path.exists()]
    make_run_directory(directory)
    with report_write_errors(directory):
        is_new = all(path.name == LOCK_FILE for path in directory.iterdir())
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
    except (UserError, OSError):
        if is_new:
            _remove_traces(directory, created)
        raise
    finally:
        lock.release()


def make_run_directory(directory: Path) -> None:
    """Create the directory of a run, unless it exists.

    Raises:
        UserError: it cannot be created.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output_dir {str(directory)!r}: must be a directory that can be created "
            f"({(error.strerror or str(error)).lower()}). Set another --output_dir."
        ) from error


def _remove_traces(directory: Path, created: Sequence[Path]) -> None:
    """Remove what a run has left that failed before its first sample, and the directories that it created.

    Otherwise the next command of this name would find the directory of a run that never was. Anything else in the
    directory, such as the figures of the model before training, keeps all of it.
    """
    content = sorted(directory.rglob("*"), reverse=True)  # Files before the directories that hold them.
    if any(path.is_file() and path.name not in (LOCK_FILE, RUN_FILE, OPTIONS_FILE) for path in content):
        return
    for path in content:
        path.rmdir() if path.is_dir() else path.unlink()
    for path in created:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


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
            raise UserError(
                f"model {str(path)!r}: must hold final/ or a checkpoint. Resume the run: {resume_call(run)}"
            )
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


def open_run(
    directory: Path, identity: RunIdentity, resume: bool | str | None, set_aside: Callable[[int, Path], None]
) -> OpenedRun:
    """Start a run in a directory, or find the checkpoint from which its run resumes.

    Args:
        directory: the run's directory, locked by this process.
        identity: the identity of the run that starts or resumes.
        resume: False or None for a new run, True for the last good checkpoint, or a checkpoint's directory. A run with
            other options may branch off from a named directory.
        set_aside: receives a step and a folder. It moves there what the run has written after the step, beside
            checkpoints.

    Raises:
        UserError: a new run finds an old one, or a resumed run finds none, another one or a damaged one.
    """
    if not resume:
        check_no_run(directory)
        write_json(directory / RUN_FILE, identity.facts)
        return OpenedRun(None, [], frozenset())
    differences = _compare_with_saved(directory, identity)
    for folder in (directory, directory / "pool"):
        clean_up(folder)
    options = differences.options
    if differences.obstacles or (options and not isinstance(resume, str)):
        raise UserError(
            f"output_dir {str(directory)!r}: must hold the run to resume, but holds another "
            f"({'; '.join([*options.values(), *differences.obstacles])}). Resume with the same options, or set another "
            "--output_dir."
        )
    notes = differences.notes
    if isinstance(resume, str):
        checkpoint: Path | None = Path(resume)
        _check_checkpoint(Path(resume), directory)
        if options:
            aside = _set_aside(directory, step_of(Path(resume)), set_aside)
            notes = [*notes, f"from here on {', '.join(options.values())}; later files were moved to {aside}"]
    else:
        checkpoint, damaged = last_good_checkpoint(directory)
        notes = [*notes, *(f"skipped {text}" for text in damaged)]
    write_json(directory / RUN_FILE, identity.facts)
    return OpenedRun(checkpoint, notes, frozenset(options))


def _check_checkpoint(checkpoint: Path, directory: Path) -> None:
    """Check that a checkpoint belongs to the run in the directory, and is not damaged."""
    if checkpoint.resolve().parent != directory.resolve() or step_of(checkpoint.resolve()) < 0:
        raise UserError(
            f"resume_from_checkpoint {str(checkpoint)!r}: must be a checkpoint of the run in output_dir "
            f"{str(directory)!r}. Set one of its directories checkpoint-STEP, or set --output_dir to its run."
        )
    if damage := find_damage(checkpoint):
        raise UserError(f"resume_from_checkpoint {str(checkpoint)!r}: {damage}. Set an undamaged checkpoint.")


def _set_aside(directory: Path, step: int, set_aside: Callable[[int, Path], None]) -> Path:
    """Move what a run wrote after a step into a folder of its own, with copies of its options; return the folder."""
    aside = next(path for n in itertools.count(1) if not (path := directory / f"aside-{n}").exists())
    aside.mkdir()
    for name in (RUN_FILE, OPTIONS_FILE):
        if (directory / name).exists():
            shutil.copy2(directory / name, aside)
    for path in list_checkpoints(directory):  # First, because a run resumes without later samples but not the reverse.
        if step_of(path) > step:
            os.rename(path, aside / path.name)
    set_aside(step, aside)
    return aside


def _compare_with_saved(directory: Path, identity: RunIdentity) -> Differences:
    """Compare a run with the one in a directory.

    Raises:
        UserError: there is no run, or its file is missing or damaged.
    """
    path = directory / RUN_FILE
    if not path.exists():
        check_resumable(directory)
        raise UserError(f"{path} is missing, so the run cannot be identified. Restore it to resume.")
    try:
        return identity.compare(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({error}), so the run cannot be identified. Restore it to resume."
        ) from None


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
            with atomic_file(Path(args.output_dir) / OPTIONS_FILE) as file:
                file.write(yaml.safe_dump(self.options, sort_keys=False).encode())
