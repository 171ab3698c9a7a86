"""Which device a model is on by default, and which GPU a thread uses."""

import torch


def default_device() -> torch.device:
    """Return the accelerator (a GPU) if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def current_gpu() -> int:
    """The index of this thread's current GPU, or -1 without one.

    CUDA's current device is a property of the thread. A new thread takes it over by `torch.cuda.set_device`, which
    ignores -1.
    """
    return torch.cuda.current_device() if torch.cuda.is_initialized() else -1
