"""What a figure depends on beside the inputs: which weights, which versions, which machine."""

import datetime
import hashlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

_PACKAGES = ("quarkrl", "torch", "transformers", "tokenizers", "numpy", "mauve-text", "faiss-cpu")


def model_identity(name: str | os.PathLike, model: PreTrainedModel) -> dict[str, Any]:
    """Which weights a model has: the hub's revision, or of a directory the SHA-256 of its weight files."""
    found: dict[str, Any] = {"name": str(name)}
    if os.path.isdir(name):
        found["sha256"] = weights_sha256(Path(name))
    else:
        found["revision"] = getattr(model.config, "_commit_hash", None)
    return {**found, "parameters": model.num_parameters(), "dtype": str(model.dtype).removeprefix("torch.")}


def weights_sha256(directory: Path) -> str:
    """Of one weight file, what `sha256sum` prints of it; of several, in the order of their names, as if one."""
    digest = hashlib.sha256()
    files = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("*.bin"))
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def surroundings(device: torch.device) -> dict[str, Any]:
    """Date, versions, machine."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue  # An extra that is not installed.
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        # Another number of threads adds up in another order, and rounds differently.
        "threads": torch.get_num_threads(),
    }
