"""What the processes of one run exchange as Python objects."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from quarkrl.errors import UserError


def broadcast(value: Any, world_size: int) -> Any:
    """Return the first process's value in every process. The value must be picklable."""
    return value if world_size == 1 else broadcast_object_list([value])[0]


def call_in_first_process(function: Callable[[], Any], rank: int, world_size: int) -> Any:
    """Call a function in the first process, and return its result in every process.

    Raises:
        UserError: the function raised it; every process raises it.
    """
    result: Any = None
    if rank == 0:
        try:
            result = function()
        except UserError as error:
            result = error
    result = broadcast(result, world_size)
    if isinstance(result, UserError):
        raise result
    return result


def wait_for_all_processes() -> None:
    """Wait until every process arrives here. When one process exits, launchers kill the others at once."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
