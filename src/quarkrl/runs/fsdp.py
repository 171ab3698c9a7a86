"""FSDP2: weights and optimizer states that are sharded over processes, with checkpoints as those of one process.

Whole states are gathered in the first process and written as usual: no pickle, and any number of processes can resume
from them. `torch.distributed.checkpoint` would write one file per process, and a pickle that describes them.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from quarkrl.errors import UserError

# The first process holds the whole state and broadcasts it.
_BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
_GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True)


def check_sharding(accelerator: Accelerator, has_adapter: bool) -> None:
    """Check that the sharding that the user chose is supported.

    Raises:
        UserError: the FSDP version, the state type, an adapter with FSDP, or ZeRO stage 3 is not supported.
    """
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    if deepspeed is not None and deepspeed.zero_stage == 3:
        raise UserError("deepspeed zero_stage 3: must be 1 or 2. Set stage 2, or use FSDP2 (--fsdp).")
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise UserError(f"fsdp_config version {plugin.fsdp_version}: must be 2. Set version 2 (FSDP2).")
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise UserError(
            f"fsdp_config state_dict_type {plugin.state_dict_type}: must be FULL_STATE_DICT, since checkpoints are "
            "not sharded. Set FULL_STATE_DICT."
        )
    if has_adapter:
        raise UserError("lora_rank (peft_config) with FSDP: not supported. Use DDP, or train all weights.")


def enable_fsdp_on_cpu(accelerator: Accelerator, plugin: Any) -> bool:
    """Turn FSDP on for CPU processes, where accelerate 1.15 ignores it without a message.

    Args:
        accelerator: the trainer's, just created.
        plugin: the FSDP plugin that the trainer's arguments ask for; None if `accelerate launch` may ask for it.

    Returns:
        Whether FSDP is now on because of this call.
    """
    if plugin is None and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        plugin = FullyShardedDataParallelPlugin()  # Reads the options of `accelerate launch`.
    state = accelerator.state
    if plugin is None or state.distributed_type != DistributedType.MULTI_CPU:
        return False
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state.fsdp_plugin = plugin
    return True


def shard_frozen_model(accelerator: Accelerator, model: Any) -> Any:
    """Shard a model that is not trained, such as the reference, in the same way as the policy."""
    return fsdp2_prepare_model(accelerator, model)


def gather_weights(accelerator: Accelerator, model: Any) -> dict[str, torch.Tensor]:
    """Return the whole weights by name in the first process. Tied weights occur once."""
    names = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    weights = accelerator.get_state_dict(model)
    return {name: weight for name, weight in weights.items() if name in names}


def load_weights(model: Any, checkpoint: str | Path, is_first: bool) -> Any:
    """Load a checkpoint's weights into a sharded model. Only the first process reads them.

    Returns:
        The missing and unexpected keys, as `load_state_dict` returns them.
    """
    weights: dict[str, Any] = {}
    for path in sorted(Path(checkpoint).glob("*.safetensors")) if is_first else ():
        weights |= load_file(path)
    return set_model_state_dict(model, weights, options=_BROADCAST)


def gather_optimizer_state(model: Any, optimizer: Any) -> dict[str, Any]:
    """Return the whole optimizer state, by the names of the weights, in the first process; elsewhere it is empty."""
    return get_optimizer_state_dict(model, unwrap_optimizer(optimizer), options=_GATHER)


def restore_optimizer_state(model: Any, optimizer: Any, read: Callable[[], dict[str, Any]], is_first: bool) -> None:
    """Restore the state of a sharded optimizer. Only the first process calls `read`."""
    optimizer = unwrap_optimizer(optimizer)
    tuples = [[name for name in group if isinstance(group[name], tuple)] for group in optimizer.param_groups]
    state = _key_by_name(read(), model, optimizer) if is_first else {}
    set_optimizer_state_dict(model, optimizer, state, options=_BROADCAST)
    for group, names in zip(optimizer.param_groups, tuples, strict=True):
        group |= {name: tuple(group[name]) for name in names}  # torch returns them as lists.


def _key_by_name(state: dict[str, Any], model: Any, optimizer: Any) -> dict[str, Any]:
    """Return an optimizer state with weights by name, whether it has them by name or by number."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    own_names = [names[id(weight)] for group in optimizer.param_groups for weight in group["params"]]
    groups, moments = state["param_groups"], state["state"]
    keys = [key for group in groups for key in group["params"]]
    name_of = dict(zip(keys, own_names, strict=True))
    return {
        "state": {name_of[key]: tensors for key, tensors in moments.items()},
        "param_groups": [{**group, "params": [name_of[key] for key in group["params"]]} for group in groups],
    }


def unwrap_optimizer(optimizer: Any) -> Any:
    """Return the optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
