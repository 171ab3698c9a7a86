"""States of a training run as files without pickle: JSON for the structure, safetensors for the tensors.

`transformers.Trainer` pickles the states of optimizer, scheduler, scaler and random generators. Here each state is a
tree of dicts, lists and numbers in JSON whose tensors are in safetensors. A checkpoint keeps them in `training/`.
"""

import json
import random
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.optim.lr_scheduler import LambdaLR

from quarkrl.errors import UserError

STATES = "training"  # A folder of its own: vLLM reads every safetensors file beside the weights as weights.

_TENSOR, _TUPLE, _DICT = "tensor", "tuple", "dict"


def states_path(checkpoint: str | Path, name: str) -> Path:
    """Return the path of a checkpoint's state, such as "optimizer"."""
    return Path(checkpoint) / STATES / f"{name}.safetensors"


def save_state(path: Path, state: Any) -> None:
    """Write a state: dicts, lists, tuples, numbers, strings, None and tensors, nested to any depth.

    Raises:
        TypeError: the state holds a value of another type.
    """
    tensors: dict[str, torch.Tensor] = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    tree = json.dumps(_to_json(state, tensors))
    save_file(tensors, path, metadata={"tree": tree})


def load_state(path: Path) -> Any:
    """Read a state that `save_state` wrote, with its tensors on the CPU.

    Raises:
        UserError: the file is missing or damaged, or another program wrote it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return _from_json(json.loads((file.metadata() or {})["tree"]), tensors)
    except (OSError, SafetensorError, ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a state that quarkrl wrote, or damaged ({error!r}).") from error


def _to_json(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Convert a state to JSON. Lists stay lists; tensors, tuples and dicts become a dict of one key, their kind."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous()
        return {_TENSOR: name}
    if isinstance(value, dict):
        return {_DICT: [[_to_json(key, tensors), _to_json(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_to_json(item, tensors) for item in value]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"state of type {type(value).__name__}: must be a number, text, tensor, list, tuple or dict.")


def _from_json(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_from_json(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == _TENSOR:
        return tensors[content]
    if kind == _TUPLE:
        return tuple(_from_json(item, tensors) for item in content)
    return {_from_json(key, tensors): _from_json(item, tensors) for key, item in content}


def load_optimizer_state(optimizer: Any, checkpoint: str | Path, keep_options: bool = False) -> dict[str, Any]:
    """Read the optimizer state of a checkpoint.

    Args:
        optimizer: the optimizer that the run's options create.
        checkpoint: the checkpoint's directory.
        keep_options: restore only the moments and the step. Other options, such as the learning rate, stay as they are.
    """
    state = load_state(states_path(checkpoint, "optimizer"))
    for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True) if keep_options else ():
        saved |= {name: value for name, value in group.items() if name != "params"}
    return state


def restore_scheduler(optimizer: Any, scheduler: Any, checkpoint: str | Path, keep_options: bool = False) -> None:
    """Restore the learning-rate scheduler from a checkpoint. The arguments are those of `load_optimizer_state`."""
    state = load_state(states_path(checkpoint, "scheduler"))
    if keep_options:
        state = {**state, **{name: scheduler.state_dict().get(name) for name in ("base_lrs", "lr_lambdas")}}
    scheduler.load_state_dict(state)
    if keep_options and isinstance(scheduler, LambdaLR):  # All schedules of transformers that depend on the step.
        rates = [
            base * factor(scheduler.last_epoch)
            for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates


def random_states() -> dict[str, Any]:
    """Return the states of the global random generators of Python, NumPy, and torch on the CPU and the accelerator."""
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    kind, keys, *rest = cast(tuple, np.random.get_state())
    states["numpy"] = (kind, keys.tolist(), *rest)
    if (device := torch.accelerator.current_accelerator()) is not None:
        states["accelerator"] = (device.type, torch.get_device_module(device).get_rng_state())
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Restore the global random generators, but not that of an accelerator of another type."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    kind, state = states.get("accelerator", (None, None))
    device = torch.accelerator.current_accelerator()
    if device is not None and device.type == kind:
        torch.get_device_module(kind).set_rng_state(state)
