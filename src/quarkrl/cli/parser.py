"""Flags of the command line, built from dataclasses whose fields are declared by `quarkrl.options.option`.

`add_flags` declares them, `Parser.parse` reads them, and `options_from` makes the dataclass. Errors are `UserError`s.
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar, get_args

from quarkrl.cli.option_names import suggest
from quarkrl.errors import UserError, did_you_mean
from quarkrl.options import choices_of, default_of, join_words, takes_list, typed_fields

Options = TypeVar("Options")

_METAVARS = {int: "N", float: "X", bool: "BOOL", str: "TEXT"}
_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `UserError`s and that accepts hyphens for underscores in names of flags.

    Attributes:
        flag_names: names of all flags, without dashes; an unknown flag is compared with them.
    """

    def __init__(self, **kwargs: Any):
        self.flag_names: list[str] = []
        super().__init__(formatter_class=_formatter, allow_abbrev=False, **kwargs)

    def add_argument(self, *names: str, **settings: Any) -> Any:
        """Add an argument as `argparse` does, and remember its name if it is a flag."""
        self.flag_names += [name[2:] for name in names if name.startswith("--")]
        return super().add_argument(*names, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise a `UserError` instead of printing the usage."""
        if names := re.fullmatch(r"the following arguments are required: (.*)", message):
            raise self._missing(names[1].split(", ")[0])
        # argparse writes "argument --name: …"; ours is "name …".
        message = re.sub(r"^argument -{0,2}([^\s:/]+)[^\s:]*: ", r"\1 ", message)
        message = re.sub(r" invalid (\w+) value: (.*)$", r" \2: must be of type \1.", message)
        message = re.sub(r" invalid choice: (.*) \(choose from (.*)\)$", r" \1: must be one of \2.", message)
        message = re.sub(r"^(\S+) expected .*$", r"\1: must have a value. Write it behind --\1.", message)
        message = re.sub(
            r"^(\S+) ignored explicit argument (.*)$", r"\1 \2: must be left out. Set --\1 alone.", message
        )
        raise UserError(message)

    def _missing(self, name: str) -> UserError:
        """Return the error for an argument that is required, with its help."""
        if name == "--reward":
            from quarkrl.cli.inputs import missing_reward

            return missing_reward()
        known = (action for action in self._actions if name in (*action.option_strings, action.metavar, action.dest))
        described = (next(known).help or "").split(". ")[0].rstrip(".")
        where = f"Set {name}" if name.startswith("--") else f"Write it behind {self.prog}"
        return UserError(f"{name.lstrip('-')} is missing. {where} ({described}).")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as `argparse` does, after replacing hyphens in the names of flags."""
        argv = sys.argv[1:] if args is None else args
        return super().parse_known_args([_underscored(argument) for argument in argv], namespace)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse arguments.

        Raises:
            UserError: a flag is unknown (the message names the nearest known one) or has an invalid value.
        """
        arguments, unknown = self.parse_known_args(argv)
        if unknown and not unknown[0].startswith("-"):  # argparse reads no more texts after a flag.
            arguments, unknown = self.parse_known_intermixed_args(argv)
        if unknown:
            flag = unknown[0].split("=")[0]
            if not flag.startswith("-"):
                is_config = flag.endswith((".yaml", ".yml")) and "config" in self.flag_names
                remedy = (
                    f"Did you mean '--config {flag}'?" if is_config else "Write it behind its option, or leave it out."
                )
                raise UserError(f"{flag!r}: must be the value of an option. {remedy}")
            raise UserError(f"unknown option {flag}.{suggest(flag.lstrip('-'), self.flag_names)}")
        return arguments


def add_flags(
    parser: Parser,
    *classes: type,
    groups: Sequence[str] = (),
    switches: bool = True,
    describe: Callable[[dataclasses.Field], str] | None = None,
) -> None:
    """Add a flag for each field of dataclasses.

    Args:
        parser: receives the flags.
        classes: dataclasses; a field without a default is a required flag.
        groups: headings of `--help`, in order; a field's own heading is its metadata `group`.
        switches: whether an option that is False by default is a bare flag. Otherwise it takes an optional value, as
            the flags of transformers do. A subcommand with positional arguments needs bare flags.
        describe: makes the text for `--help` from a field; `summarize` by default.
    """
    describe = describe or summarize
    declared = [(field, kind) for options in classes for field, kind in typed_fields(options)]
    titles = dict.fromkeys([*groups, *(field.metadata.get("group", "") for field, _ in declared)])
    for title in titles:
        target = parser.add_argument_group(title) if title else parser
        for field, kind in declared:
            if field.metadata.get("group", "") == title:
                if target is not parser:
                    parser.flag_names.append(field.name)
                _add_flag(target, field, kind, switches, describe(field).replace("%", "%%"))


def options_from(arguments: argparse.Namespace, options: type[Options]) -> Options:
    """Make a dataclass from the parsed arguments of its fields' names.

    Raises:
        UserError: a value is invalid.
    """
    names = [field.name for field in dataclasses.fields(options) if field.init]  # type: ignore[arg-type]
    return options(**{name: getattr(arguments, name) for name in names})


def summarize(field: dataclasses.Field) -> str:
    """Return an option's text for `--help`: the first sentence of its help, and its default; a rare one is hidden."""
    if field.metadata.get("rare"):
        return argparse.SUPPRESS
    return re.split(r"\.(?= [A-Z])", field.metadata.get("help", ""))[0].rstrip(".") + _default_in_words(field)


def describe_fully(field: dataclasses.Field) -> str:
    """Return the whole help of an option, and its default."""
    return field.metadata.get("help", "") + _default_in_words(field)


def _default_in_words(field: dataclasses.Field) -> str:
    default = default_of(field)
    if default is None or default is False or default is dataclasses.MISSING or default in ([], ()):
        return ""
    return f" (default {' '.join(map(str, default)) if isinstance(default, list | tuple) else default})"


def _add_flag(target: Any, field: dataclasses.Field, kind: Any, switches: bool, text: str) -> None:
    default = default_of(field)
    settings: dict[str, Any] = {"help": text, "required": default is dataclasses.MISSING, "dest": field.name}
    settings["default"] = None if settings["required"] else default
    if kind is bool and switches and not default:
        target.add_argument(f"--{field.name}", action="store_true", **settings)
        return
    of_item = get_args(kind)[0] if takes_list(kind) else kind
    is_bool = kind in (bool, bool | str)
    choices = choices_of(field, kind)
    settings["metavar"] = field.metadata.get("metavar") or _METAVARS.get(
        of_item, "|".join(map(str, choices)) or "VALUE"
    )
    settings["type"] = reader(of_item, choices)
    if takes_list(kind):
        settings["nargs"] = "+"
    if is_bool:
        settings |= {"nargs": "?", "const": True}
    target.add_argument(f"--{field.name}", **settings)
    if kind is bool and default is True:
        target.add_argument(f"--no_{field.name}", action="store_false", dest=field.name, help=argparse.SUPPRESS)


def reader(kind: Any, choices: Sequence[Any] = ()) -> Callable[[str], Any]:
    """Return a function that reads the text of a flag as a type."""

    def read(text: str) -> Any:
        if kind in (bool, bool | str) and is_bool(text):
            return text.lower() in _TRUE
        if choices and text not in choices:
            raise argparse.ArgumentTypeError(
                f"{text!r}: must be {join_words(choices)}.{did_you_mean(text, map(str, choices))}"
            )
        if kind is bool:
            raise argparse.ArgumentTypeError(f"{text!r}: must be true or false.")
        if kind == float | str:
            return float(text) if _is_number(text) else text
        if kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                noun = "an integer" if kind is int else "a number"
                raise argparse.ArgumentTypeError(f"{text!r}: must be {noun}.") from None
        return text

    return read


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def is_bool(text: str) -> bool:
    """Return whether a text is a word for true or false."""
    return text.lower() in (*_TRUE, *_FALSE)


def _underscored(argument: str) -> str:
    """Replace hyphens by underscores in `--some-flag` and `--some-flag=value`."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _formatter(prog: str) -> argparse.HelpFormatter:
    """Return a help formatter with one line per option in 120 columns. A narrower terminal wraps the lines itself."""
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=38, width=120)
