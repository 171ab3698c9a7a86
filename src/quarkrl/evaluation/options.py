"""Options of an evaluation: the argument of `evaluate`, the flags of `quarkrl evaluate`, and a record in results.json.

This module imports no torch, so `quarkrl evaluate --help` is fast.
"""

from dataclasses import dataclass

from quarkrl.errors import UserError
from quarkrl.options import option
from quarkrl.sampling.options import (
    GUIDANCE_RULE_HELP,
    STEERED_BY_HELP,
    GuidanceRule,
    GuidanceScale,
    SamplingOptions,
    read_scale,
)

# A value of `reference`: evaluate the model without its reference.
NO_REFERENCE = "none"
# A value of `quantiles`: request each quantile, worst first.
ALL_QUANTILES = "all"
# The default of `resamples`.
RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(SamplingOptions):
    """What to measure, and how.

    Raises:
        UserError: a value is out of its limits.
    """

    reference: str | None = option(
        None,
        "Model before training, for comparison; none: no comparison (default: as trained).",
        group="models",
    )
    quantiles: tuple[str | int, ...] = option(
        ("best", "worst"), "Quantiles to request, one row each; all: every quantile.", metavar="Q", group="models"
    )
    guidance_scales: tuple[GuidanceScale, ...] = option(
        (),
        "Guidance scales on the best quantile, one row each; 1 is unguided. NAME=γ,NAME=γ is one for each reward.",
        at_least=0,
        metavar="X",
        group="models",
    )
    guidance_from: str | int = option(
        "worst", "What guidance moves away from: a quantile, or reference.", metavar="FROM", group="models"
    )
    guidance_rule: GuidanceRule = option("both", GUIDANCE_RULE_HELP, metavar="RULE", group="models")
    target: str | None = option(
        None,
        "Find the smallest guidance scale that meets METRIC<=NUMBER or METRIC>=NUMBER, such as 'toxicity<=0.02'. "
        "METRIC is a name in the printed table. The scales are those of --guidance_scales, in ascending order until "
        "one meets the target, and further ones between the last two.",
        metavar="TARGET",
        group="models",
    )
    steered_by: str | None = option(
        None, f"{STEERED_BY_HELP} The reference is MODEL alone.", metavar="RUN", group="models"
    )
    bf16: bool = option(False, "Compute in bfloat16: faster on most GPUs, but other completions.", group="models")
    skip_bad_prompts: bool = option(
        False, "Skip and count invalid or too long prompts, instead of stopping at the first.", group="prompts"
    )
    samples: int = option(25, "Completions per prompt; 1 with --greedy.", at_least=1, group="sampling")
    threshold: float = option(
        0.5, "Probability from which a text counts as a member of a class.", at_least=0, at_most=1, group="metrics"
    )
    perplexity_model: str | None = option(
        None,
        "Model that computes perplexity and MAUVE's features (default: the reference, or MODEL without one).",
        metavar="MODEL",
        group="metrics",
    )
    human_column: str | None = option(
        None, "Column with human continuations of the prompts; adds MAUVE.", metavar="COLUMN", group="metrics"
    )
    resamples: int = option(
        RESAMPLES, "Bootstrap resamples for the confidence intervals.", at_least=1, metavar="N", group="metrics"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steered_by and tuple(self.quantiles) != ("best", "worst"):
            raise UserError(
                f"quantiles {' '.join(map(str, self.quantiles))}: must be left out with steered_by, which has a "
                "row for each of --guidance_scales."
            )
        for scale in self.guidance_scales:
            if isinstance(read_scale(scale, "guidance_scales"), dict) and self.target:
                raise UserError(f"guidance_scales {scale}: must be numbers with a target. Leave it out.")

    @property
    def samples_per_prompt(self) -> int:
        """S: completions per prompt. Greedy decoding has one."""
        return 1 if self.greedy else self.samples

    @property
    def guides(self) -> bool:
        """Whether guidance is measured."""
        return bool(self.guidance_scales or self.target or self.steered_by)
