"""Options as dataclass fields, each declared once: help, limits, choices, and whether a resumed run may change it.

Checks (`check_options`), `--help`, the identity of a run and docs/options.md are derived from the declaration.
"""

import dataclasses
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from quarkrl.errors import UserError, did_you_mean

# Whether a resumed run may change an option:
# - "free": always.
# - "branch": only if it starts from an explicit checkpoint.
# - "fixed": never.
# - "selection": as "branch" in a run that keeps its best checkpoint, and as "free" in any other.
Resume = Literal["free", "branch", "fixed", "selection"]


class _Metadata(dict):
    """The declaration of an option. Only its help is listed; the rest is read by key.

    transformers' `HfArgumentParser` and TRL's `TrlParser` pass every listed key to argparse, which knows only `help`.
    """

    def keys(self) -> Any:
        return self.copy().keys()

    def copy(self) -> dict[str, Any]:
        return {"help": self["help"]}


def option(  # noqa: PLR0913 - one keyword per property of an option
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    default_factory: Any = dataclasses.MISSING,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    choices: Sequence[Any] | None = None,
    infinite: bool = False,
    group: str = "",
    metavar: str | None = None,
    resume: Resume = "branch",
    rare: bool = False,
    fitted: bool = False,
) -> Any:
    """Declare an option as a dataclass field.

    Args:
        default, default_factory: as in `dataclasses.field`.
        help: the first sentence is shown by `--help`, all of it in the reference page.
        at_least, above, at_most: limits of a number, or of each number in a list; None is not checked.
        choices: the valid values.
        infinite: whether infinity is valid.
        group: the heading in `--help`.
        metavar: the placeholder in `--help`.
        resume: whether a resumed run may change the option.
        rare: whether `--help` leaves the option out, so that the list stays short; `--help_all` has it.
        fitted: whether `quarkrl train` fits the default to model, prompts and rewards (`training.sizing`).
    """
    metadata = _Metadata(
        help=help,
        at_least=at_least,
        above=above,
        at_most=at_most,
        choices=choices,
        infinite=infinite,
        group=group,
        metavar=metavar,
        resume=resume,
        rare=rare,
        fitted=fitted,
    )
    return dataclasses.field(default=default, default_factory=default_factory, metadata=metadata)


def default_of(field: dataclasses.Field) -> Any:
    """Return the default of a dataclass field, or `dataclasses.MISSING`."""
    factory: Callable[[], Any] | Any = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def check_options(options: Any, inherited: Mapping[str, dataclasses.Field] | None = None) -> None:
    """Check the value of every field declared with `option` against its limits and choices.

    Args:
        options: a dataclass instance.
        inherited: declarations of fields that `options` inherits from a class that does not use `option`, by name.

    Raises:
        UserError: a value is out of its limits, or not one of its choices.
    """
    kinds = {field.name: kind for field, kind in typed_fields(type(options))}
    declared = {field.name: field for field in dataclasses.fields(options)} | dict(inherited or {})
    for name, field in declared.items():
        if "resume" not in field.metadata or isinstance(getattr(type(options), name, None), property):
            continue
        value, choices = getattr(options, name), choices_of(field, kinds.get(name))
        for item in value if isinstance(value, list | tuple) else [value]:
            if item is not None and (limit := _broken_limit(field, choices, item)):
                raise UserError(f"{name} {item!r}: must be {limit}.{_remedy(name, field, choices, item)}")


def limits_in_words(metadata: Mapping[str, Any]) -> str:
    """Return the limits of an option, such as "greater than 0 and at most 1", or "" if it has none."""
    words = {"at_least": "at least", "above": "greater than", "at_most": "at most"}
    limits = (f"{word} {metadata[key]}" for key, word in words.items() if metadata.get(key) is not None)
    return " and ".join(limits)


def typed_fields(options: type) -> list[tuple[dataclasses.Field, Any]]:
    """Return each field of a dataclass with its type, where `X | None` counts as X."""
    hints = get_type_hints(options)
    return [(field, _without_none(hints[field.name])) for field in dataclasses.fields(options) if field.init]


def takes_list(kind: Any) -> bool:
    """Return whether an option of this type takes several values."""
    return (get_origin(kind) or kind) in (list, tuple)


def choices_of(field: dataclasses.Field, kind: Any) -> tuple[Any, ...]:
    """Return the valid values of an option: its metadata `choices`, or those of its type if that is a `Literal`.

    Args:
        field: declares the option.
        kind: its type, from `typed_fields`; in a list, the type of the items counts.
    """
    item = get_args(kind)[0] if takes_list(kind) and get_args(kind) else kind
    return tuple(field.metadata.get("choices") or (get_args(item) if get_origin(item) is Literal else ()))


def _without_none(kind: Any) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        kinds = [member for member in get_args(kind) if member is not type(None)]
        return kinds[0] if len(kinds) == 1 else Union[tuple(kinds)]  # noqa: UP007 - of a list that is made here
    return kind


def _broken_limit(field: dataclasses.Field, choices: Sequence[Any], value: Any) -> str:
    """Return the limits of an option in words if the value breaks one of them, else ""."""
    metadata = field.metadata
    if choices:
        return "" if value in choices else join_words(choices)
    if isinstance(value, str):
        return ""  # An option that takes a number or a text checks its texts itself.
    words = limits_in_words(metadata)
    if isinstance(value, float) and not math.isfinite(value):
        if metadata.get("infinite"):
            return "" if value > 0 else words
        return f"{words} and finite" if words else "finite"
    at_least, above, at_most = (metadata.get(name) for name in ("at_least", "above", "at_most"))
    inside = (
        (at_least is None or value >= at_least)
        and (above is None or value > above)
        and (at_most is None or value <= at_most)
    )
    return "" if inside else words


def _remedy(name: str, field: dataclasses.Field, choices: Sequence[Any], value: Any) -> str:
    if hint := did_you_mean(str(value), map(str, choices)):
        return hint
    default = default_of(field)
    if default is dataclasses.MISSING or default is None or field.metadata.get("fitted"):
        return f" Set --{name} to such a value, or leave it out."
    words = " ".join(map(str, default)) if isinstance(default, list | tuple) else default
    return f" The default is --{name} {words}."


def join_words(words: Iterable[Any]) -> str:
    """Return words as a list in a sentence, such as "a, b or c"."""
    *first, last = map(str, words)
    return f"{', '.join(first)} or {last}" if first else last
