"""`quarkrl play`: a local web page that shows a model before training, and at its best and worst quantile."""

import argparse
import dataclasses
import importlib.util
import os
import threading
from typing import TYPE_CHECKING, Any

from quarkrl.cli.common import (
    REWARD_HELP,
    REWARD_LABEL_HELP,
    PromptSource,
    RewardOptions,
    busy,
    model_path,
    note,
    quiet_libraries,
    working_directory,
)
from quarkrl.cli.inputs import check_model, check_prompts, check_rewards
from quarkrl.cli.parser import Parser, add_flags, options_from
from quarkrl.cli.run_rewards import rewards_of_training
from quarkrl.errors import UserError
from quarkrl.options import check_options, option

if TYPE_CHECKING:
    from quarkrl.playground.subject import Subject
    from quarkrl.rewards.scorer import Scorer

NAME = "play"
HELP = "play with a model on a local web page"

HOST = "127.0.0.1"
FIRST_PORT = 7860
EXAMPLES = 8


@dataclasses.dataclass(frozen=True)
class PlayOptions:
    """Where the page is, and what scores its completions."""

    port: int | None = option(
        None, f"Port of {HOST} (default: the first free one from {FIRST_PORT}).", at_least=1, at_most=65535
    )
    open: bool = option(True, "Open the page in the browser; --no_open only prints its address.")
    reward: list[str] | None = option(None, f"{REWARD_HELP} The default is that of training.", metavar="REWARD")
    reward_label: str | None = option(None, REWARD_LABEL_HELP, metavar="LABEL")
    prompts: str | None = option(None, "Prompts to try. The default is those of the run.", metavar="FILE")
    prompt_column: str = option("prompt", "Column of the prompt.", metavar="COLUMN")
    trust_remote_code: bool = option(False, "Run the Python code in a model's repository.")

    def __post_init__(self) -> None:
        check_options(self)


def add_options(parser: Parser) -> None:
    """Add the arguments of `quarkrl play`."""
    parser.add_argument("model", help="a run, its final/, a checkpoint, a hub name, or a plain model")
    add_flags(parser, PlayOptions)


def run(arguments: argparse.Namespace) -> None:
    """Load the model, and serve the page until Ctrl-C."""
    options = options_from(arguments, PlayOptions)
    check_model(arguments.model)
    check_prompts(options.prompts)
    check_rewards(options.reward or [])
    with busy(f"loading {arguments.model}"):
        _prepare_gradio()
        quiet_libraries()
        subject = load_subject(arguments.model, options)
    for line in subject.notes:
        note(line)
    serve(subject, options)


def load_subject(name: str, options: PlayOptions) -> "Subject":
    """Load the model, its reference, its reward and prompts to try.

    Raises:
        UserError: the model, or a reward or prompts that were requested, cannot be loaded.
    """
    from quarkrl.models.quark_json import keeps_special_tokens, read_quark_json
    from quarkrl.playground.subject import load_models, telling_prompts
    from quarkrl.runs.records import options_of_run

    path = model_path(name)
    subject = load_models(name, path, options.trust_remote_code)
    of_run, facts = options_of_run(path), read_quark_json(path) or {}
    training = facts["config"] if isinstance(facts.get("config"), dict) else {}
    notes = list(subject.notes)
    prompts: list[str] = []
    chat = False
    try:
        if options.prompts or not (prompts := telling_prompts(path, EXAMPLES)):
            prompts, chat = _prompts_to_try(options, of_run)
    except UserError as error:
        if options.prompts:
            raise
        notes.append(f"no prompts to try: {error}")
    scorer = None
    try:
        with working_directory(os.getcwd()):  # Importing a reward may change it.
            scorer = _scorer(options, path, training)
    except UserError as error:
        if options.reward:
            raise
        notes.append(f"no scores: {error}")
    length = training.get("max_completion_length")
    return dataclasses.replace(
        subject,
        scorer=scorer,
        examples=prompts,
        keep_special_tokens=keeps_special_tokens(path),
        defaults={"chat": chat, **_guidance(subject), **({"max_new_tokens": length} if length else {})},
        notes=notes,
    )


def _guidance(subject: "Subject") -> dict[str, Any]:
    """The model's default guidance, if it is away from the worst quantile, as on the page."""
    default = subject.generator.default_guidance
    if default.guidance_from != "worst" or isinstance(default.guidance_scale, str):  # The slider has one number.
        return {}
    return {"guidance_scale": default.guidance_scale, "guidance_rule": default.guidance_rule}


def _scorer(options: PlayOptions, path: str, training: dict) -> "Scorer | None":
    """The reward that was requested, or else that of training."""
    if options.reward:
        return RewardOptions(options.reward, options.reward_label).scorer()
    trained = rewards_of_training(path)
    if not (trained and trained.names):
        return None
    rewards = RewardOptions(trained.names, trained.label)
    return rewards.scorer(weights=training.get("reward_weights"), condition_on=training.get("condition_on") or "sum")


def _prompts_to_try(options: PlayOptions, of_run: dict) -> tuple[list[str], bool]:
    """Prompts that were requested, or else the run's held-out ones, or else its first ones; whether they are chats."""
    from quarkrl.data.chats import message_text

    name = options.prompts or of_run.get("eval_prompts") or of_run.get("prompts")
    if not name:
        return [], False
    column = options.prompt_column if options.prompts else of_run.get("prompt_column", "prompt")
    split = "test" if of_run.get("eval_prompts") == of_run.get("prompts") else "train"
    prompts = PromptSource(name, column, of_run.get("eval_prompt_split") or split).load(skip_bad=True).prompts
    texts = [prompt if isinstance(prompt, str) else message_text(prompt[-1]) for prompt in prompts]
    return texts[:: max(1, len(texts) // EXAMPLES)][:EXAMPLES], not isinstance(prompts[0], str)


def serve(subject: "Subject", options: PlayOptions) -> None:
    """Serve the page of a subject until Ctrl-C.

    Raises:
        UserError: the port is in use.
    """
    from quarkrl.playground.page import STYLE, THEME, build_page

    page = build_page(subject)
    try:
        _, address, _ = page.launch(
            server_name=HOST,
            server_port=options.port,
            inbrowser=options.open,
            theme=THEME,
            css_paths=STYLE,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            footer_links=[],
        )
    except OSError as error:
        raise UserError(f"port {options.port or FIRST_PORT}: must be free. Set another --port.") from error
    note(f"{address} shows the page. Ctrl-C ends.")
    try:
        wait_forever()
    except KeyboardInterrupt:
        pass  # The usual end, so no error.
    finally:
        page.close(verbose=False)


def wait_forever() -> None:
    """Wait for Ctrl-C, while other threads serve the page."""
    threading.Event().wait()


def _prepare_gradio() -> None:
    """Check that Gradio is installed, and keep it from calling other hosts.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError('quarkrl play: must have Gradio. Run `pip install "quarkrl[play]"`.')
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
