"""Options of commands that sample from a finished model. This module imports no torch, so `--help` is fast."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from quarkrl.data.chat_defaults import (
    LAST_TURN_HELP,
    SYSTEM_PROMPT_HELP,
    TEMPLATE_KWARGS_HELP,
    LastTurn,
    read_template_kwargs,
)
from quarkrl.options import check_options, option

if TYPE_CHECKING:
    from quarkrl.sampling.strategy import Sampling

GuidanceRule: TypeAlias = Literal["both", "lower"]
GUIDANCE_RULE_HELP = (
    "Guidance raises and lowers tokens (both), or only lowers those that the contrast prefers (lower): less perplexity."
)
GUIDANCE_SCALE_HELP = (
    "Guidance γ: 1 is off; larger values steer further (default: recorded, or 1). "
    "quarkrl evaluate --save_guidance records a default for the best quantile."
)
GUIDANCE_FROM_HELP = "Guidance steers away from a quantile, or from the reference (default: worst)."
_AS_TRAINED = "The default is that of training."


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
