"""Scored samples that a run starts from: loaded, encoded as if the run had explored them, and who scores the rest.

They take the place of the first exploration. A run without prompts explores nothing, and then needs no reward.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeAlias

from transformers import PreTrainedTokenizerBase

from quarkrl.data.prompts import Prompts
from quarkrl.data.scored import Ends, ScoredSamples, check_any_left, check_scored
from quarkrl.errors import UserError
from quarkrl.models.chat_template import end_of_turn_id
from quarkrl.rewards.scorer import Scorer
from quarkrl.training.config import QuarkConfig
from quarkrl.training.prompt_supply import read_prompts_of

Rewards: TypeAlias = Callable | str | Sequence[Callable | str]


def make_scorer(rewards: Rewards | Scorer | None, args: QuarkConfig, calls_rewards: bool) -> Scorer:
    """Return what scores completions, or what stands for it in a run that calls no reward.

    Raises:
        UserError: a reward is missing or cannot be made, or the columns of scored data are not named.
    """
    if isinstance(rewards, Scorer):
        return rewards
    if rewards is not None:
        return Scorer(rewards, args.reward_weights, args.condition_on, args.score_cache, args.reward_timeout)
    if calls_rewards:
        raise UserError("reward_funcs (--reward) is missing: only a run on scored_data alone needs none. Set it.")
    if args.condition_on == "each" and not args.reward_columns:
        raise UserError(
            "reward_columns is missing: must name the rewards with condition_on each. Set --reward_columns."
        )
    columns = args.reward_columns or ["reward"]
    if args.condition_on == "sum" and len(columns) > 1:
        raise UserError(
            f"reward_columns {' '.join(columns)}: must be one column with condition_on sum. Set --condition_on each."
        )
    return Scorer([ColumnReward(column) for column in columns], condition_on=args.condition_on)


class ColumnReward:
    """Stands for the reward whose scores a column of the data holds. It cannot score."""

    def __init__(self, column: str):
        self.name, self.identity = column, {"column": column}

    def __call__(self, **_: Any) -> NoReturn:
        """Refuse to score.

        Raises:
            UserError: always.
        """
        raise UserError("reward is missing: only samples of scored_data have scores. Set --reward.")


def load_scored(source: Any, args: QuarkConfig, attributes: Sequence[str], encode: Callable[..., Prompts]) -> Prompts:
    """Load scored samples from any source that fits into memory, and encode their prompts.

    Args:
        source: `Prompts`, or what `load_prompts` reads.
        args: the options of the run.
        attributes: the names of the rewards that condition.
        encode: encodes prompts: `Prompts.encode` with its arguments.

    Raises:
        UserError: the source cannot be read, a column is missing, a row is bad, or none is left.
    """
    columns = args.reward_columns or list(attributes)
    if len({*columns}) != len(columns) or len(columns) != len(attributes):
        raise UserError(
            f"reward_columns {' '.join(columns)}: must be {len(attributes)} columns, one for each of "
            f"{', '.join(attributes)}. Set as many."
        )
    rows = read_prompts_of("scored_data", source, args.skip_bad_prompts)
    encoded = encode(check_scored(rows, columns, args.skip_bad_prompts), allow_none=True)
    check_any_left(encoded)
    return encoded


def encode_scored(
    prompts: Prompts, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int], args: QuarkConfig
) -> ScoredSamples:
    """Encode the completions of scored samples as the sampler of the run would have sampled them.

    Args:
        prompts: from `load_scored`.
        tokenizer: without reward tokens.
        end_ids: the ids that end a completion.
        args: the options of the run.

    Raises:
        UserError: there are fewer samples than quantiles.
    """
    eos, end_of_turn = tokenizer.eos_token_id, end_of_turn_id(tokenizer)
    end_of_text = eos if eos in end_ids else next(iter(end_ids), None)
    ends = Ends(
        max_length=args.max_completion_length,
        min_length=args.min_completion_length,
        of_text=end_of_text,
        of_chat=end_of_turn if end_of_turn in end_ids else end_of_text,
        all_ids=end_ids,
        keep_special_tokens=args.keep_special_tokens,
    )
    samples = ScoredSamples.encode(prompts, tokenizer, ends)
    if len(samples) < args.num_quantiles:
        raise UserError(
            f"num_quantiles {args.num_quantiles}: must be at most {len(samples)}, the samples of scored_data. Add "
            "samples, or lower --num_quantiles."
        )
    return samples
