"""What the processes of one run exchange as Python objects."""

from typing import Any

import torch
from accelerate.utils import broadcast_object_list


def broadcast(value: Any, world_size: int) -> Any:
    """Return the first process's value in every process. The value must be picklable."""
    return value if world_size == 1 else broadcast_object_list([value])[0]


def wait_for_all_processes() -> None:
    """Wait until every process arrives here. When one process exits, launchers kill the others at once."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
