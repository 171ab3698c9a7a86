"""Quark's own options, each declared once. Light: `quarkrl train --help` reads this without importing torch.

`QuarkConfig` (config.py) adds those of `transformers.TrainingArguments`; `INHERITED` says which of them are checked and
recorded in the identity of a run.
"""

from dataclasses import dataclass
from typing import Any, Literal

from quarkrl.data.chat_defaults import LAST_TURN_HELP, SYSTEM_PROMPT_HELP, TEMPLATE_KWARGS_HELP, LastTurn
from quarkrl.models.words import ConditioningKind
from quarkrl.options import option
from quarkrl.sampling.options import GUIDANCE_RULE_HELP, GuidanceRule

# Consecutive steps that on_bad_numbers=skip may skip. A loss scaler of fp16 skips a few until it finds its scale.
MAX_SKIPPED_STEPS = 20
SCORE_CACHE_HELP = "File of cached scores. A text is scored once, in whichever run or command it occurs."
GROUPS = ("model", "prompts", "reward", "exploring", "learning", "saving and evaluating")


@dataclass
class QuarkOptions:
    """Options of Quark, and options of `TrainingArguments` with another default. Defaults: the paper's for toxicity."""

    ref_dtype: Literal["same", "float32", "bfloat16", "float16"] = option(
        "same",
        "Data type of the reference's weights. Only for a reference that is a separate model.",
        group="model",
        metavar="DTYPE",
        rare=True,
    )
    skip_bad_prompts: bool = option(
        False, "Skip and count invalid prompts. Otherwise the first one is an error.", group="prompts", resume="free"
    )
    system_prompt: str | None = option(None, SYSTEM_PROMPT_HELP, group="prompts", resume="fixed")
    chat_template_kwargs: dict[str, Any] | str | None = option(
        None, TEMPLATE_KWARGS_HELP, group="prompts", metavar="JSON", resume="fixed"
    )
    raw: bool | None = option(
        None,
        "Texts are not wrapped in the chat template. The default of the command is false for a chat model's texts, and "
        "that of QuarkConfig true.",
        group="prompts",
        resume="fixed",
        rare=True,
    )
    last_assistant_turn: LastTurn = option(
        "refuse", LAST_TURN_HELP, group="prompts", metavar="RULE", resume="fixed", rare=True
    )

    # Rewards
    reward_weights: list[float] | None = option(
        None, "Weight of each reward in the sum. The default is 1 each.", resume="fixed", group="reward"
    )
    condition_on: Literal["sum", "each"] = option(
        "sum", "Reward tokens for the weighted sum, or for each reward.", resume="fixed", group="reward"
    )
    reward_columns: list[str] | None = option(
        None,
        "Columns of scored_data that hold the rewards. The default is reward, or with condition_on each the names of "
        "the rewards.",
        group="reward",
        metavar="NAME",
        resume="fixed",
        rare=True,
    )
    reward_ceiling: float | None = option(
        None,
        "Rewards above the ceiling count as equal to it. They then share the best quantile (docs/algorithm.md).",
        group="reward",
    )
    score_cache: str | None = option(
        None,
        SCORE_CACHE_HELP,
        metavar="FILE",
        resume="free",
        group="reward",
    )
    reward_timeout: float | None = option(
        3600.0,
        "Time limit in seconds for the rewards of a batch. A slower reward stops the run; null in YAML is no limit.",
        above=0,
        infinite=True,
        resume="free",
        group="reward",
        rare=True,
    )
    keep_special_tokens: bool = option(
        False,
        "Rewards read special tokens, such as answer tags, in completions. An EOS at the end is left out all the same.",
        group="reward",
        rare=True,
    )
    max_unscored_share: float = option(
        0.5,
        "Stop if a larger share of rewards is None or non-finite.",
        at_least=0,
        at_most=1,
        resume="free",
        group="reward",
        rare=True,
    )

    # Exploring
    num_iterations: int = option(
        47,
        "Iterations: explore, quantize, learn.",
        at_least=1,
        resume="free",
        group="exploring",
        fitted=True,
    )
    prompts_per_iteration: int | None = option(
        None,
        "Prompts explored per iteration, in turn. The default is all of them.",
        at_least=1,
        group="exploring",
        fitted=True,
    )
    samples_per_prompt: int = option(
        1, "Completions sampled per explored prompt.", at_least=1, group="exploring", fitted=True
    )
    max_completion_length: int = option(20, "Tokens per completion, including EOS.", at_least=1, group="exploring")
    min_completion_length: int = option(
        3,
        "Tokens before EOS may occur. If it equals max_completion_length, EOS never occurs.",
        at_least=0,
        group="exploring",
    )
    do_sample: bool = option(True, "Explore by sampling. --no_do_sample explores greedily.", group="exploring")
    temperature: list[float] = option(
        default_factory=lambda: [1.0],
        help="Sampling temperature of exploration. Several temperatures take turns, one per iteration: 1 and 0.2 "
        "explore both what the policy samples and what it decodes almost greedily.",
        above=0,
        group="exploring",
    )
    top_p: float = option(
        1.0, "Nucleus sampling of exploration; 1 keeps all tokens.", above=0, at_most=1, group="exploring"
    )
    explore_guidance_scale: list[float] = option(
        default_factory=lambda: [1.0],
        help="Guidance γ of exploration; 1 is off. Several scales are for one iteration each, the last for all that "
        "follow. With new tokens, the first iteration samples the reference without guidance (docs/guidance.md).",
        at_least=0,
        group="exploring",
    )
    explore_guidance_of: str | None = option(
        None,
        "Guidance γ of each reward, in place of explore_guidance_scale: polite=2,short=1.5. Rewards that are not named "
        "have 1. Only with condition_on each.",
        metavar="NAME=X,…",
        group="exploring",
        rare=True,
    )
    guidance_from: str = option(
        "worst",
        "Guidance steers away from worst, a quantile's number, or reference.",
        metavar="FROM",
        group="exploring",
    )
    guidance_rule: GuidanceRule = option("both", GUIDANCE_RULE_HELP, metavar="RULE", group="exploring", rare=True)
    engine: Literal["builtin", "vllm"] = option(
        "builtin", "Sample by the policy itself, or by vLLM (docs/engines.md).", group="exploring"
    )
    engine_url: str | None = option(
        None,
        "Address of a vLLM server. Without it, vLLM runs in this process.",
        resume="free",
        rare=True,
        metavar="URL",
        group="exploring",
    )
    generation_batch_size: int | None = option(
        None,
        "Completions sampled at a time. The default is 128, or 512 on a GPU, or fewer if memory is short.",
        at_least=1,
        resume="free",
        group="exploring",
    )

    # Learning: the pool
    num_quantiles: int = option(
        5,
        "Quantiles K, and reward tokens, per attribute.",
        at_least=2,
        resume="fixed",
        group="learning",
        fitted=True,
    )
    conditioning: ConditioningKind = option(
        "tokens",
        "What asks for a quantile: tokens, text or soft. These are a new token, words, or new tokens that start as "
        "words (docs/words.md).",
        resume="fixed",
        group="learning",
        metavar="KIND",
    )
    words: list[str] | None = option(
        None,
        "Words of each quantile, worst first. The best may be empty. Common rewards have default words.",
        resume="fixed",
        group="learning",
    )
    draw: Literal["uniform", "balanced"] = option(
        "uniform", "Draw uniformly over samples, or over quantiles first (balanced).", group="learning"
    )

    # Learning: the objective
    kl_coef: float = option(0.05, "Weight β of the KL term; 0 turns it off.", at_least=0, group="learning", fitted=True)
    kl_direction: Literal["policy_ref", "ref_policy"] = option(
        "policy_ref",
        "KL direction: policy_ref (official) or ref_policy (paper).",
        group="learning",
        metavar="NAME",
    )
    kl_guidance_scale: list[float] = option(
        default_factory=lambda: [1.0],
        help="Guidance γ of the reference in the KL term of best samples, away from the worst words. 1 is off. "
        "Several scales are for one iteration each, the last for all that follow (docs/words.md).",
        at_least=0,
        group="learning",
        rare=True,
    )
    kl_target: float | None = option(
        None, "Adapt β to this KL per completion, in nats (official code: 3).", above=0, group="learning", rare=True
    )
    dpo_coef: float = option(
        0.0,
        "Weight of the DPO term; 0 turns it off. The policy learns to prefer the better of two completions of a "
        "prompt (docs/pairs.md).",
        at_least=0,
        resume="fixed",
        group="learning",
        fitted=True,
    )
    dpo_beta: float = option(
        0.1, "β of the DPO term: the smaller, the further the policy may move.", above=0, group="learning", rare=True
    )
    entropy_coef: float = option(
        0.06, "Weight α of the entropy bonus; 0 turns it off.", at_least=0, group="learning", fitted=True
    )
    entropy_target: float | None = option(
        None,
        "Adapt α to this entropy per completion, in nats (official code: 40).",
        above=0,
        group="learning",
        rare=True,
    )
    coef_horizon: int = option(2500, "Samples over which β and α adapt.", at_least=1, group="learning", rare=True)
    nll_temperature: float = option(
        1.0,
        "Divides the logits in the NLL term. The temperature of exploration, if it is below 1, learns the sampled "
        "distribution and keeps the policy from sharpening. KL and entropy stay at 1.",
        above=0,
        group="learning",
        rare=True,
    )

    # Learning: guidance baked in
    distill_guidance_scale: list[float] = option(
        default_factory=lambda: [1.0],
        help="Distil guidance γ into the best quantile at the end; 1 is off. No reward is called. Several "
        "scales are for one stage each: a stage distils what the one before has made (docs/guidance.md).",
        at_least=0,
        group="learning",
    )
    distill_guidance_rule: GuidanceRule = option(
        "both", "guidance_rule of distillation.", metavar="RULE", group="learning", rare=True
    )
    distill_temperature: list[float] = option(
        default_factory=lambda: [1.0],
        help="Temperature of the distilled distribution. Above 1, it keeps completions diverse. Several temperatures "
        "are for one stage each, the last for all that follow.",
        above=0,
        group="learning",
        rare=True,
    )
    distill_iterations: int = option(
        2, "Iterations of each stage of distillation, after num_iterations.", at_least=1, group="learning", rare=True
    )

    # Learning: the optimizer
    bf16: bool | str = option(
        False,
        "Compute in bfloat16; auto: if the hardware has units for it.",
        choices=(True, False, "auto"),
        metavar="BOOL|auto",
        group="learning",
        fitted=True,
    )
    steps_per_iteration: int = option(
        500,
        "Optimizer steps per iteration.",
        at_least=1,
        resume="fixed",
        group="learning",
        fitted=True,
    )
    per_device_train_batch_size: int = option(
        128,
        "Samples per device and micro-batch.",
        at_least=1,
        resume="free",
        group="learning",
        fitted=True,
    )
    learning_rate: float = option(
        1e-5, "Peak learning rate, which decays linearly to 0.", at_least=0, group="learning", fitted=True
    )
    prefix_lr_scale: float = option(
        1.0,
        "The learning rate of the rows of new tokens, as a multiple of learning_rate.",
        at_least=0,
        group="learning",
        rare=True,
    )
    warmup_steps: float = option(
        0.02, "Warm-up steps; below 1, a share of all steps (paper: 500 of 23,437).", at_least=0, group="learning"
    )
    adam_epsilon: float = option(1e-5, "Epsilon of Adam.", group="learning", rare=True)
    max_grad_norm: float = option(0.0, "Clip gradients at this norm; 0 does not clip.", at_least=0, group="learning")
    on_bad_numbers: Literal["stop", "skip"] = option(
        "stop",
        "Stop at a non-finite loss or gradient, or skip the step. At most "
        f"{MAX_SKIPPED_STEPS} steps in a row are skipped; they are counted in metrics.jsonl.",
        resume="free",
        group="learning",
        rare=True,
    )
    on_collapse: Literal["stop", "warn"] = option(
        "stop",
        "Stop or warn if there is nothing left to learn from. That is: all completions are empty or equal, all rewards "
        "of the pool are equal, or the policy has no entropy.",
        resume="free",
        group="learning",
        rare=True,
    )

    # Saving and evaluating
    save_strategy: str = option(
        "epoch",
        "When to save: epoch (an iteration), steps, best, or no.",
        resume="free",
        metavar="WHEN",
        group="saving and evaluating",
    )
    save_total_limit: int | None = option(2, "Checkpoints to keep.", resume="free", group="saving and evaluating")
    metric_for_best_model: str | None = option(
        None,
        "Held-out metric of load_best_model_at_end. The default is reward.",
        metavar="NAME",
        resume="selection",
        group="saving and evaluating",
        rare=True,
    )
    per_device_eval_batch_size: int = option(
        128, "Completions sampled at a time in evaluation.", at_least=1, resume="free", group="saving and evaluating"
    )
    eval_samples_per_prompt: int = option(
        1, "Completions per held-out prompt.", at_least=1, resume="selection", group="saving and evaluating"
    )
    eval_do_sample: bool = option(
        True,
        "Evaluate by sampling. --no_eval_do_sample evaluates greedily.",
        resume="selection",
        group="saving and evaluating",
    )
    eval_temperature: float = option(
        1.0,
        "Sampling temperature of evaluation.",
        above=0,
        resume="selection",
        group="saving and evaluating",
        rare=True,
    )
    eval_top_p: float = option(
        0.9,
        "Nucleus sampling of evaluation; 1 keeps all tokens.",
        above=0,
        at_most=1,
        resume="selection",
        rare=True,
        group="saving and evaluating",
    )
    eval_guidance_scale: float = option(
        1.0, "Guidance γ of evaluation; 1 is off.", at_least=0, resume="selection", group="saving and evaluating"
    )
    log_completions: int = option(
        1,
        "Best and worst completions to show after each exploration, so many of each. Trackers receive a table.",
        at_least=0,
        resume="free",
        group="saving and evaluating",
        rare=True,
    )
    logging_nan_inf_filter: bool = option(
        False,
        "Leave non-finite losses out of the logged mean.",
        resume="free",
        group="saving and evaluating",
        rare=True,
    )
    disable_tqdm: bool | None = option(
        False, "Show no plan and no progress.", resume="free", group="saving and evaluating", rare=True
    )


# Limits and resume rules of fields of `TrainingArguments` that QuarkOptions does not declare, and of the property
# `draws_per_step`. Fields that are not listed are "free".
INHERITED = {
    "seed": option(at_least=0, at_most=2**32 - 1),  # the range of NumPy's generator
    "gradient_accumulation_steps": option(at_least=1, resume="free"),  # draws_per_step covers it
    "dataloader_num_workers": option(at_least=0, resume="free"),
    "dataloader_prefetch_factor": option(at_least=1, resume="free"),
    "draws_per_step": option(resume="fixed"),
    **{
        name: option(resume="branch")
        for name in (
            *("fp16", "lr_scheduler_type", "lr_scheduler_kwargs", "weight_decay", "adam_beta1", "adam_beta2"),
            *("optim", "optim_args", "optim_target_modules", "neftune_noise_alpha", "load_best_model_at_end"),
        )
    },
    **{name: option(resume="selection") for name in ("greater_is_better", "eval_strategy", "eval_steps", "eval_delay")},
}
