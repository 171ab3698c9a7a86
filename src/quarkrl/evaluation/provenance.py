"""Provenance of an evaluation: which weights, prompts, library versions and machine produced the figures."""

import datetime
import hashlib
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from transformers import PreTrainedModel

from quarkrl.data.prompts import Prompts
from quarkrl.storage.atomic import weights_digest

_PACKAGES = ("quarkrl", "torch", "transformers", "tokenizers", "numpy", "mauve-text", "faiss-cpu")


def model_provenance(name: str | os.PathLike, model: PreTrainedModel) -> dict[str, Any]:
    """Return the source of a model: the hub's revision, or the SHA-256 of its files, as `sha256sum` prints it for one.

    A run records another digest, `model_identity`: the model that it starts from need not be a file.
    """
    provenance: dict[str, Any] = {"name": str(name)}
    if os.path.exists(name):
        provenance["sha256"] = weights_digest(name)
    else:
        provenance["revision"] = getattr(model.config, "_commit_hash", None)
    return {**provenance, "parameters": model.num_parameters(), "dtype": str(model.dtype).removeprefix("torch.")}


def prompts_provenance(prompts: Prompts) -> dict[str, Any]:
    """Return the number of prompts or texts, the SHA-256 of their JSON, and the numbers of rows left out by reason."""
    digest = hashlib.sha256(json.dumps(prompts.prompts).encode()).hexdigest()
    return {"count": len(prompts), "sha256": digest, "left_out": prompts.skipped}


def environment(device: torch.device) -> dict[str, Any]:
    """Return the date, the library versions and the machine."""
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
        # The number of threads changes the order of sums, and so their rounding.
        "threads": torch.get_num_threads(),
    }
