"""The device of a model that its user has not placed."""

import torch


def default_device() -> torch.device:
    """Return the accelerator (a GPU) if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")
