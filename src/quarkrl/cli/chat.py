"""`quarkrl chat`: talk to a model, and change its quantile or guidance while you talk.

Lines come from a terminal or a pipe. Answers go to standard output, everything else to standard error.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from quarkrl.cli.common import busy, model_path, note, quiet_libraries
from quarkrl.cli.inputs import check_model
from quarkrl.cli.parser import Parser, add_flags, options_from
from quarkrl.data.conversation import Conversation
from quarkrl.errors import UserError, did_you_mean
from quarkrl.options import option
from quarkrl.sampling.options import (
    GUIDANCE_FROM_HELP,
    GUIDANCE_SCALE_HELP,
    DecodingOptions,
    GuidanceScale,
    read_scale,
)

if TYPE_CHECKING:
    from quarkrl.sampling.generator import QuarkGenerator

NAME = "chat"
HELP = "talk to a model, at any quantile"

_COMMANDS = """\
/quantile best|worst|N   answer from another quantile
/guidance X              steer further: guidance γ, 1 is off
/system TEXT             set the system message; without TEXT remove it
/reset                   forget the conversation
/quit                    end, as Ctrl-D does; Ctrl-C stops an answer"""


@dataclass(frozen=True, kw_only=True)
class ChatOptions(DecodingOptions):
    """How the model answers."""

    quantile: str = option("best", "Quantile: best, worst, or 0 (worst) to K-1.", metavar="Q")
    guidance_scale: GuidanceScale | None = option(None, GUIDANCE_SCALE_HELP, at_least=0, metavar="X|NAME=X,…")
    guidance_from: str | None = option(None, GUIDANCE_FROM_HELP, metavar="FROM")
    max_new_tokens: int = option(256, "Maximum length of an answer in tokens.", at_least=1, group="sampling")


def add_options(parser: Parser) -> None:
    """Add the arguments of `quarkrl chat`."""
    parser.add_argument("model", help="final/ of a run, a checkpoint, a hub name, or a plain model")
    add_flags(parser, ChatOptions)


@dataclass
class Talk:
    """A conversation, and how its next message is answered.

    Attributes:
        generator: the model.
        options: the sampling options.
        quantile: of the next answers.
        guidance_scale: of the next answers; None for the default of the model.
        conversation: the system message, and the messages so far.
    """

    generator: "QuarkGenerator"
    options: ChatOptions
    quantile: str
    guidance_scale: GuidanceScale | None
    conversation: Conversation = field(default_factory=Conversation)

    def answer(self, text: str) -> Iterator[str]:
        """Add a message of the user, and yield the answer in pieces. An answer that is stopped is kept as it is.

        Raises:
            UserError: the model cannot answer; the message is then forgotten.
        """
        pieces: list[str] = []
        try:
            for piece in self.generator.stream(
                self.conversation.ask(text),
                quantile=self.quantile,
                seed=(self.options.seed, len(self.conversation.messages)),
                guidance_scale=self.guidance_scale,
                guidance_from=self.options.guidance_from,
                sampling=self.options.strategy(),
            ):
                pieces.append(piece)
                yield piece
        except UserError:
            raise
        except BaseException:
            self.conversation = self.conversation.with_turn(text, "".join(pieces))
            raise
        self.conversation = self.conversation.with_turn(text, "".join(pieces))

    def command(self, line: str) -> str | None:
        """Run a command such as "/quantile worst"; return what to tell the user, or None to end.

        Raises:
            UserError: there is no such command, or its value is invalid.
        """
        name, _, value = line.partition(" ")
        value = value.strip()
        if name == "/quit":
            return None
        if name == "/help":
            return _COMMANDS
        if name == "/reset":
            self.conversation = replace(self.conversation, messages=())
            return "the conversation starts again"
        if name == "/system":
            self.conversation = replace(self.conversation, system=value or None)
            return f"system message: {value or 'default'}"
        if name == "/quantile":
            self.generator.condition([], value)
            self.quantile = value
            return f"quantile: {value}"
        if name == "/guidance":
            self.guidance_scale = self._read_guidance(value)
            scale = self.guidance_scale
            return f"guidance: {scale if isinstance(scale, str) else f'{scale:g}'}"
        names = ("/quantile", "/guidance", "/system", "/reset", "/quit", "/help")
        raise UserError(f"command {name}: must be one of {', '.join(names)}.{did_you_mean(name, names)}")

    def _read_guidance(self, value: str) -> GuidanceScale:
        scale = read_scale(value, "guidance")
        # Fails for a model or a quantile without contrast.
        self.generator.contrast([[]], value, self.options.guidance_from, self.quantile)
        return value if isinstance(scale, dict) else scale


def run(arguments: argparse.Namespace) -> None:
    """Load the model, and answer one line after another."""
    from quarkrl.data.chats import reads_chats

    options = options_from(arguments, ChatOptions)
    if sys.stdin is None:
        raise UserError("standard input is closed. Use a terminal, or pipe text into the command.")
    check_model(arguments.model)
    with busy(f"loading {arguments.model}"):
        from quarkrl.sampling.generator import QuarkGenerator

        options.strategy()
        quiet_libraries()
        generator = QuarkGenerator.from_pretrained(
            model_path(arguments.model), trust_remote_code=options.trust_remote_code, **options.chat_defaults()
        )
    if not reads_chats(generator.tokenizer):
        raise UserError(f"model {arguments.model!r}: must have a chat template. Use quarkrl generate for texts.")
    talk = Talk(generator, options, options.quantile, options.guidance_scale)
    talk.command(f"/quantile {options.quantile}")
    if options.guidance_scale is not None:
        talk.command(f"/guidance {options.guidance_scale}")
    conditioning = generator.conditioning
    levels = f"quantiles 0 (worst) to {conditioning.num_quantiles - 1} (best)" if conditioning else "no quantiles"
    note(f"{arguments.model}: {levels}. /help lists the commands.")
    _answer_lines(talk)


def _answer_lines(talk: Talk) -> None:
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401 - input() then has line editing and history
    else:
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            note("\nCtrl-D or /quit ends.")
            continue
        try:
            if line.startswith("/"):
                reply = talk.command(line)
                if reply is None:
                    return
                note(reply)
            elif line:
                _print_answer(talk, line)
        except UserError as error:
            note(f"error: {error}")
    if is_terminal:
        print()


def _print_answer(talk: Talk, line: str) -> None:
    try:
        for piece in talk.answer(line):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        note("\nstopped")
        return
    print(flush=True)
