"""Names of things of one kind: rewards, judges, sets of prompts."""

from collections.abc import Collection, Iterable


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
