"""Load reward functions of the user's own: `file.py:function` and `module:function`."""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from quarkrl.errors import UserError, describe_exception, did_you_mean, near_file


def load_function(spec: str) -> Any:
    """Import and return what `file.py:function` or `module:function` names. The current directory is importable.

    Raises:
        UserError: the file, module or function does not exist, or importing it fails.
    """
    source, colon, path = spec.rpartition(":")
    if not (source and colon and path):
        raise UserError(f"reward {spec!r}: must name a function. Write file.py:function or module:function.")
    module = _load_file(Path(source).expanduser()) if source.endswith(".py") else _load_module(source)
    value: Any = module
    for part in path.split("."):
        if not hasattr(value, part):
            raise UserError(f"reward {spec!r}: {source} has no {path!r}.{_suggestion(module, path)}")
        value = getattr(value, part)
    return value


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        near = near_file(path, (file.name for file in path.parent.glob("*.py")))
        raise UserError(f"reward {str(path)!r}: must be an existing file.{near or ' Correct the path.'}")
    path = path.resolve()
    # The module's name contains the hash of the file. So two rewards of one file share a module, and an edited file is
    # loaded again (in a notebook). The name is part of a reward's identity, and is equal on every machine.
    name = f"{path.stem}_{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__file__ == str(path):
        return loaded
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # As an import does: dataclasses and inspect look up a class's module there.
    try:
        with _importable(path.parent):
            module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"reward file {path.name}: cannot import it: {describe_exception(error)}") from error
    return module


def _load_module(name: str) -> ModuleType:
    importlib.invalidate_caches()  # The file may be newer than Python's last listing of the directory.
    try:
        with _importable(Path.cwd()):
            return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):
            raise UserError(
                f"reward module {missing!r}: must be installed or in the current directory. "
                "Write file.py:function to load a file."
            ) from error
        raise UserError(f"reward module {name!r}: cannot import it: {describe_exception(error)}") from error


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Put `folder` first in the import path, then last, so that lazy imports work and no package is hidden."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


def _suggestion(module: ModuleType, function: str) -> str:
    """The functions of a module that the user may have meant, as a sentence."""
    public = [(name, value) for name, value in vars(module).items() if not name.startswith("_")]
    functions = [name for name, value in public if callable(value) and not inspect.isclass(value)]
    if hint := did_you_mean(function, functions):
        return hint
    return f" It has {', '.join(functions[:10])}." if functions else " It has no function."
