"""What is in a checkpoint beside the weights, without pickle, and which checkpoint is whole.

`transformers.Trainer` pickles the state of optimizer, scheduler, scaler and random generators. Here each is a tree of
dicts, lists and numbers as JSON whose tensors are in safetensors; `training/` of a checkpoint holds them. The last file
written is `manifest.json`, with size and SHA-256 of all others: a checkpoint is good where it agrees.
"""

import json
import random
import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.optim.lr_scheduler import LambdaLR

from quarkrl.errors import UserError
from quarkrl.storage.atomic import remove_directory, sha256
from quarkrl.storage.json import write_json

MANIFEST = "manifest.json"
STATES = "training"  # A directory of its own: vLLM takes each safetensors file beside the weights for weights.

_NAME = re.compile(r"checkpoint-(\d+)")
_TENSOR, _TUPLE, _DICT = "tensor", "tuple", "dict"


def states_path(checkpoint: str | Path, name: str) -> Path:
    """Where a checkpoint keeps the state of this name."""
    return Path(checkpoint) / STATES / f"{name}.safetensors"


def save_state(path: Path, state: Any) -> None:
    """Write a state: dicts, lists, tuples, numbers, strings, None and tensors, nested at will.

    Raises:
        TypeError: it holds something else.
    """
    tensors: dict[str, torch.Tensor] = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    tree = json.dumps(_as_json(state, tensors))
    save_file(tensors, path, metadata={"tree": tree})


def load_state(path: Path) -> Any:
    """What `save_state` wrote; its tensors are on the CPU.

    Raises:
        UserError: the file is missing, damaged, or of somebody else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            return _from_json(json.loads((file.metadata() or {})["tree"]), tensors)
    except (OSError, SafetensorError, ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: no state that quarkrl wrote, or a damaged one ({error!r})") from error


def _as_json(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Lists as lists; what JSON has no word for as a dict of one key, which tells its kind."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous()
        return {_TENSOR: name}
    if isinstance(value, dict):
        return {_DICT: [[_as_json(key, tensors), _as_json(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_as_json(item, tensors) for item in value]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} in a state to be saved: want numbers, texts, tensors, lists and dicts")


def _from_json(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_from_json(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == _TENSOR:
        return tensors[held]
    if kind == _TUPLE:
        return tuple(_from_json(item, tensors) for item in held)
    return {_from_json(key, tensors): _from_json(item, tensors) for key, item in held}


def read_optimizer(optimizer: Any, checkpoint: str | Path, keep_options: bool = False) -> dict[str, Any]:
    """The state of an optimizer that `save_state` wrote under "optimizer".

    Args:
        optimizer: as the run's options make it.
        checkpoint: where it is.
        keep_options: of the checkpoint take the moments and the step, not the learning rate and the like.
    """
    state = load_state(states_path(checkpoint, "optimizer"))
    for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True) if keep_options else ():
        saved |= {name: value for name, value in group.items() if name != "params"}
    return state


def load_schedule(optimizer: Any, scheduler: Any, checkpoint: str | Path, keep_options: bool = False) -> None:
    """Put a schedule back to where it was, by what `save_state` wrote under "scheduler"; arguments as before."""
    schedule = load_state(states_path(checkpoint, "scheduler"))
    if keep_options:
        schedule = {**schedule, **{name: scheduler.state_dict().get(name) for name in ("base_lrs", "lr_lambdas")}}
    scheduler.load_state_dict(schedule)
    if keep_options and isinstance(scheduler, LambdaLR):  # As all of transformers' are that go by the step.
        rates = [
            base * factor(scheduler.last_epoch)
            for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates


# Random generators.


def random_states() -> dict[str, Any]:
    """The states of the global generators: Python's, NumPy's, torch's on the CPU and on the accelerator."""
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    kind, keys, *rest = cast(tuple, np.random.get_state())
    states["numpy"] = (kind, keys.tolist(), *rest)
    if (device := torch.accelerator.current_accelerator()) is not None:
        states["accelerator"] = (device.type, torch.get_device_module(device).get_rng_state())
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Put the generators back; that of an accelerator of another kind stays as it is."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    kind, state = states.get("accelerator", (None, None))
    device = torch.accelerator.current_accelerator()
    if device is not None and device.type == kind:
        torch.get_device_module(kind).set_rng_state(state)


# Whole and damaged.


def seal(directory: Path) -> None:
    """Write the manifest of a directory that is complete."""
    files = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
    files.pop(MANIFEST, None)
    facts = {name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in files.items()}
    write_json(directory / MANIFEST, {"files": facts})


def flaw(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, as a clause; None if it can be gone on from."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        if "trainer_state.json" not in files:
            return f"{MANIFEST} is damaged: it lists no trainer_state.json"
        for name, fact in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != fact["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes of {fact['bytes']:,}"
            if sha256(path) != fact["sha256"]:
                return f"{name} is damaged: its checksum is another"
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it was not finished, or is of another program"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} is damaged ({error!r})"
    # `latest` is DeepSpeed's, and names the directory of its states.
    states = (states_path(checkpoint, "optimizer"), checkpoint / "latest", *checkpoint.glob("optimizer*"))
    if not any(path.exists() for path in states):
        return "it has no optimizer state (save_only_model)"
    return None


def step_of(checkpoint: Path) -> int:
    """The optimizer steps before a checkpoint, by its name; -1 for another name."""
    found = _NAME.fullmatch(checkpoint.name)
    return int(found[1]) if found else -1


def checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints, whole or not, by step."""
    return sorted((path for path in run.glob("checkpoint-*") if path.is_dir() and step_of(path) >= 0), key=step_of)


def last_good(run: Path) -> tuple[Path | None, list[str]]:
    """The last checkpoint that is whole, and what is wrong with later ones.

    Raises:
        UserError: there are checkpoints, and none is whole.
    """
    wrong: list[str] = []
    for checkpoint in reversed(checkpoints(run)):
        if (found := flaw(checkpoint)) is None:
            return checkpoint, wrong
        wrong.append(f"{checkpoint.name}: {found}")
    if wrong:
        raise UserError(
            f"{str(run)!r} has no checkpoint to go on from ({'; '.join(wrong)}): bring one back, or remove them all "
            "to learn anew from the samples in pool/"
        )
    return None, wrong


def rotate(run: Path, limit: int | None, keep: set[Path]) -> None:
    """Remove the oldest checkpoints beyond `limit`, but none of `keep`: the one just saved, and the best."""
    found = checkpoints(run)
    excess = len(found) - limit if limit else 0
    for checkpoint in [path for path in found if path not in keep][: max(excess, 0)]:
        remove_directory(checkpoint)
