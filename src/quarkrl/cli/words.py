"""`quarkrl words`: rank words by what they tell a model about a reward, to start a run from."""

import argparse
import dataclasses

from quarkrl.cli.common import (
    PromptSource,
    RewardOptions,
    busy,
    console,
    in_chat_template,
    model_path,
    note,
    note_skipped,
    progress_bars,
    quiet_libraries,
)
from quarkrl.cli.inputs import check_model, check_prompts, check_rewards
from quarkrl.cli.parser import Parser, add_flags, options_from
from quarkrl.errors import UserError
from quarkrl.options import check_options, option
from quarkrl.sampling.options import SamplingOptions

NAME = "words"
HELP = "rank words by what they tell a model about a reward"


@dataclasses.dataclass(frozen=True)
class WordsOptions:
    """Which words are tried, and on how many completions."""

    prompts: str = option(help="Prompts: a file, a data set, builtin or builtin-chats.", metavar="FILE")
    prompt_column: str = option("prompt", "Column of the prompt.", metavar="COLUMN")
    prompt_split: str = option("train", "Split of a data set.", metavar="SPLIT")
    skip_bad_prompts: bool = option(False, "Skip invalid prompts, and count them.")
    words: list[str] | None = option(None, "Words to try. Common rewards have default words.")
    num_prompts: int = option(100, "Prompts that are sampled, the first ones.", at_least=1)
    samples_per_prompt: int = option(5, "Completions per prompt.", at_least=1)

    def __post_init__(self) -> None:
        check_options(self)


def add_options(parser: Parser) -> None:
    """Add the arguments of `quarkrl words`."""
    parser.add_argument("model", help="the model to train: a directory, a hub name, a GGUF file, or builtin")
    add_flags(parser, WordsOptions, RewardOptions, SamplingOptions)


def run(arguments: argparse.Namespace) -> None:
    """Sample and score completions of the plain model, and print the words, the most telling ones first."""
    options, reward_options = options_from(arguments, WordsOptions), options_from(arguments, RewardOptions)
    sampling = options_from(arguments, SamplingOptions)
    check_model(arguments.model)
    check_prompts(options.prompts)
    check_rewards(reward_options.reward, reward_options.reward_label)
    with busy(f"loading {arguments.model}"):
        from quarkrl.evaluation.phrases import rank_phrases, sample_and_score
        from quarkrl.models.words import CANDIDATES, read_newlines
        from quarkrl.sampling.generator import QuarkGenerator

        quiet_libraries()
        scorer = reward_options.scorer()
        phrases = list(map(read_newlines, options.words or CANDIDATES.get(scorer.names[0], ())))
        if not phrases:
            raise UserError(
                f"words: must be given for {scorer.names[0]}, which has no default words. "
                "Set --words 'a phrase' 'another'."
            )
        prompts = PromptSource(options.prompts, options.prompt_column, options.prompt_split).load(
            options.skip_bad_prompts
        )
        prompts = prompts.with_last_turns(sampling.last_assistant_turn, options.skip_bad_prompts).first(
            options.num_prompts
        )
        note_skipped(prompts)
        generator = QuarkGenerator.from_pretrained(
            model_path(arguments.model), trust_remote_code=sampling.trust_remote_code, **sampling.chat_defaults()
        )
        if generator.conditioning is not None:
            raise UserError(
                f"model {arguments.model}: must be one that Quark did not train. Name the model to start from."
            )
        (prompts,) = in_chat_template([prompts], model_path(arguments.model), generator.tokenizer, sampling.raw)
        prompts = dataclasses.replace(prompts, ids=generator.encode(prompts.as_encoded))
    with progress_bars("words") as notify:
        samples = sample_and_score(
            generator,
            prompts,
            scorer,
            sampling.strategy(),
            samples_per_prompt=options.samples_per_prompt,
            seed=sampling.seed,
            batch_size=sampling.batch_size,
            on_progress=lambda done, total: notify("sample", done, total),
        )
        ranked = rank_phrases(
            generator,
            samples,
            phrases,
            batch_size=sampling.batch_size,
            on_progress=lambda done, total: notify("compare", done, total),
        )
    out = console(stderr=False)
    out.print("  AUC  ±95 %  tokens  words")
    for phrase in ranked:
        out.print(f"{phrase.auc:5.2f}  {phrase.margin:5.2f}  {phrase.tokens:6}  {phrase.text!r}", soft_wrap=True)
    note(
        f"{len(samples.rewards)} completions, mean reward {samples.rewards.mean():.3f}; {samples.is_bad.sum()} count "
        "as bad. Above 0.5, words suit the worst quantile; below, the best one."
    )
    best = ranked[0]
    if best.auc - best.margin > 0.5:
        note(f"try: quarkrl train … --conditioning text --num_quantiles 2 --words {best.text!r} ''")
    else:
        note("none of these words is clearly above 0.5. Try whole sentences that describe what is unwanted.")
