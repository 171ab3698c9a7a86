"""Names: of models, and of things of one kind, such as rewards, judges and sets of prompts."""

from collections.abc import Collection, Iterable
from pathlib import Path


def is_missing_path(name: str) -> bool:
    """Return whether a model's name is a path at which there is nothing, and so no name on the hub.

    A name on the hub is NAME or OWNER/NAME. An owner that is a directory here is meant as one.
    """
    path = Path(name).expanduser()
    has_form_of_path = name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1
    is_path = has_form_of_path or name.endswith(".gguf") or ("/" in name and path.parent.is_dir())
    return is_path and not path.exists()


def unique_names(names: Iterable[str], taken: Collection[str] = ()) -> list[str]:
    """Return the names in order, each different from the ones before it and from those that are `taken`.

    A second `x` becomes `x-2`, or the first of `x-3`, `x-4`, … that is free.
    """
    unique: list[str] = []
    for name in names:
        candidate, count = name, 1
        while candidate in unique or candidate in taken:
            count += 1
            candidate = f"{name}-{count}"
        unique.append(candidate)
    return unique
