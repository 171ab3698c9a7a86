"""What users type by guess, turned into the command's own words."""

from collections.abc import Sequence
from pathlib import Path

from quarkrl.cli.parser import is_bool
from quarkrl.errors import UserError
from quarkrl.runs.records import near_run

# Commands of other tools, and what does the same here.
COMMANDS = {
    "eval": "evaluate",
    "fit": "train",
    "finetune": "train",
    "inference": "generate",
    "sample": "generate",
    "merge": "export",
    "convert": "export",
    "serve": "play",
    "ui": "play",
    "plot": "report",
    "configs": "presets",
    "monitor": "watch",
    "pool": "samples",
    "upload": "push",
    "push_to_hub": "push",
}


def expand_train(argv: Sequence[str]) -> list[str]:
    """Return the arguments of `quarkrl train` with `FILE` as `--config FILE`, and `--resume DIR` as its two options.

    Raises:
        UserError: the value of `--resume` is no directory.
    """
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        argv[:1] = ["--config", argv[0]]
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name != "--resume":
            continue
        if not equals:
            value = argv[i + 1] if i + 1 < len(argv) and not argv[i + 1].startswith("-") else ""
        if value and not is_bool(value):
            argv[i : i + (1 if equals else 2)] = _resume(Path(value))
        break
    return argv


def _resume(directory: Path) -> list[str]:
    if not directory.is_dir():
        hint = near_run(directory) or " Correct it."
        raise UserError(f"resume {str(directory)!r}: must be the directory of a run or of a checkpoint.{hint}")
    if (directory / "trainer_state.json").is_file():
        return ["--resume", "--resume_from_checkpoint", str(directory), "--output_dir", str(directory.parent)]
    return ["--resume", "--output_dir", str(directory)]
