"""What a run will do, and how long that takes: the plan before it starts, and the remaining time while it goes on."""

import time
from typing import Any

from quarkrl.sampling.options import count_passes
from quarkrl.training.config import QuarkConfig
from quarkrl.training.sizing import Speed

# A model overfits completions that it draws more often (docs/guide.md, Guard against overfitting).
MOST_DRAWS = 2.0
MOST_DRAWS_OF_SCORED = 8.0  # In a run that explores nothing (docs/offline.md).
# A draw costs about this many forward passes: a backward pass takes two, and the reference one (`speed.py`).
_PASSES_PER_DRAW = 4
_REPORT_SECONDS = 5.0


def describe_plan(args: QuarkConfig, num_prompts: int, num_scored: int = 0, explores: bool = True) -> str:
    """Say how many completions a run samples and how often it learns from each.

    Args:
        args: the options of the run.
        num_prompts: its prompts.
        num_scored: the scored samples that it starts from.
        explores: whether it explores, too.
    """
    if not explores:
        draws = draws_of_scored(args, num_scored)
        return (
            f"plan: {args.num_iterations} iterations learn from {num_scored:,} scored samples, each in "
            f"{args.steps_per_iteration} steps of {args.draws_per_step}. Nothing is explored, and each sample is drawn "
            f"{draws:.1f} times in all, into {args.output_dir}" + _describe_distillation(args)
        )
    explored, drawn = args.explored_per_iteration(num_prompts), args.draws_per_iteration
    prompts, samples = explored // args.samples_per_prompt, args.samples_per_prompt
    first = f" The first learns from {num_scored:,} scored samples instead." if num_scored else ""
    iterations = args.num_iterations - bool(num_scored)
    return (
        f"plan: {args.num_iterations} iterations. Each samples and scores {explored:,} completions ({samples} for each "
        f"of {prompts:,} prompts), and learns in {args.steps_per_iteration} steps of {args.draws_per_step}."
        f"{first} In all {explored * iterations:,} completions, each drawn {drawn / explored:.1f} times, into "
        f"{args.output_dir}" + _describe_distillation(args)
    )


def describe_overdraw(args: QuarkConfig, num_prompts: int, num_scored: int = 0, explores: bool = True) -> str | None:
    """Return a warning if a run draws each completion too often, or None; see `describe_plan`."""
    remedy = fewer_draws(args, num_prompts, num_scored, explores)
    if not remedy:
        return None
    if explores:
        draws, most = args.draws_per_iteration / args.explored_per_iteration(num_prompts), MOST_DRAWS
    else:
        draws, most = draws_of_scored(args, num_scored), MOST_DRAWS_OF_SCORED
    return f"warning: each completion is drawn {draws:.1f} times. Above {most:g}, a model overfits. Set {remedy}."


def draws_of_scored(args: QuarkConfig, num_scored: int) -> float:
    """Return how often a run that explores nothing draws each of its samples."""
    return args.num_iterations * args.draws_per_iteration / num_scored


def fewer_draws(args: QuarkConfig, num_prompts: int, num_scored: int = 0, explores: bool = True) -> str:
    """Return the options with which a run draws each completion less often; "" if it does not draw too often."""
    if not explores:
        most = MOST_DRAWS_OF_SCORED * num_scored / args.draws_per_iteration
        if args.num_iterations <= most:
            return ""
        steps = max(int(most * args.steps_per_iteration), 1)
        return f"--num_iterations {int(most)}" if most >= 1 else f"--num_iterations 1 --steps_per_iteration {steps}"
    explored = args.explored_per_iteration(num_prompts)
    if args.draws_per_iteration <= MOST_DRAWS * explored:
        return ""
    steps = max(int(MOST_DRAWS * explored / args.draws_per_step), 1)
    return f"--steps_per_iteration {steps}, or a higher --samples_per_prompt"


def describe_time(
    args: QuarkConfig,
    num_prompts: int,
    speed: Speed,
    evaluated: int = 0,
    num_scored: int = 0,
    explores: bool = True,
) -> str:
    """Return the estimated time of a run in words; the parts add up to the whole.

    Args:
        args: the options of the run.
        num_prompts: its prompts.
        speed: of the model.
        evaluated: the completions that are sampled to measure the model, in all.
        num_scored, explores: as in `describe_plan`.
    """
    explored, drawn = args.explored_per_iteration(num_prompts), args.draws_per_iteration
    unexplored = bool(num_scored) if explores else args.num_iterations
    passes = sum(_passes(args, iteration) for iteration in range(unexplored, args.total_iterations))
    parts = {
        "sampling": speed.seconds(passes, explored, 0),
        "learning": speed.seconds(args.total_iterations, 0, drawn),
        "evaluation and report": evaluated * (speed.per_completion + speed.per_draw / _PASSES_PER_DRAW)
        + _REPORT_SECONDS * bool(evaluated),
    }
    total = sum(parts.values())
    unit, seconds, digits = ("s", 1, 0) if total < 120 else ("min", 60, 1) if total < 7200 else ("h", 3600, 1)
    rounded = {name: round(part / seconds, digits) for name, part in parts.items() if part}
    listed = ", ".join(f"{name} {part:g}" for name, part in rounded.items())
    whole = round(sum(rounded.values()), digits)
    rewards = ", and the time of the rewards" if explores or evaluated else ""
    return f"time: about {whole:g} {unit} ({listed}){rewards}"


def _describe_distillation(args: QuarkConfig) -> str:
    count = args.total_iterations - args.num_iterations
    scales = ", ".join(f"{scale:g}" for scale in args.distill_guidance_scale)
    if not count:
        return ""
    return f". Then {count} more iterations train guidance γ = {scales} into the best quantile, without rewards"


class TimeLeft:
    """Estimates the remaining time of a run from its latest exploration and its latest steps."""

    def __init__(self) -> None:
        self._seconds_per_pass: float | None = None
        self._steps, self._seconds_of_steps, self._step_start = 0, 0.0, 0.0

    def explored(self, args: QuarkConfig, logs: dict[str, Any]) -> None:
        """Take over the seconds of an exploration from its metrics. Sampling and scoring go on at the same time."""
        seconds = max(logs["seconds_sample"], logs["seconds_score"]) / args.world_size
        self._seconds_per_pass = seconds / _passes(args, logs["iteration"])
        self._steps, self._seconds_of_steps = 0, 0.0

    def begin_step(self) -> None:
        """Start to measure a step."""
        self._step_start = time.perf_counter()

    def end_step(self) -> None:
        """End the measurement of a step."""
        self._seconds_of_steps += time.perf_counter() - self._step_start
        self._steps += 1

    def seconds(self, args: QuarkConfig, step: int) -> float | None:
        """Return the seconds from the end of a step to the end of the run; None before there are measurements."""
        if self._seconds_per_pass is None or not self._steps:
            return None
        next_iteration = -(-step // args.steps_per_iteration)
        passes = sum(_passes(args, iteration) for iteration in range(next_iteration, args.total_iterations))
        steps = args.total_iterations * args.steps_per_iteration - step
        return passes * self._seconds_per_pass + steps * self._seconds_of_steps / self._steps


def _passes(args: QuarkConfig, iteration: int) -> int:
    """Return the forward passes per token of an exploration: guidance takes a second one."""
    samples_policy = iteration or args.conditioning != "tokens"
    return count_passes(args.exploring_scale(iteration)) if samples_policy else 1
