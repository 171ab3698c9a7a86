"""Parse a reward with options, `NAME?option=value&option=value`, which is written like a URL with a query."""

import inspect
import math
import os
import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from urllib.parse import parse_qsl

from quarkrl.errors import UserError, did_you_mean
from quarkrl.rewards.reward import PARAMETERS


def split_spec(spec: str) -> tuple[str, dict[str, str]]:
    """Split a spec into its name and its options. Values are texts, decoded as in a URL: "%26" is "&", "+" a space.

    Raises:
        UserError: the text after "?" is not a list of options, or contains one twice.
    """
    name, mark, query = spec.partition("?")
    if not mark or os.path.exists(os.path.expanduser(spec)):  # A directory may have a "?" in its name.
        return spec, {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True)
    except ValueError as error:
        raise UserError(f"reward {name!r} options {query!r}: must be option=value&option=value.") from error
    options = dict(pairs)
    if len(options) < len(pairs):
        repeated = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise UserError(f"reward {name!r} option {repeated!r}: must not be repeated.")
    return name, options


def options_of(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters of a class or function that are options.

    Parameters of the reward protocol and keywords that a `partial` has set are not options.
    """
    excluded: set[str] = set(PARAMETERS)
    if isinstance(factory, partial):
        excluded |= set(factory.keywords)
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # Implemented in C, without a signature.
        return {}
    return {p.name: p for p in parameters if p.kind in by_name and p.name not in excluded}


def read_options(name: str, factory: Callable[..., Any], texts: dict[str, str]) -> dict[str, Any]:
    """Convert options from text to keyword arguments of the types that `factory` annotates.

    Args:
        name: the reward's name, for error messages.
        factory: the class or function that receives the options.
        texts: by option, its value as text.

    Raises:
        UserError: there is no such option, or a value is not of its option's type.
    """
    known = options_of(factory)
    types_by_option = _type_hints(factory)
    values = {}
    for option, text in texts.items():
        if option not in known:
            listed = f"must be one of {', '.join(known)}." if known else "must be unset. The reward has no options."
            raise UserError(f"reward {name!r} option {option!r}: {listed}{did_you_mean(option, known)}")
        default = known[option].default
        kind = types_by_option.get(option, type(default) if isinstance(default, (bool, int, float)) else str)
        try:
            values[option] = _convert(text, kind)
        except ValueError as error:
            raise UserError(f"reward {name!r} {option} {text!r}: must be {error}.") from error
    return values


def missing_options(factory: Callable[..., Any], options: dict[str, Any]) -> list[str]:
    """Return the required options of `factory` that `options` lacks."""
    return [name for name, p in options_of(factory).items() if p.default is p.empty and name not in options]


def _type_hints(factory: Callable[..., Any]) -> dict[str, Any]:
    while isinstance(factory, partial):
        factory = factory.func
    if inspect.isclass(factory):
        target: Any = factory.__init__
    else:
        target = factory if inspect.isroutine(factory) else type(factory).__call__
    try:
        return get_type_hints(target)
    except (NameError, TypeError, AttributeError):  # A user's annotation may name something that does not exist.
        return {}


def _convert(text: str, kind: Any) -> Any:
    """Convert `text` to the type `kind`; the message of the ValueError is the limit, such as "a number"."""
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    origins = {get_origin(k) or k for k in kinds}
    if Literal in origins:
        choices = next(get_args(k) for k in kinds if get_origin(k) is Literal)
        if text not in choices:
            raise ValueError(" or ".join(repr(choice) for choice in choices))
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
        return _number(text, int, "an integer")
    if float in origins:
        return _number(text, float, "a number")
    return text


def _number(text: str, kind: type, limit: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(limit) from None
    if not math.isfinite(value):
        raise ValueError(limit)
    return value
