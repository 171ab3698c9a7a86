"""What subcommands share: options of rewards, the names `builtin`, messages and progress bars."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from quarkrl.builtin import BUILTIN
from quarkrl.options import option
from quarkrl.training.options import SCORE_CACHE_HELP

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from quarkrl.data.prompts import Prompts
    from quarkrl.rewards.reward import Reward
    from quarkrl.rewards.scorer import Scorer

REWARD_HELP = (
    "Rewards: profanity, vader, brevity, repetition, perspective, judge, a classifier (directory or hub name), "
    "module:function or file.py:function. "
    "Options of a reward follow its name: NAME?option=value&option=value (docs/rewards.md)."
)
REWARD_LABEL_HELP = "Label of a classifier whose probability is the reward, or 'not LABEL'."

IN_TEMPLATE_NOTE = "prompts: each text is a message of the user, in the chat template. --raw leaves texts as they are."


# Options


@dataclass(frozen=True)
class RewardOptions:
    """Which rewards score texts."""

    reward: list[str] = option(help=REWARD_HELP, metavar="REWARD", group="reward")
    reward_label: str | None = option(None, REWARD_LABEL_HELP, metavar="LABEL", group="reward")
    score_cache: str | None = option(None, SCORE_CACHE_HELP, metavar="FILE", group="reward")

    def scorer(self, **options: Any) -> "Scorer":
        """Return the scorer of these rewards.

        Args:
            options: further arguments of `Scorer`, such as `weights` and `timeout`.

        Raises:
            UserError: a reward cannot be made, or none of them can be cached and a cache is given.
        """
        from quarkrl.rewards.scorer import Scorer

        cache = self.cache_path  # Before rewards are loaded: a reward may change the working directory.
        return Scorer(resolve_rewards(self.reward, self.reward_label), cache=cache, **options)

    @property
    def cache_path(self) -> str | None:
        """The absolute path of the score cache."""
        return self.score_cache and os.path.abspath(os.path.expanduser(self.score_cache))


def resolve_rewards(names: Sequence[str], label: str | None = None) -> "list[Reward]":
    """Return the rewards that options name.

    Raises:
        UserError: a reward cannot be made.
    """
    from quarkrl.rewards.registry import resolve

    return [resolve(name, label=label) for name in names]


# Names and paths


@contextmanager
def working_directory(path: str) -> Iterator[None]:
    """Change the working directory within the context."""
    previous = os.getcwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(previous)


def model_path(name: str) -> str:
    """Return the directory of the embedded model for `builtin`, of the final model for a run, and else the name.

    Raises:
        UserError: the run has no model yet.
    """
    from quarkrl.builtin import locate_model
    from quarkrl.runs.directory import model_of_run

    if name == BUILTIN:
        return str(locate_model(name))
    path = model_of_run(name, "final")
    if path != name and os.path.basename(path) != "final":
        _note_checkpoint(name, path)
    return path


@lru_cache(maxsize=128)  # A command may ask for the path of a model several times, and says this once.
def _note_checkpoint(run: str, checkpoint: str) -> None:
    note(f"model: {checkpoint}, because {run} has no final/ yet")


def prompts_path(name: str, split: Literal["train", "eval"]) -> str:
    """Return the file of the embedded prompts for `builtin` or `builtin-chats`, and any other name unchanged."""
    from quarkrl.builtin import locate_prompts

    return str(locate_prompts(name, split) or name)


# Prompts


@dataclass(frozen=True)
class PromptSource:
    """Where prompts are read: what the options of a command say about one file or data set.

    Attributes:
        name: a file, a data set, or `builtin`.
        column: holds the prompt.
        split: of a data set.
        builtin_split: which of the embedded prompts `builtin` names.
        tokens: truncate texts to this number of tokens, and skip shorter texts; None to keep them.
    """

    name: str
    column: str
    split: str
    builtin_split: Literal["train", "eval"] = "eval"
    tokens: int | None = None

    def load(self, skip_bad: bool, tokenizer: "PreTrainedTokenizerBase | None" = None) -> "Prompts":
        """Load the prompts.

        Args:
            skip_bad: skip and count invalid rows, instead of stopping at the first.
            tokenizer: counts `tokens`.

        Raises:
            UserError: the source cannot be read, or has an invalid row.
        """
        from quarkrl.data.prompts import load_prompts
        from quarkrl.data.truncation import truncate_to_prompts

        path = prompts_path(self.name, self.builtin_split)
        prompts = load_prompts(path, split=self.split, column=self.column, skip_bad=skip_bad)
        return prompts if self.tokens is None else truncate_to_prompts(prompts, tokenizer, self.tokens)


def in_chat_template(
    sources: "Sequence[Prompts]", model: str, tokenizer: "PreTrainedTokenizerBase", raw: bool
) -> "list[Prompts]":
    """Return prompts whose texts are encoded in the chat template, if the model is a chat model; say so once.

    A model that Quark trained reads texts as it did in training. Any other one with a chat template is a chat model.

    Args:
        sources: prompts, texts and chats.
        model: its name or directory.
        tokenizer: of the model.
        raw: leave the texts as they are.
    """
    from quarkrl.models.quark_json import read_quark_json, reads_chats_as_trained

    is_chat_model = read_quark_json(model) is None or reads_chats_as_trained(model)
    if raw or not is_chat_model or not any(has_plain_texts(prompts, tokenizer) for prompts in sources):
        return list(sources)
    note(IN_TEMPLATE_NOTE)
    return [replace(prompts, in_template=True) for prompts in sources]


def has_plain_texts(prompts: "Prompts", tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether there are texts among the prompts, and the tokenizer has a chat template."""
    from quarkrl.data.chats import reads_chats

    return reads_chats(tokenizer) and any(isinstance(prompt, str) for prompt in prompts.prompts)


# Messages and progress


def is_first_process() -> bool:
    """Return whether this is the only process, or the first of those that torchrun or accelerate started."""
    return os.environ.get("RANK", "0") == "0"


def note(text: str) -> None:
    """Print a message to standard error, from the first process only."""
    if is_first_process():
        print(text, file=sys.stderr, flush=True)


def note_skipped(prompts: "Prompts") -> None:
    """Say how many prompts were skipped, by reason."""
    if prompts.skipped:
        note(f"prompts skipped: {prompts.skipped_in_words}")


def console(stderr: bool = True) -> "Console":
    """Return a console that prints text as it is."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False)


def quiet_libraries() -> None:
    """Switch off the progress bars of transformers, which interrupt ours, and the warnings of an unreachable hub."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()


@contextmanager
def busy(text: str) -> Iterator[None]:
    """Show on a terminal what the command is doing, while libraries and models load. The line disappears at the end."""
    out = console()
    if not (out.is_terminal and is_first_process()):
        yield
        return
    from rich.text import Text

    with out.status(Text(f"{text} …", style="dim"), spinner="dots"):
        yield


@contextmanager
def progress_bars(verb: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show one bar per named task. Until the first of them, a line says that the models load.

    Args:
        verb: precedes the name of each task.

    Yields:
        A function that receives the name of a task, how much of it is done, and its total.
    """
    with ExitStack() as shown:
        loading = shown.enter_context(ExitStack())
        loading.enter_context(busy(f"{verb}: loading"))
        from quarkrl.training.bars import new_bars

        bars = new_bars(console())
        tasks: dict[str, Any] = {}

        def notify(name: str, done: int, total: int) -> None:
            if name not in tasks:
                loading.close()
                if not tasks:
                    # Not earlier: bars without a task print an empty line, also beside an error message.
                    shown.enter_context(bars)
                tasks[name] = bars.add_task(f"{verb}  {name}", total=total, figures="")
            bars.update(tasks[name], completed=done)

        yield notify
