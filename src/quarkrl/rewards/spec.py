"""A reward's spec with options: `NAME?option=value&option=value`, written as a URL's query is."""

import inspect
import math
import os
import types
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from urllib.parse import parse_qsl

from quarkrl.errors import UserError

SCORED = ("prompts", "completions", "completion_ids", "end_ids", "on_score")  # what a reward is called with: no options


def split_spec(spec: str) -> tuple[str, dict[str, str]]:
    """Name and options of a spec, the values as text; "%26" is "&", and "+" a space.

    Raises:
        UserError: what follows "?" is no list of options, or gives one twice.
    """
    name, mark, query = spec.partition("?")
    if not mark or os.path.exists(os.path.expanduser(spec)):  # a directory may have a "?" in its name
        return spec, {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True)
    except ValueError as error:
        raise UserError(f"reward {name!r}: {query!r} is no list of options: write option=value&option=value") from error
    options = dict(pairs)
    if len(options) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise UserError(f"reward {name!r}: option {twice!r} is given twice")
    return name, options


def options_of(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The options that a class or function takes, beside what a `partial` of it has set already."""
    taken: set[str] = set(SCORED)
    if isinstance(factory, partial):
        taken |= set(factory.keywords)
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # written in C: it tells nothing
        return {}
    return {p.name: p for p in parameters if p.kind in by_name and p.name not in taken}


def read_options(name: str, factory: Callable[..., Any], given: dict[str, str]) -> dict[str, Any]:
    """The given options as keyword arguments, each of the type that `factory` asks for.

    Raises:
        UserError: there is no such option, or its value is not of its type.
    """
    known = options_of(factory)
    kinds = _hints(factory)
    found = {}
    for option, text in given.items():
        if option not in known:
            near = get_close_matches(option, known, n=1, cutoff=0.6)
            listed = f"it has {', '.join(known)}" if known else "it has none"
            hint = f"did you mean {near[0]!r}? ({listed})" if near else listed
            raise UserError(f"reward {name!r} has no option {option!r}: {hint}")
        default = known[option].default
        kind = kinds.get(option, type(default) if isinstance(default, (bool, int, float)) else str)
        try:
            found[option] = _converted(text, kind)
        except ValueError as error:
            raise UserError(f"reward {name!r}: {option} is {text!r}: {error} is wanted") from error
    return found


def missing_options(factory: Callable[..., Any], given: dict[str, Any]) -> list[str]:
    """The options without which `factory` cannot be called."""
    return [name for name, p in options_of(factory).items() if p.default is p.empty and name not in given]


def _hints(factory: Callable[..., Any]) -> dict[str, Any]:
    while isinstance(factory, partial):
        factory = factory.func
    if inspect.isclass(factory):
        target: Any = factory.__init__
    else:
        target = factory if inspect.isroutine(factory) else type(factory).__call__
    try:
        return get_type_hints(target)
    except (NameError, TypeError, AttributeError):  # a user's annotations may name what is not there
        return {}


def _converted(text: str, kind: Any) -> Any:
    """`text` as `kind`; a ValueError names what is wanted."""
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    origins = {get_origin(k) or k for k in kinds}
    if Literal in origins:
        wanted = next(get_args(k) for k in kinds if get_origin(k) is Literal)
        if text not in wanted:
            raise ValueError(" or ".join(repr(value) for value in wanted))
        return text
    if str in origins:
        return text
    if type(None) in origins and text.lower() == "none":
        return None
    if bool in origins:
        if text.lower() not in ("true", "false"):
            raise ValueError("true or false")
        return text.lower() == "true"
    if origins & {Sequence, list, tuple}:
        return [part.strip() for part in text.split(",")]
    if int in origins:
        return _number(text, int, "a whole number")
    if float in origins:
        return _number(text, float, "a number")
    return text


def _number(text: str, kind: type, wanted: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(wanted) from None
    if not math.isfinite(value):
        raise ValueError(wanted)
    return value
