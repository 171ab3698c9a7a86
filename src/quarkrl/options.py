"""Options as dataclass fields. An option is declared once, with its help, limits, choices and resume rule.

Checks (`check_options`), `--help`, the identity of a run and the reference page are derived from the declaration.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

from quarkrl.errors import UserError

Resume = Literal["free", "branch", "fixed"]


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    default_factory: Any = dataclasses.MISSING,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    choices: Sequence[str] | None = None,
    infinite: bool = False,
    group: str = "",
    metavar: str | None = None,
    resume: Resume = "branch",
) -> Any:
    """Declare an option as a dataclass field.

    Args:
        default, default_factory: as in `dataclasses.field`.
        help: one sentence for `--help` and the reference page.
        at_least, above, at_most: limits of a number, or of each number in a list; None is not checked.
        choices: the valid values.
        infinite: whether infinity is valid.
        group: the heading in `--help`.
        metavar: the placeholder in `--help`.
        resume: whether a resumed run may change the option: "free" always, "branch" only when it starts from an
            explicit checkpoint, "fixed" never.
    """
    metadata = {
        "help": help,
        "at_least": at_least,
        "above": above,
        "at_most": at_most,
        "choices": choices,
        "infinite": infinite,
        "group": group,
        "metavar": metavar,
        "resume": resume,
    }
    return dataclasses.field(default=default, default_factory=default_factory, metadata=metadata)


def check_options(options: Any) -> None:
    """Check the value of every field declared with `option` against its limits and choices.

    Args:
        options: a dataclass instance.

    Raises:
        UserError: a value is out of its limits, or not one of its choices.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        for item in value if isinstance(value, list | tuple) else [value]:
            if item is not None and (limit := _broken_limit(item, field.metadata)):
                raise UserError(f"{field.name} {item!r}: must be {limit}. Set --{field.name} to such a value.")


def _broken_limit(value: Any, limits: Any) -> str | None:
    """Return the limits of an option in words if the value breaks one of them."""
    if choices := limits.get("choices"):
        return None if value in choices else f"one of {', '.join(map(str, choices))}"
    at_least, above, at_most = (limits.get(name) for name in ("at_least", "above", "at_most"))
    if at_least is None and above is None and at_most is None:
        return None
    inside = (
        (at_least is None or value >= at_least)
        and (above is None or value > above)
        and (at_most is None or value <= at_most)
        and (limits.get("infinite") or math.isfinite(value))
    )
    if inside:
        return None
    words = [f"at least {at_least}"] if at_least is not None else []
    words += [f"greater than {above}"] if above is not None else []
    words += [f"at most {at_most}"] if at_most is not None else []
    words += ["finite"] if isinstance(value, float) and not math.isfinite(value) else []
    return " and ".join(words)
