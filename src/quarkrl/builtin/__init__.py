"""The embedded tiny model and its prompts, so that everything runs offline and in minutes.

The model is a 1.1M-parameter GPT-2 that writes everyday remarks, replies and reviews, some of them rude. It is
trained on texts of a small grammar, by `python -m tools.builtin_model.build` in the repository.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from quarkrl.errors import did_you_mean

BUILTIN = "builtin"  # names the embedded model, and its prompts
BUILTIN_CHATS = "builtin-chats"  # names embedded chats
_HERE = Path(__file__).resolve().parent


def model_path() -> Path:
    """Return the directory of the embedded model and its tokenizer, for `from_pretrained`."""
    return _HERE / "model"


def locate_model(name: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Return the directory of the embedded model for the name "builtin", and any other name unchanged."""
    return model_path() if name == BUILTIN else name


def near_builtin(name: str, *known: str) -> str:
    """Return " Did you mean 'builtin'?" for a misspelt name of what is embedded, which would be sought on the hub.

    Args:
        name: what the user wrote.
        known: the embedded names; that of the model by default.
    """
    return "" if "/" in name or os.path.exists(name) else did_you_mean(name.lower(), known or (BUILTIN,), cutoff=0.8)


def locate_prompts(name: str, split: str) -> Path | None:
    """Return the file of the embedded prompts or chats for their names, and None for any other name.

    Args:
        name: "builtin" or "builtin-chats".
        split: "train" or "eval"; any other split, such as "test", is "eval".
    """
    part: Literal["train", "eval"] = "train" if split == "train" else "eval"
    return {BUILTIN: prompts_path, BUILTIN_CHATS: chats_path}[name](part) if name in (BUILTIN, BUILTIN_CHATS) else None


def prompts_path(split: Literal["train", "eval"]) -> Path:
    """Return the JSONL file of prompts, one `{"prompt": "..."}` per line.

    Args:
        split: "train" (about 20,000 prompts) or "eval" (about 300, from texts that neither the model nor the
            training prompts ever saw).

    Raises:
        ValueError: if `split` is neither.
    """
    if split not in ("train", "eval"):
        raise ValueError(f'split is {split!r}; the built-in prompts have the splits "train" and "eval".')
    return _HERE / f"prompts.{split}.jsonl"


def chats_path(split: Literal["train", "eval"]) -> Path:
    """Return the JSONL file of chats, one `{"messages": [...]}` with an everyday question or remark per line.

    Args:
        split: "train" (128 chats) or "eval" (32, about other things).
    """
    return _HERE / f"chats.{split}.jsonl"
