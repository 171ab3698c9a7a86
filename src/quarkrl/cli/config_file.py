"""The file that `--config` names, a preset or YAML: its entries as flags that precede the user's own."""

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from quarkrl.cli.parser import Parser, reader
from quarkrl.errors import UserError, did_you_mean, one_line, shorten

PRESETS = Path(__file__).parents[1] / "presets"


def preset_names() -> list[str]:
    """Return the names of the presets in the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_config(name: str, known: Collection[str]) -> dict[str, Any]:
    """Read a preset or a YAML file.

    Args:
        name: of a preset, or path of a file.
        known: names of the valid keys.

    Raises:
        UserError: there is no such preset or file, it is not a YAML mapping, or a key is unknown.
    """
    import yaml

    path = PRESETS / f"{name}.yaml" if name in preset_names() else Path(name)
    try:
        entries = yaml.safe_load(path.read_bytes())  # UTF-8, or UTF-16 with a byte order mark.
    except OSError as error:
        presets = ", ".join(preset_names())
        raise UserError(
            f"config {name!r}: must be a file or one of {presets}.{did_you_mean(name, preset_names())}"
        ) from error
    except yaml.YAMLError as error:
        raise UserError(f"config {str(path)!r}: must be valid YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(entries, dict):
        raise UserError(f"config {str(path)!r}: must map options to values, not be of type {type(entries).__name__}.")
    for key in entries:
        if key not in known:
            raise UserError(f"config {str(path)!r}: unknown key {key!r}.{did_you_mean(str(key), known)}")
    return entries


def file_entries(argv: Sequence[str], known: Collection[str]) -> tuple[dict[str, Any], str]:
    """Return the entries of the file that --config names, or of the config.yaml of the run to resume; and its name."""
    first = Parser(add_help=False)
    first.add_argument("--config")
    first.add_argument("--output_dir", default="")
    first.add_argument("--resume", nargs="?", const=True, type=reader(bool))
    arguments = first.parse_known_args(argv)[0]
    name, saved = arguments.config, Path(arguments.output_dir) / "config.yaml"
    if arguments.resume and not name and saved.exists():
        name = str(saved)
    return ({}, "") if name is None else (load_config(name, known), name)


def check_entries(
    source: str, entries: dict[str, Any], lists: Collection[str], without_null: Collection[str] = ()
) -> None:
    """Check that each value can follow a flag: a word, a number, a list of them, or a mapping that is JSON.

    Args:
        source: names the file in messages.
        entries: the values by option.
        lists: the options that may have several values.
        without_null: the options that may not be null.
    """
    for key, value in entries.items():
        if value is None and key in without_null:
            raise UserError(f"{key} in {source}: must not be null. Set a value, or leave the line out.")
        if isinstance(value, list):
            if key not in lists:
                raise UserError(f"{key} in {source}: must be one value, not a list.")
            for item in value:
                if isinstance(item, dict | list | None) or str(item).startswith("--"):
                    raise UserError(f"{key} in {source}: must hold words or numbers, not {shorten(item, 40)}.")
        elif isinstance(value, dict):
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise UserError(f"{key} in {source}: must be writable as JSON ({one_line(error)}).") from error


def as_flags(entries: dict[str, Any]) -> Iterator[str]:
    """Yield the entries as flags."""
    for key, value in entries.items():
        if value is None:
            continue
        if isinstance(value, list):
            yield from (f"--{key}", *map(str, value))
        elif key == "fsdp" and value is True:
            yield "--fsdp"  # TrainingArguments reads the bare flag, and takes a word after it for an old option.
        else:
            yield f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"
