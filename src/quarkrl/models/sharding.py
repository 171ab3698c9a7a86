"""Whether a module's weights are sharded over processes."""

from torch import nn
from torch.distributed.tensor import DTensor


def is_sharded(module: nn.Module) -> bool:
    """Whether the weights of a module are sharded over processes (FSDP, ZeRO stage 3)."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in module.parameters())
