"""What a figure depends on beside the inputs: which weights, which versions, which machine."""

import datetime
import hashlib
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from quarkrl.data.prompts import Prompts
from quarkrl.storage.atomic import sha256

_PACKAGES = ("quarkrl", "torch", "transformers", "tokenizers", "numpy", "mauve-text", "faiss-cpu")


def model_source(name: str | os.PathLike, model: PreTrainedModel) -> dict[str, Any]:
    """Where a model was loaded from: the hub's revision, or a directory with the SHA-256 of its weight files.

    Of one file that is what `sha256sum` prints; of several, in the order of their names, as if they were one.
    """
    found: dict[str, Any] = {"name": str(name)}
    if os.path.isdir(name):
        found["sha256"] = sha256(*sorted(Path(name).glob("*.safetensors")))
    else:
        found["revision"] = getattr(model.config, "_commit_hash", None)
    return {**found, "parameters": model.num_parameters(), "dtype": str(model.dtype).removeprefix("torch.")}


def texts_read(prompts: Prompts) -> dict[str, Any]:
    """Which prompts or texts: how many, the SHA-256 of them as JSON, and how many were left out, by reason."""
    digest = hashlib.sha256(json.dumps(prompts.prompts).encode()).hexdigest()
    return {"count": len(prompts), "sha256": digest, "left_out": prompts.skipped}


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
