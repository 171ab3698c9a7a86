"""Checks of a run's options that need more than the options: its rewards, its prompts, how its weights are stored."""

from quarkrl.errors import UserError
from quarkrl.rewards.scorer import Scorer
from quarkrl.sampling.options import check_attributes
from quarkrl.training.config import QuarkConfig
from quarkrl.training.held_out import check_metric


def check_names(args: QuarkConfig, scorer: Scorer) -> None:
    """Check the options that name rewards."""
    check_metric(args.metric_for_best_model, scorer.attributes, scorer.names)
    check_attributes(args.explore_guidance_of or 1, scorer.attributes, "explore_guidance_of")


def check_quantiles(args: QuarkConfig, num_prompts: int, explores: bool) -> None:
    """Check that an iteration has a sample for each quantile."""
    if explores and (samples := args.explored_per_iteration(num_prompts)) < args.num_quantiles:
        raise UserError(
            f"num_quantiles {args.num_quantiles}: must be at most {samples}, the samples of an iteration. "
            "Explore more prompts, or lower --num_quantiles."
        )


def check_pairs(args: QuarkConfig, explores: bool) -> None:
    """Check what the DPO term needs: two completions of a prompt, and one reward to order them by."""
    if not args.dpo_coef:
        return
    if explores and args.samples_per_prompt < 2:
        raise UserError(
            f"samples_per_prompt {args.samples_per_prompt}: must be at least 2 with dpo_coef, which compares "
            "completions of a prompt. Set --samples_per_prompt 8."
        )
    if args.condition_on == "each":
        raise UserError(f"dpo_coef {args.dpo_coef:g}: must be 0 with condition_on each. Set --condition_on sum.")


def check_sharded(args: QuarkConfig, is_sharded: bool) -> None:
    """Check the options that need whole weights on each process."""
    if not is_sharded:
        return
    for name in ("distill_guidance_scale", "kl_guidance_scale", "prefix_lr_scale"):
        value = getattr(args, name)
        if {*(value if isinstance(value, list) else [value])} != {1}:
            raise UserError(f"{name} {value}: must be 1 in a run with sharded weights. Leave it out.")
