"""The prompts of `quarkrl train`: to explore, to evaluate after each iteration, and for the table before/after."""

from typing import TYPE_CHECKING, Any, NamedTuple

from quarkrl.builtin import BUILTIN, BUILTIN_CHATS
from quarkrl.cli.common import PromptSource, prompts_path
from quarkrl.cli.config_file import as_flags
from quarkrl.cli.parser import options_from
from quarkrl.cli.train_options import RunOptions, train_parser
from quarkrl.errors import UserError
from quarkrl.runs.records import options_of_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from quarkrl.data.prompts import Prompts


class RunPrompts(NamedTuple):
    """The prompts of a run.

    Attributes:
        training: to explore; None in a run on scored data alone.
        evaluated: held out, and evaluated after each iteration; None if there are none.
        measured: those of the table before/after; None to take some of the prompts to explore.
        note: a line about the table's prompts, for the user.
        scored: the samples that the run starts from, if any.
    """

    training: Any
    evaluated: "Prompts | None"
    measured: "Prompts | None"
    note: str
    scored: "Prompts | None" = None

    @property
    def read(self) -> list[Any]:
        """All prompts that the model learns from, without a stream."""
        return [prompts for prompts in (self.training, self.scored) if hasattr(prompts, "locations")]


def load_run_prompts(run: RunOptions, skip_bad: bool, tokenizer: "PreTrainedTokenizerBase | None" = None) -> RunPrompts:
    """Load the prompts of a run, and choose those of the table before/after (`held_out`)."""
    from quarkrl.data.hold_out import choose_prompts, hold_out

    training = None if run.prompts is None and run.scored_data else train_prompts(run, skip_bad, tokenizer)
    scored = None if run.scored_data is None else _load_scored(run, skip_bad)
    evaluated = held_out_prompts(run, skip_bad, tokenizer) if run.eval_prompts else None
    loaded, count = RunPrompts(training, evaluated, None, "", scored), run.held_out or 0
    if not count:
        return loaded._replace(note="held out: no prompts, so no table before/after. --held_out 64 gives one")
    if training is None and run.reward is None:
        return loaded._replace(note="before/after: no table, because no reward measures the model (--reward)")
    if evaluated is not None:
        measured = choose_prompts(evaluated, count)
        return loaded._replace(measured=measured, note=f"before/after: {len(measured)} prompts of {run.eval_prompts}")
    if run.prompts in (BUILTIN, BUILTIN_CHATS):
        source = PromptSource(run.prompts, run.prompt_column, run.prompt_split, tokens=run.prompt_tokens)
        measured = choose_prompts(source.load(skip_bad, tokenizer), count)
        text = f"before/after: {len(measured)} held-out prompts of {run.prompts}"
        return loaded._replace(measured=measured, note=text)
    if run.stream_prompts:
        return loaded._replace(note="before/after: prompts of the first iteration. Set --eval_prompts for others.")
    rows: Any = scored if training is None else training
    kept, measured = hold_out(rows, count)
    if not len(measured):
        text = "before/after: the prompts of the run, because there are too few to hold some out. Set --eval_prompts."
        return loaded._replace(note=text)
    if training is None:
        text = f"before/after: the samples of {len(measured)} prompts are held out, not trained on (--held_out 0: none)"
        return loaded._replace(scored=kept, measured=measured, note=text)
    text = f"before/after: {len(measured)} of {len(training)} prompts are held out, not trained on (--held_out 0: none)"
    if scored is not None:
        scored = scored.where([prompt not in measured.prompts for prompt in scored.prompts])
    return loaded._replace(training=kept, scored=scored, measured=measured, note=text)


def _load_scored(run: RunOptions, skip_bad: bool) -> "Prompts":
    from quarkrl.data.scored import restore_chats

    return restore_chats(PromptSource(run.scored_data or "", run.prompt_column, run.prompt_split).load(skip_bad))


def train_prompts(run: RunOptions, skip_bad: bool, tokenizer: "PreTrainedTokenizerBase | None" = None) -> Any:
    """Load the prompts to explore, or open their stream. The tokenizer counts `prompt_tokens`."""
    if run.stream_prompts:
        from quarkrl.data.readers import open_stream

        if run.prompt_tokens is not None:
            raise UserError(f"prompt_tokens {run.prompt_tokens}: must be left out of a run with --stream_prompts.")
        return open_stream(prompts_path(run.prompts or "", "train"), run.prompt_split, run.prompt_column)
    source = PromptSource(run.prompts or "", run.prompt_column, run.prompt_split, "train", run.prompt_tokens)
    return source.load(skip_bad, tokenizer)


def held_out_prompts(run: RunOptions, skip_bad: bool, tokenizer: "PreTrainedTokenizerBase | None" = None) -> "Prompts":
    """Load the held-out prompts. If they come from the data set of the training prompts, its test split is used."""
    split = run.eval_prompt_split or ("test" if run.eval_prompts == run.prompts else "train")
    return PromptSource(run.eval_prompts or "", run.prompt_column, split, tokens=run.prompt_tokens).load(
        skip_bad, tokenizer
    )


def check_has_held_out(model: str) -> RunOptions:
    """Return the options of the run of a model, whose held-out prompts are to be used.

    Raises:
        UserError: the model is of no run, or its run holds none out.
    """
    options = options_of_run(model)
    if not options.get("held_out"):
        why = f"the run of {model} holds none out" if options else f"{model} is of no run"
        raise UserError(f"prompts is missing, and {why}. Set --prompts to builtin, a file or a data set.")
    values, _ = train_parser().parse_known_args(list(as_flags(options)))
    return options_from(values, RunOptions)


def held_out_of_run(model: str, skip_bad: bool, tokenizer: "PreTrainedTokenizerBase | None") -> "Prompts":
    """Load the held-out prompts of the run of a model, those of its table before/after.

    Raises:
        UserError: the run has none, or they cannot be read.
    """
    run = check_has_held_out(model)
    prompts = load_run_prompts(run, skip_bad, tokenizer).measured
    if prompts is None:
        raise UserError(f"prompts is missing, and the run of {model} had too few to hold some out. Set --prompts.")
    return prompts
