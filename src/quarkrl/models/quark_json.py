"""`quark.json`: the file beside a model's weights that says how Quark trained it.

It holds the reward tokens (`conditioning.Conditioning`) and facts of the run, such as the name of the reference.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quarkrl.errors import UserError
from quarkrl.hub_access import only_cache_if_unreachable
from quarkrl.storage.atomic import write_text
from quarkrl.storage.json import nan_to_null

FILE_NAME = "quark.json"
DEFAULT_GUIDANCE = "default_guidance"  # The key of what `sampling.guidance.GuidanceOptions` reads.


def write_quark_json(directory: str | os.PathLike, facts: Mapping[str, Any]) -> None:
    """Write `quark.json` into a model's directory, atomically; NaN and infinity become null.

    Raises:
        UserError: the operating system refuses the write, for example on a full disk.
    """
    write_text(Path(directory) / FILE_NAME, json.dumps(nan_to_null(facts), indent=2) + "\n")


def read_quark_json(model: str | os.PathLike) -> dict[str, Any] | None:
    """Read the `quark.json` of a model, from its directory or the hub; None if the model has none.

    Raises:
        UserError: the file is not a JSON object.
    """
    if os.path.isfile(model):
        return None  # A GGUF file.
    path = Path(model) / FILE_NAME if os.path.isdir(model) else _path_on_hub(str(model))
    if path is None or not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise damaged(model, str(error)) from error
    if not isinstance(facts, dict):
        raise damaged(model, "not a JSON object")
    return facts


def _path_on_hub(name: str) -> Path | None:
    """The downloaded file of a model on the hub; None if it has none, or the hub cannot be reached."""
    from transformers.utils import cached_file  # Not at the top: it takes seconds to import.

    with only_cache_if_unreachable(name):
        path = cached_file(
            name,
            FILE_NAME,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    return path and Path(path)


def reference_name(model: str | os.PathLike) -> str | None:
    """The name or directory of the reference; None if `quark.json` does not name it.

    Raises:
        UserError: `quark.json` is damaged.
    """
    return _name(model, "reference")


def start_name(model: str | os.PathLike) -> str | None:
    """The name or directory of the model that training started from; None if `quark.json` does not name it.

    Raises:
        UserError: `quark.json` is damaged.
    """
    return _name(model, "start")


def keeps_special_tokens(model: str | os.PathLike) -> bool:
    """Whether the model's rewards read special tokens in completions (`keep_special_tokens`).

    Raises:
        UserError: `quark.json` is damaged.
    """
    config = (read_quark_json(model) or {}).get("config")
    return isinstance(config, dict) and config.get("keep_special_tokens") is True


def reads_chats_as_trained(model: str | os.PathLike) -> bool | None:
    """Whether the prompts of training were chats to the model; None if `quark.json` does not say, or is not there.

    Raises:
        UserError: `quark.json` is damaged.
    """
    prompts = (read_quark_json(model) or {}).get("prompts")
    reads = prompts.get("reads") if isinstance(prompts, dict) else None
    return None if reads is None else reads == "chats"


def _name(model: str | os.PathLike, key: str) -> str | None:
    identity = (read_quark_json(model) or {}).get(key) or {}
    name = identity.get("name") if isinstance(identity, dict) else identity
    if not isinstance(identity, dict) or not isinstance(name, str | None):
        raise damaged(model, f"{key} {identity!r}")
    return name


def damaged(model: str | os.PathLike, problem: str) -> UserError:
    """The error for a `quark.json` that `quarkrl` cannot have written."""
    return UserError(
        f"{str(model)!r}: {FILE_NAME} is damaged ({problem}). Restore the file that quarkrl train wrote with the model."
    )
