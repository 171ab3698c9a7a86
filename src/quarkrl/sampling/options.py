"""Options of commands that sample from a finished model. This module imports no torch, so `--help` is fast."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from quarkrl.data.chat_defaults import (
    LAST_TURN_HELP,
    SYSTEM_PROMPT_HELP,
    TEMPLATE_KWARGS_HELP,
    LastTurn,
    read_template_kwargs,
)
from quarkrl.errors import UserError, did_you_mean
from quarkrl.options import check_options, option

if TYPE_CHECKING:
    from quarkrl.sampling.strategy import Sampling

GuidanceRule: TypeAlias = Literal["both", "lower"]
GUIDANCE_RULE_HELP = (
    "Guidance raises and lowers tokens (both), or only lowers those that the contrast prefers (lower): less perplexity."
)
GuidanceScale: TypeAlias = float | str  # A number, or "polite=2,short=1": one for each attribute.
GUIDANCE_SCALE_HELP = (
    "Guidance γ: 1 is off; larger values steer further (default: recorded, or 1). "
    "NAME=γ,NAME=γ guides each of several rewards by its own. "
    "quarkrl evaluate --save_guidance records a default for the best quantile."
)
GUIDANCE_FROM_HELP = "Guidance steers away from a quantile, or from the reference (default: worst)."
STEERED_BY_HELP = (
    "A smaller model with the same tokenizer that Quark trained. Guidance then steers MODEL by its quantiles. γ is 2 "
    "by default (docs/larger.md)."
)
_AS_TRAINED = "The default is that of training."


def read_scale(value: GuidanceScale, name: str = "guidance_scale") -> float | dict[str, float]:
    """Return γ as a number, or the number of each attribute that "NAME=γ,NAME=γ" names.

    Args:
        value: the scale.
        name: of the option, for messages.

    Raises:
        UserError: it is neither, or a number is negative or not finite.
    """
    if isinstance(value, str) and "=" in value:
        pairs = [part.strip().rpartition("=") for part in value.split(",")]
        scales = {attribute: read_number(text, value, name) for attribute, _, text in pairs}
        if "" in scales or len(scales) < len(pairs):
            raise UserError(f"{name} {value!r}: must have one NAME=γ for each reward, such as polite=2,short=1.5.")
        return scales
    return read_number(value, value, name)


def check_attributes(scale: GuidanceScale, attributes: Sequence[str], name: str = "guidance_scale") -> None:
    """Check that γ of each reward names rewards that condition.

    Raises:
        UserError: it names another one.
    """
    scales = read_scale(scale, name)
    for attribute in scales if isinstance(scales, dict) else ():
        if attribute not in attributes:
            raise UserError(
                f"{name} {scale!r}: must name rewards that condition, which are {', '.join(attributes)}."
                f"{did_you_mean(attribute, attributes)}"
            )


def count_passes(scale: GuidanceScale) -> int:
    """Return the forward passes per token of sampling with γ: one, and one for each contrast."""
    scales = read_scale(scale)
    return 1 + sum(number != 1 for number in (scales.values() if isinstance(scales, dict) else [scales]))


def read_number(text: GuidanceScale, value: GuidanceScale, name: str) -> float:
    """Return one γ of a value.

    Raises:
        UserError: it is no number, negative or not finite.
    """
    try:
        number = float(text)
    except ValueError:
        raise UserError(
            f"{name} {value!r}: must be a number, or NAME=γ,NAME=γ. Set 1 to sample without guidance."
        ) from None
    if not (math.isfinite(number) and number >= 0):
        raise UserError(f"{name} {value}: must be finite and at least 0. Set 1 to sample without guidance.")
    return number


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How a command chooses tokens, and what it adds to chats.

    Raises:
        UserError: a value is out of its limits.
    """

    max_new_tokens: int = option(20, "Maximum completion length in tokens, EOS included.", at_least=1, group="sampling")
    min_new_tokens: int = option(0, "Number of tokens before EOS is allowed.", at_least=0, group="sampling")
    temperature: float = option(1.0, "Divisor of the logits.", above=0, group="sampling")
    top_p: float = option(
        0.9, "Nucleus sampling: probability mass of the tokens to keep.", above=0, at_most=1, group="sampling"
    )
    greedy: bool = option(False, "Choose the most likely token at each step.", group="sampling")
    seed: int = option(0, "Seed of the completions.", at_least=0, group="sampling")
    trust_remote_code: bool = option(False, "Run the Python code in a model's repository.", group="sampling")

    system_prompt: str | None = option(None, f"{SYSTEM_PROMPT_HELP} {_AS_TRAINED}", group="chats")
    chat_template_kwargs: dict[str, Any] | str | None = option(
        None, f"{TEMPLATE_KWARGS_HELP} {_AS_TRAINED}", metavar="JSON", group="chats"
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "chat_template_kwargs", read_template_kwargs(self.chat_template_kwargs))
        check_options(self)

    def chat_defaults(self) -> dict[str, Any]:
        """Return the options of chats as arguments of `QuarkGenerator.from_pretrained`."""
        return {"system_prompt": self.system_prompt, "chat_template_kwargs": self.chat_template_kwargs}

    def strategy(self) -> "Sampling":
        """Return the rule that chooses the next token.

        Raises:
            UserError: min_new_tokens is greater than max_new_tokens, or the temperature is too small for float32.
        """
        from quarkrl.sampling.strategy import Sampling

        return Sampling(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            do_sample=not self.greedy,
        )


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(DecodingOptions):
    """How a command samples completions of many prompts."""

    batch_size: int = option(128, "Completions per batch.", at_least=1, group="sampling")
    raw: bool = option(
        False,
        "Leave texts outside the chat template. Those of a chat model are wrapped as a user's message.",
        group="chats",
    )
    last_assistant_turn: LastTurn = option("refuse", LAST_TURN_HELP, metavar="RULE", group="chats")
