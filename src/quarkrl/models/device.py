"""Which device a model is on by default, and what a thread of its own must know of it. This module imports no torch."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def default_device() -> "torch.device":
    """Return the accelerator (a GPU) if there is one, else the CPU."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def current_gpu() -> int:
    """The index of this thread's current GPU, or -1 without one, as in a process that has not imported torch.

    CUDA's current device is a property of the thread. A new thread takes it over by `use_gpu`.
    """
    torch = sys.modules.get("torch")
    return torch.cuda.current_device() if torch and torch.cuda.is_initialized() else -1


def use_gpu(index: int) -> None:
    """Make a GPU that `current_gpu` returned the current one of this thread; -1 changes nothing."""
    if index >= 0:
        import torch

        torch.cuda.set_device(index)


def keep_autocast_cache() -> None:
    """Keep this thread from clearing the cache of autocast, which is one for all threads.

    Otherwise the end of an autocast region in the thread clears it. Without torch there is no cache.
    """
    if torch := sys.modules.get("torch"):
        torch.autocast_increment_nesting()
