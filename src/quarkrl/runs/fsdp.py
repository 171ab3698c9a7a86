"""Weights and optimizer states that are spread over processes (FSDP2), with checkpoints as of one process.

Whole states are gathered in the first process's memory and written as ever: no pickle, and any number of processes can
go on from them. `torch.distributed.checkpoint` would write a file for each process, and a pickle that tells of them.
"""

import atexit
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers import Trainer

from quarkrl.errors import UserError
from quarkrl.training import overlap as processes

# The first process has the whole and hands it out.
_HANDED_OUT = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)


def check_sharding(plugin: Any, adapter: bool) -> None:
    """See that a run with FSDP is one that works here.

    Args:
        plugin: accelerate's.
        adapter: whether an adapter is trained.

    Raises:
        UserError: it is not.
    """
    if plugin.fsdp_version != 2:
        raise UserError(f"fsdp_config version {plugin.fsdp_version}: want 2 (FSDP2)")
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise UserError(
            f"fsdp_config state_dict_type {plugin.state_dict_type}: want FULL_STATE_DICT, as checkpoints are whole here"
        )
    if adapter:
        raise UserError("an adapter (peft_config, --lora_rank) with FSDP: not supported; want DDP, or all weights")


class ShardedTrainer(Trainer):
    """What `ResumableTrainer` is to `Trainer` where weights are sharded; without FSDP it is `Trainer`.

    Attributes:
        ref_model: sharded as the policy is, if there is one.
    """

    ref_model: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled:
            check_sharding(self.accelerator.state.fsdp_plugin, hasattr(self.model, "peft_config"))
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise UserError("DeepSpeed's ZeRO stage 3: not supported, as no reference is; want stage 1 or 2, or FSDP2")

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        self._fsdp_plugin = kwargs["fsdp_plugin"]
        return super()._build_accelerator_args(**kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        """As `Trainer`'s; on CPUs too FSDP is what was asked for, where accelerate 1.15 would leave it out unsaid."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self._fsdp_plugin is None and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
            self._fsdp_plugin = FullyShardedDataParallelPlugin()  # What `accelerate launch` was told.
        if self._fsdp_plugin is not None and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            state.fsdp_plugin = self._fsdp_plugin
            self.is_fsdp_enabled = True
        if self.args.world_size > 1:
            atexit.register(processes.leave)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_fsdp_enabled and self.ref_model is not None:
            self.ref_model = fsdp2_prepare_model(self.accelerator, self.ref_model)
        return prepared

    def whole_weights(self) -> dict[str, torch.Tensor] | None:
        """The weights by name, gathered in the first process, tied ones once; None where each process has them all."""
        if not self.is_fsdp_enabled:
            return None
        once = {name for name, _ in self.model.named_parameters()} | {name for name, _ in self.model.named_buffers()}
        weights = self.accelerator.get_state_dict(self.model)
        return {name: weight for name, weight in weights.items() if name in once}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`."""
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        self._save(output_dir, self.whole_weights())
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        return None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        weights: dict[str, Any] = {}
        if self.is_world_process_zero():
            for path in sorted(Path(resume_from_checkpoint).glob("*.safetensors")):
                weights |= load_file(path)
        self._issue_warnings_after_load(set_model_state_dict(self.model, weights, options=_HANDED_OUT))
        return None

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's whole state; of sharded weights by their names, and empty but in the first process."""
        if not self.is_fsdp_enabled:
            return self.optimizer.state_dict()
        return get_optimizer_state_dict(self.model, self._bare_optimizer, options=_GATHERED)

    def load_optimizer_state(self, read: Callable[[], dict[str, Any]]) -> None:
        """Put back what `optimizer_state` gave, sharded or not; where weights are, only the first process reads it."""
        if not self.is_fsdp_enabled:
            return self.optimizer.load_state_dict(read())
        optimizer = self._bare_optimizer
        tuples = [[name for name in group if isinstance(group[name], tuple)] for group in optimizer.param_groups]
        state = self._by_name(read()) if self.is_world_process_zero() else {}
        set_optimizer_state_dict(self.model, optimizer, state, options=_HANDED_OUT)
        for group, names in zip(optimizer.param_groups, tuples, strict=True):
            group |= {name: tuple(group[name]) for name in names}  # They come as lists.
        return None

    def _by_name(self, state: dict[str, Any]) -> dict[str, Any]:
        """A state by the numbers of the weights, as an optimizer's own is, by their names."""
        names = {id(weight): name for name, weight in self.model.named_parameters()}
        own = [names[id(weight)] for group in self._bare_optimizer.param_groups for weight in group["params"]]
        groups, moments = state["param_groups"], state["state"]
        numbers = [number for group in groups for number in group["params"]]
        called = dict(zip(numbers, own, strict=True))  # What is by names already is called what it is.
        return {
            "state": {called[number]: tensors for number, tensors in moments.items()},
            "param_groups": [{**group, "params": [called[number] for number in group["params"]]} for group in groups],
        }

    @property
    def _bare_optimizer(self) -> Any:
        """Without what accelerate wraps it in."""
        return getattr(self.optimizer, "optimizer", self.optimizer)
