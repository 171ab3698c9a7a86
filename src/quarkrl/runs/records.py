"""What a run's directory holds, for readers that must start at once: this module imports no torch."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

from filelock import FileLock

from quarkrl.errors import UserError, did_you_mean

RUN_FILE, LOCK_FILE, OPTIONS_FILE, METRICS_FILE = "run.json", "run.lock", "config.yaml", "metrics.jsonl"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def is_in_use(directory: Path) -> bool:
    """Return whether a process of this machine has locked the directory; the system releases a killed one's lock."""
    file = directory.resolve() / LOCK_FILE
    if not file.is_file():
        return False
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except OSError:  # A time-out; or a directory in which this user may not write, whose lock cannot be tried.
        return True
    lock.release()
    return False


def recorded_fact(directory: Path, name: str) -> Any:
    """Return a fact of the identity of the run in a directory; None if it has none, or none that can be read."""
    try:
        return json.loads((directory / RUN_FILE).read_text(encoding="utf-8")).get(name)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # `open_run` reports a damaged file.


def continues_prompts(directory: Path) -> bool:
    """Return whether the completions of the run in a directory continue its prompts, as those of a causal model do."""
    return not recorded_fact(directory, "is_encoder_decoder")


def options_of_run(model: str) -> dict[str, Any]:
    """Return the options in config.yaml of the run that a directory, or the directory around it, holds; {} without.

    A file of this name in the folder of a model is not read: whoever made the model may have put it there.
    """
    import yaml

    path = Path(model)
    for directory in (path, path.resolve().parent) if path.exists() else ():
        if not holds_run(directory):
            continue
        try:
            options = yaml.safe_load((directory / OPTIONS_FILE).read_bytes())
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(options, dict):
            return options
    return {}


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step in a checkpoint's name; -1 for another name."""
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def list_checkpoints(run: Path) -> list[Path]:
    """Return a run's checkpoints, damaged ones included, in the order of their steps."""
    return sorted((path for path in run.glob("checkpoint-*") if path.is_dir() and step_of(path) >= 0), key=step_of)


def holds_run(directory: Path) -> bool:
    """Return whether the directory has samples, checkpoints or a final model of a run."""
    return any((directory / name).exists() for name in ("pool", "final")) or bool(list_checkpoints(directory))


def check_no_run(directory: Path) -> None:
    """Check that a directory holds no run.

    Raises:
        UserError: it does.
    """
    if holds_run(directory):
        raise UserError(
            f"output_dir {str(directory)!r}: must not hold a run already. Set another --output_dir, or resume the run: "
            f"{resume_call(directory)}"
        )


def resume_call(directory: Path) -> str:
    """Return what resumes the run in a directory: the command, or the call of a trainer for a run of a script."""
    if (directory / OPTIONS_FILE).is_file():
        return f"quarkrl train --resume {shlex.quote(str(directory))}"
    return "trainer.train(resume_from_checkpoint=True)"  # `quarkrl train` needs config.yaml, which it writes.


def check_resumable(directory: Path) -> None:
    """Check that a directory holds a run, or what a run has left before its first sample.

    Raises:
        UserError: it does not.
    """
    if holds_run(directory) or (directory / RUN_FILE).exists():
        return
    problem = "holds none" if directory.is_dir() else "there is no such directory"
    hint = near_run(directory) or " Start the run without --resume, or correct --output_dir."
    raise UserError(f"output_dir {str(directory)!r}: must be the directory of a run to resume, and {problem}.{hint}")


def near_run(directory: Path) -> str:
    """Return " Did you mean 'DIRECTORY'?" with the run beside it whose name is closest, or "" if none is close."""
    runs = [path.name for path in directory.parent.glob("*") if path.is_dir() and holds_run(path)]
    return did_you_mean(directory.name, runs, "" if directory.parent == Path() else f"{directory.parent}/")
