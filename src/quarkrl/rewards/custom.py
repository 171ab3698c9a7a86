"""Reward functions of the user's own: `module:function`, `file.py:function`, and what tells two apart."""

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from quarkrl.errors import UserError


def load_function(spec: str) -> Any:
    """What `file.py:function` or `module:function` names; the current directory is importable.

    Raises:
        UserError: the file, the module or the function does not exist, or importing it fails.
    """
    source, colon, path = spec.rpartition(":")
    if not (source and colon and path):
        raise UserError(f"reward {spec!r} names no function: write file.py:function or module:function")
    module = _load_file(Path(source).expanduser()) if source.endswith(".py") else _load_module(source)
    found: Any = module
    for part in path.split("."):
        if not hasattr(found, part):
            raise UserError(f"reward {spec!r}: {source} has no {path!r}; {_offers(module, path)}")
        found = getattr(found, part)
    return found


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"there is no file {str(path)!r} to take a reward from")
    path = path.resolve()
    # Named by its content: two rewards of one file share its module, an edited file is loaded anew (in a
    # notebook), and the name, which is part of a reward's identity, is the same on every machine.
    name = f"{path.stem}_{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__file__ == str(path):
        return loaded
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # as an import does: dataclasses and inspect look a class's module up there
    try:
        with _importable(path.parent):
            module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"cannot import {path.name}: {describe(error)}") from error
    return module


def _load_module(name: str) -> ModuleType:
    importlib.invalidate_caches()  # the file may have been written since Python last listed the directory
    try:
        with _importable(Path.cwd()):
            return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):
            where = "installed or in the current directory"
            raise UserError(f"there is no module {missing!r} {where}; write file.py:function for a file") from error
        raise UserError(f"cannot import module {name!r}: {describe(error)}") from error


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Imports find `folder` first now, last later: a lazy import still works, and no package is hidden."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


def _offers(module: ModuleType, wanted: str) -> str:
    public = [(name, value) for name, value in vars(module).items() if not name.startswith("_")]
    own = [name for name, value in public if callable(value) and not inspect.isclass(value)]
    near = get_close_matches(wanted, own, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"it has {', '.join(own[:10])}" if own else "it has no function"


def describe(error: BaseException) -> str:
    """An exception in one line: type, message, and the file and line that raised it."""
    message = " ".join(str(error).split())
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    if isinstance(error, SyntaxError):
        return text  # its message names the file and line already
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    return f"{text} ({frames[-1].filename}:{frames[-1].lineno})" if frames else text


def name_of(reward: Callable[..., Any]) -> str:
    """A reward's `name`, or else its function's or class's."""
    name = getattr(reward, "name", None)
    return name if isinstance(name, str) and name else _definition(reward).__name__


def identity_of(reward: Callable[..., Any]) -> dict[str, Any]:
    """What scored: a reward's own `identity`, or its module, qualified name and the SHA-256 of its source.

    Raises:
        UserError: the reward's `identity` is not a dict that JSON can hold.
    """
    name = name_of(reward)
    own = getattr(reward, "identity", None)
    if own is not None:
        if not isinstance(own, dict):
            raise UserError(f"reward {name!r}: its identity is of type {type(own).__name__}: a dict is wanted")
        try:
            json.dumps(own)
        except (TypeError, ValueError) as error:
            raise UserError(f"reward {name!r}: its identity cannot be written as JSON: {error}") from error
        return {"name": name, **own}
    definition = _definition(reward)
    identity = {"name": name, "module": definition.__module__, "qualname": definition.__qualname__}
    if isinstance(reward, functools.partial):
        identity["settings"] = repr((reward.args, reward.keywords))
    with suppress(OSError, TypeError):  # typed at a prompt, or written in C: there is no source to read
        identity["sha256"] = hashlib.sha256(inspect.getsource(definition).encode()).hexdigest()
    return identity


def source_file(reward: Callable[..., Any]) -> str | None:
    """The file that says what `reward` does, where there is one."""
    with suppress(OSError, TypeError):
        return inspect.getsourcefile(_definition(reward))
    return None


def _definition(reward: Callable[..., Any]) -> Any:
    """The function or class whose source says what `reward` does."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    reward = inspect.unwrap(reward)
    return reward if hasattr(reward, "__qualname__") else type(reward)


def library_version(package: str) -> str:
    """The installed version of a package a reward stands on."""
    return importlib.metadata.version(package)
