"""`quarkrl generate`: completions of a trained model, for any quantile."""

import argparse
import dataclasses
from typing import TYPE_CHECKING

from quarkrl.cli.common import PromptSource, busy, in_chat_template, model_path, note_skipped, quiet_libraries
from quarkrl.cli.inputs import check_model, check_prompts
from quarkrl.cli.parser import Parser, add_flags, options_from
from quarkrl.cli.streams import print_json
from quarkrl.errors import UserError
from quarkrl.options import check_options, option
from quarkrl.sampling.options import (
    GUIDANCE_FROM_HELP,
    GUIDANCE_RULE_HELP,
    GUIDANCE_SCALE_HELP,
    STEERED_BY_HELP,
    GuidanceRule,
    GuidanceScale,
    SamplingOptions,
    read_scale,
)

if TYPE_CHECKING:
    from quarkrl.data.prompts import Prompts
    from quarkrl.sampling.generator import QuarkGenerator

NAME = "generate"
HELP = "completions of a trained model, for any quantile"


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """What is generated, and how it is printed."""

    prompts: str | None = option(None, "Prompts: a file, a data set, builtin or builtin-chats.", metavar="FILE")
    prompt_column: str = option("prompt", "Column of the prompt.", metavar="COLUMN")
    prompt_split: str = option("train", "Split of a data set.", metavar="SPLIT")
    skip_bad_prompts: bool = option(False, "Skip invalid prompts, and count them.")
    chat: bool = option(False, "Make each text a message of the user, in the chat template.")
    quantile: str = option(
        "best", "Quantile: best, worst, or 0 (worst) to K-1; of one reward of several: NAME=Q,NAME=Q.", metavar="Q"
    )
    num_return_sequences: int = option(1, "Completions per prompt.", at_least=1)
    json: bool = option(False, "Print one JSON object per line: prompt, completions.")
    guidance_scale: GuidanceScale | None = option(None, GUIDANCE_SCALE_HELP, at_least=0, metavar="X|NAME=X,…")
    guidance_from: str | None = option(None, GUIDANCE_FROM_HELP, metavar="FROM")
    guidance_rule: GuidanceRule | None = option(None, f"{GUIDANCE_RULE_HELP} The default is both.", metavar="RULE")
    steered_by: str | None = option(None, STEERED_BY_HELP, metavar="RUN")

    def __post_init__(self) -> None:
        check_options(self)
        if self.guidance_scale is not None:
            read_scale(self.guidance_scale)


def add_options(parser: Parser) -> None:
    """Add the arguments of `quarkrl generate`."""
    parser.add_argument("model", help="final/ of a run, a checkpoint, a hub name, a GGUF file, or a plain model")
    parser.add_argument("text", nargs="*", help="prompts, one each; --prompt TEXT does the same")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be repeated")
    add_flags(parser, GenerateOptions, SamplingOptions)


def run(arguments: argparse.Namespace) -> None:
    """Generate and print."""
    if arguments.text and arguments.prompt:
        raise UserError(f"{arguments.text[0]!r}: must not be set together with --prompt. Quote a text with spaces.")
    texts = arguments.text or arguments.prompt or []
    if bool(texts) == (arguments.prompts is not None):
        problem = "must not be set together with --prompts" if texts else "is missing"
        raise UserError(f"prompt {problem}. Give 'a text' behind the model, or --prompts FILE.")
    options, sampling = options_from(arguments, GenerateOptions), options_from(arguments, SamplingOptions)
    check_model(arguments.model)
    check_model(options.steered_by, "steered_by")
    check_prompts(options.prompts)
    with busy(f"loading {arguments.model}"):
        generator, prompts = _load(arguments.model, texts, options, sampling)
    note_skipped(prompts)
    with busy(f"sampling {len(prompts) * options.num_return_sequences:,} completions"):
        completions = generator.generate(
            prompts.as_encoded,
            quantile=options.quantile,
            num_return_sequences=options.num_return_sequences,
            seed=sampling.seed,
            guidance_scale=options.guidance_scale,
            guidance_from=options.guidance_from,
            guidance_rule=options.guidance_rule,
            batch_size=sampling.batch_size,
            **dataclasses.asdict(sampling.strategy()),
        )
    continues = not (prompts.in_template or generator.is_encoder_decoder)
    for prompt, samples in zip(prompts.prompts, completions, strict=True):
        if options.json:
            print_json({"prompt": prompt, "completions": samples})
            continue
        for text in samples:
            print(f"{prompt}{text}" if isinstance(prompt, str) and continues else text)


def _load(
    model: str, texts: list[str], options: GenerateOptions, sampling: SamplingOptions
) -> "tuple[QuarkGenerator, Prompts]":
    """Load the prompts and the model."""
    from quarkrl.data.prompts import load_prompts
    from quarkrl.sampling.generator import QuarkGenerator

    quiet_libraries()
    sampling.strategy()  # Before a model loads for minutes.
    if options.prompts is None:
        prompts = load_prompts(texts, skip_bad=options.skip_bad_prompts)
    else:
        source = PromptSource(options.prompts, options.prompt_column, options.prompt_split)
        prompts = source.load(options.skip_bad_prompts)
    prompts = prompts.with_last_turns(sampling.last_assistant_turn, options.skip_bad_prompts)
    generator = QuarkGenerator.from_pretrained(
        model_path(model),
        trust_remote_code=sampling.trust_remote_code,
        steered_by=options.steered_by and model_path(options.steered_by),
        **sampling.chat_defaults(),
    )
    if options.chat:
        return generator, dataclasses.replace(prompts, in_template=True)
    (prompts,) = in_chat_template([prompts], model_path(model), generator.tokenizer, sampling.raw)
    return generator, prompts
