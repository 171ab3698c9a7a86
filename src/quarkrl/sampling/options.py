"""Options of commands that sample from a finished model. This module imports no torch, so `--help` is fast."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quarkrl.options import check_options, option

if TYPE_CHECKING:
    from quarkrl.sampling.strategy import Sampling


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How a command samples completions.

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
    batch_size: int = option(128, "Completions per batch.", at_least=1, group="sampling")
    trust_remote_code: bool = option(False, "Run the Python code in a model's repository.", group="sampling")

    def __post_init__(self) -> None:
        check_options(self)

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
