"""Which checkpoints of a run are complete and undamaged, and which to keep.

The last file written to a checkpoint is `manifest.json`, with the size and the SHA-256 of every other file. A
checkpoint is good if it agrees with its manifest. `states.py` has the training states in it.
"""

import json
from pathlib import Path

from quarkrl.errors import UserError
from quarkrl.runs.records import list_checkpoints
from quarkrl.runs.states import states_path
from quarkrl.storage.atomic import remove_directory, sha256
from quarkrl.storage.json import write_json

MANIFEST = "manifest.json"


def seal(directory: Path) -> None:
    """Write the manifest of a complete checkpoint."""
    files = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
    files.pop(MANIFEST, None)
    facts = {name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in files.items()}
    write_json(directory / MANIFEST, {"files": facts})


def find_damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, as a clause; None if a run can resume from it."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        if "trainer_state.json" not in files:
            return f"{MANIFEST} is damaged: it does not list trainer_state.json"
        for name, fact in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != fact["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes, expected {fact['bytes']:,}"
            if sha256(path) != fact["sha256"]:
                return f"{name} is damaged: its checksum differs"
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it is incomplete, or another program wrote it"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} is damaged ({error!r})"
    # DeepSpeed writes `latest`, which names the directory of its states.
    states = (states_path(checkpoint, "optimizer"), checkpoint / "latest", *checkpoint.glob("optimizer*"))
    if not any(path.exists() for path in states):
        return "it has no optimizer state (save_only_model)"
    return None


def last_good_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """Return the last undamaged checkpoint, and what is wrong with later ones.

    Raises:
        UserError: the run has checkpoints, and all are damaged.
    """
    damaged: list[str] = []
    for checkpoint in reversed(list_checkpoints(run)):
        if (damage := find_damage(checkpoint)) is None:
            return checkpoint, damaged
        damaged.append(f"{checkpoint.name}: {damage}")
    if damaged:
        raise UserError(
            f"output_dir {str(run)!r}: every checkpoint is damaged ({'; '.join(damaged)}). Restore one, or remove "
            "them all to train again on the samples in pool/."
        )
    return None, damaged


def rotate(run: Path, limit: int | None, keep: set[Path]) -> None:
    """Remove the oldest checkpoints beyond `limit`, except those in `keep`."""
    checkpoints = list_checkpoints(run)
    excess = len(checkpoints) - limit if limit else 0
    for checkpoint in [path for path in checkpoints if path not in keep][: max(excess, 0)]:
        remove_directory(checkpoint)
