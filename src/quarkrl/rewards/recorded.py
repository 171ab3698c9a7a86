"""From the provenance of a reward, which `quark.json` records, back to the text that names it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from quarkrl.errors import UserError, shorten
from quarkrl.rewards.registry import REWARDS
from quarkrl.rewards.spec import missing_options

_SETTINGS = {"brevity": ("max_words",), "classifier": ("label", "text"), "repetition": ("unit", "min_units")}


def specs_of(identities: Any) -> list[str]:
    """Return the specs of recorded rewards, for `resolve`. Code is never among them: a function of a file has none.

    Args:
        identities: what `Scorer.identity` returned.

    Raises:
        UserError: a reward cannot be named again: it is a function of the user's, or has options that are not recorded.
    """
    if not isinstance(identities, Sequence) or not all(isinstance(identity, Mapping) for identity in identities):
        raise UserError(f"quark.json rewards {shorten(identities)}: must be a list of objects. Set --reward.")
    return [_spec(identity) for identity in identities]


def _spec(identity: Mapping[str, Any]) -> str:
    name = identity.get("name")
    if "model" in identity and "function" in identity:
        kind, base = "classifier", identity["model"]
    else:
        kind = base = str(name).removesuffix("-words") if "unit" in identity else str(name)
    if kind not in _SETTINGS and (
        base not in REWARDS or missing_options(REWARDS[base], {}) or {"module", "column"} & {*identity}
    ):
        raise UserError(
            f"reward {shorten(name)} of training: must be named again, because code that quark.json names is "
            f"never run. Set --reward {_form_of(identity)}."
        )
    settings = {key: identity[key] for key in _SETTINGS.get(kind, ()) if identity.get(key) is not None}
    return f"{base}?{urlencode(settings)}" if settings else base


def _form_of(identity: Mapping[str, Any]) -> str:
    """Return how the user may have named a reward: the file of a function has its hash in the name of its module."""
    module, function = identity.get("module"), identity.get("qualname")
    if not isinstance(module, str) or not isinstance(function, str):
        return "FILE.py:FUNCTION"
    file = re.fullmatch(r"(.+)_[0-9a-f]{12}", module)
    return f"{file[1]}.py:{function}" if file else f"{module}:{function}"
