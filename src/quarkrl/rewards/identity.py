"""The provenance of scores: the name, identity and source file of a reward."""

import functools
import hashlib
import importlib.metadata
import inspect
import json
from contextlib import suppress
from typing import Any

from quarkrl.errors import UserError
from quarkrl.rewards.reward import Reward


def name_of(reward: Reward) -> str:
    """Return the attribute `name` of a reward, or the name of its function or class."""
    name = getattr(reward, "name", None)
    return name if isinstance(name, str) and name else _definition(reward).__name__


def identity_of(reward: Reward) -> dict[str, Any]:
    """Return the attribute `identity` of a reward, or its module, qualified name and the SHA-256 of its source.

    Raises:
        UserError: the attribute is not a dict that JSON can hold.
    """
    name = name_of(reward)
    declared = getattr(reward, "identity", None)
    if declared is not None:
        if not isinstance(declared, dict):
            raise UserError(f"reward {name!r} attribute identity: must be a dict, not {type(declared).__name__}.")
        try:
            json.dumps(declared)
        except (TypeError, ValueError) as error:
            raise UserError(f"reward {name!r} attribute identity: must be JSON-able ({error}).") from error
        return {"name": name, **declared}
    definition = _definition(reward)
    identity = {"name": name, "module": definition.__module__, "qualname": definition.__qualname__}
    if isinstance(reward, functools.partial):
        identity["settings"] = repr((reward.args, reward.keywords))
    with suppress(OSError, TypeError):  # Defined in a prompt or written in C: there is no source file.
        identity["sha256"] = hashlib.sha256(inspect.getsource(definition).encode()).hexdigest()
    return identity


def source_file(reward: Reward) -> str | None:
    """Return the file that defines a reward, or None if it has no source file."""
    with suppress(OSError, TypeError):
        return inspect.getsourcefile(_definition(reward))
    return None


def library_version(package: str) -> str:
    """Return the installed version of a package, for an identity."""
    return importlib.metadata.version(package)


def _definition(reward: Any) -> Any:
    """The function or class that defines a reward, without partials and decorators."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    reward = inspect.unwrap(reward)
    return reward if hasattr(reward, "__qualname__") else type(reward)
