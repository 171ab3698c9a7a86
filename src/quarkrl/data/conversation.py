"""`Conversation`: what a user and a model have said in turn, and the chat that asks the model for its next answer."""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Conversation:
    """Messages of a user and answers of a model, in turn.

    Attributes:
        system: the system message; None for the default of the chat template.
        messages: behind the system message.
    """

    system: str | None = None
    messages: tuple[dict[str, Any], ...] = ()

    def ask(self, text: str) -> list[dict[str, Any]]:
        """Return the chat whose completion answers the user's next message."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.messages, {"role": "user", "content": text}]

    def with_turn(self, text: str, answer: str) -> "Conversation":
        """Return the conversation after the user's next message and the model's answer."""
        turn = ({"role": "user", "content": text}, {"role": "assistant", "content": answer})
        return replace(self, messages=(*self.messages, *turn))
