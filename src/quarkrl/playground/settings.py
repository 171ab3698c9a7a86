"""`Settings`: what a user has set on the page, and the same as the query of a URL, so that a page can be shared."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from quarkrl.errors import UserError, shorten
from quarkrl.options import check_options, option, typed_fields
from quarkrl.sampling.options import GuidanceRule

if TYPE_CHECKING:
    from quarkrl.sampling.strategy import Sampling

MAX_SAMPLES = 32


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a user has set on the page. The names are those of the options of `quarkrl generate`.

    Attributes:
        prompt: the text to continue, or the first message of the user.
        replies: the user's further messages of a chat, each after the answer to the one before.
        chat: whether the prompt is a message.
        system_prompt: the system message of a chat; "" for the default of the chat template.
        quantile: of the column that can be chosen: a name or number, or NAME=Q,NAME=Q.

    Raises:
        UserError: a value is out of its limits.
    """

    prompt: str = ""
    replies: tuple[str, ...] = ()
    chat: bool = False
    system_prompt: str = ""
    quantile: str = "best"
    guidance_scale: float = option(1.0, at_least=0)
    guidance_rule: GuidanceRule = option("both")
    temperature: float = option(1.0, above=0)
    top_p: float = option(0.9, above=0, at_most=1)
    max_new_tokens: int = option(20, at_least=1)
    num_return_sequences: int = option(4, at_least=1, at_most=MAX_SAMPLES)
    seed: int = option(0, at_least=0)

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def messages(self) -> tuple[str, ...]:
        """All messages of the user in a chat; otherwise the prompt alone."""
        return (self.prompt, *self.replies) if self.chat else (self.prompt,)

    def strategy(self) -> "Sampling":
        """Return the rule that chooses the next token."""
        from quarkrl.sampling.strategy import Sampling

        return Sampling(max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p)

    def to_query(self, defaults: "Settings") -> str:
        """Return the query of a URL that restores the settings: the prompt, and what differs from the defaults."""
        values = dataclasses.asdict(self)
        usual = dataclasses.asdict(defaults)
        return urlencode({name: _text(value) for name, value in values.items() if value != usual[name]})

    @classmethod
    def from_query(cls, query: Mapping[str, str], defaults: "Settings") -> "Settings":
        """Return the defaults with the values of a URL's query; names that are no settings are ignored.

        Raises:
            UserError: a value is of the wrong type, or out of its limits.
        """
        kinds = {field.name: kind for field, kind in typed_fields(cls)}
        values = {name: _read(name, text, kinds[name]) for name, text in query.items() if name in kinds}
        return dataclasses.replace(defaults, **values)

    @classmethod
    def from_page(cls, **values: Any) -> "Settings":
        """Return settings from the values of components, which send no number, or 20.0 for 20.

        Raises:
            UserError: a value is of the wrong type, or out of its limits.
        """
        kinds = {field.name: kind for field, kind in typed_fields(cls)}
        return cls(**{name: _read(name, _text(value), kinds[name]) for name, value in values.items()})


def _text(value: Any) -> str:
    """A value as text: 20.0 as "20", nothing as "", and several texts as JSON."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        return json.dumps(value, ensure_ascii=False)
    return f"{value:.10g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _read(name: str, text: str, kind: Any) -> Any:
    """Read the value of a setting from text."""
    if kind is bool:
        return text.lower() in ("true", "1", "yes")
    if kind == tuple[str, ...]:
        return _read_texts(name, text)
    if kind not in (int, float):
        return text
    try:
        return kind(text)
    except ValueError:
        noun = "an integer" if kind is int else "a number"
        raise UserError(f"{name} {text!r}: must be {noun}.") from None


def _read_texts(name: str, text: str) -> tuple[str, ...]:
    try:
        texts = json.loads(text)
    except ValueError:
        texts = None
    if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
        raise UserError(f"{name} {shorten(text)}: must be a list of texts in JSON.")
    return tuple(texts)
