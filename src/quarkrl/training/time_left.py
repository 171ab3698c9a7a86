"""What a run will do, and how long that takes: the plan before it starts, and the remaining time while it goes on."""

import time
from dataclasses import dataclass
from typing import Any

from quarkrl.errors import format_seconds
from quarkrl.sampling.options import count_passes
from quarkrl.training.config import QuarkConfig
from quarkrl.training.sizing import Speed

# A model overfits completions that it draws more often (docs/guide.md, Guard against overfitting).
MOST_DRAWS = 2.0
MOST_DRAWS_OF_SCORED = 8.0  # In a run that explores nothing (docs/offline.md).
# A draw costs about this many forward passes: a backward pass takes two, and the reference one (`first_look.py`).
_PASSES_PER_DRAW = 4
_ALIKE = 1.5  # Estimates that differ by no larger factor are alike.
_REPORT_SECONDS = 5.0


@dataclass(frozen=True)
class TimePlan:
    """The estimated seconds of a run's parts, by the speed of a few completions before it starts.

    Attributes:
        speed: of the model, when it was measured.
        parts: seconds by what they are for.
        calls_rewards: whether rewards take time, too, which is not known.
    """

    speed: Speed
    parts: dict[str, float]
    calls_rewards: bool = True

    def describe(self) -> str:
        """Return the estimate in words; the parts add up to the whole."""
        total = sum(self.parts.values())
        unit, seconds, digits = ("s", 1, 0) if total < 120 else ("min", 60, 1) if total < 7200 else ("h", 3600, 1)
        rounded = {name: round(part / seconds, digits) for name, part in self.parts.items() if part}
        listed = ", ".join(f"{name} {part:g}" for name, part in rounded.items())
        whole = round(sum(rounded.values()), digits)
        rewards = ", and the time of the rewards" if self.calls_rewards else ""
        return f"time: about {whole:g} {unit} ({listed}){rewards}"

    def correct(self, seconds: float, completions: int, passes: int) -> str:
        """Return a new estimate by the first completions of the run; "" if it is like the old one.

        Args:
            seconds: the time of these completions.
            completions: their number.
            passes: the forward passes per token that they took.
        """
        factor = seconds / (completions * passes * self.speed.per_completion)
        if 1 / _ALIKE < factor < _ALIKE:
            return ""
        total = format_seconds(factor * sum(self.parts.values()))
        return f"time: about {total}, by the first {completions} completions"


@dataclass(frozen=True)
class Plan:
    """What a run will do: how many completions it samples, how often it learns from each, and how long that takes.

    Args:
        args: the options of the run.
        num_prompts: its prompts.
        num_scored: the scored samples that it starts from.
        explores: whether it explores, too.
    """

    args: QuarkConfig
    num_prompts: int
    num_scored: int = 0
    explores: bool = True

    @property
    def explored(self) -> int:
        """The completions that an iteration samples."""
        return self.args.explored_per_iteration(self.num_prompts)

    @property
    def draws(self) -> float:
        """How often the run draws each completion."""
        if self.explores:
            return self.args.draws_per_iteration / self.explored
        return self.args.num_iterations * self.args.draws_per_iteration / self.num_scored

    @property
    def _most_draws(self) -> float:
        return MOST_DRAWS if self.explores else MOST_DRAWS_OF_SCORED

    def describe(self) -> str:
        """Say how many completions the run samples and how often it learns from each."""
        args, target = self.args, f"into {self.args.output_dir}" + self._describe_distillation()
        if not self.explores:
            return (
                f"plan: {args.num_iterations} iterations learn from {self.num_scored:,} scored samples, each in "
                f"{args.steps_per_iteration} steps of {args.draws_per_step}. Nothing is explored, and each sample is "
                f"drawn {self.draws:.1f} times in all, {target}"
            )
        prompts, samples = self.explored // args.samples_per_prompt, args.samples_per_prompt
        first = f" The first learns from {self.num_scored:,} scored samples instead." if self.num_scored else ""
        iterations = args.num_iterations - bool(self.num_scored)
        count = f"{args.num_iterations} iteration{'' if args.num_iterations == 1 else 's'}"
        return (
            f"plan: {count}. Each samples and scores {self.explored:,} completions ({samples} for each of {prompts:,} "
            f"prompts), and learns in {args.steps_per_iteration} steps of {args.draws_per_step}"
            f"{' and their pairs' if args.dpo_coef else ''}.{first} In all {self.explored * iterations:,} completions, "
            f"each drawn {self.draws:.1f} times, {target}"
        )

    def describe_overdraw(self) -> str | None:
        """Return a warning if the run draws each completion too often, or None."""
        if not (remedy := self.fewer_draws()):
            return None
        return (
            f"warning: each completion is drawn {self.draws:.1f} times. Above {self._most_draws:g}, a model overfits. "
            f"Set {remedy}."
        )

    def fewer_draws(self) -> str:
        """Return the options with which the run draws each completion less often; "" if it does not draw too often."""
        if self.draws <= self._most_draws:
            return ""
        if self.explores:
            steps = max(int(MOST_DRAWS * self.explored / self.args.draws_per_step), 1)
            return f"--steps_per_iteration {steps}, or a higher --samples_per_prompt"
        most = MOST_DRAWS_OF_SCORED * self.num_scored / self.args.draws_per_iteration
        steps = max(int(most * self.args.steps_per_iteration), 1)
        return f"--num_iterations {int(most)}" if most >= 1 else f"--num_iterations 1 --steps_per_iteration {steps}"

    def time(self, speed: Speed, evaluated: int = 0) -> TimePlan:
        """Estimate the time of the run.

        Args:
            speed: of the model.
            evaluated: the completions that are sampled to measure the model, in all.
        """
        args = self.args
        unexplored = bool(self.num_scored) if self.explores else args.num_iterations
        passes = sum(passes_of(args, iteration) for iteration in range(unexplored, args.total_iterations))
        parts = {
            "sampling": speed.seconds(passes, self.explored, 0),
            "learning": speed.seconds(args.total_iterations, 0, args.draws_per_iteration),
            "evaluation and report": evaluated * (speed.per_completion + speed.per_draw / _PASSES_PER_DRAW)
            + _REPORT_SECONDS * bool(evaluated),
        }
        return TimePlan(speed, parts, self.explores or bool(evaluated))

    def _describe_distillation(self) -> str:
        count = self.args.total_iterations - self.args.num_iterations
        scales = ", ".join(f"{scale:g}" for scale in self.args.distill_guidance_scale)
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
        self._seconds_per_pass = seconds / passes_of(args, logs["iteration"])
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
        passes = sum(passes_of(args, iteration) for iteration in range(next_iteration, args.total_iterations))
        steps = args.total_iterations * args.steps_per_iteration - step
        return passes * self._seconds_per_pass + steps * self._seconds_of_steps / self._steps


def passes_of(args: QuarkConfig, iteration: int) -> int:
    """Return the forward passes per token of an exploration: guidance takes a second one."""
    samples_policy = iteration or args.conditioning != "tokens"
    return count_passes(args.exploring_scale(iteration)) if samples_policy else 1
