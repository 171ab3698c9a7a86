"""How `quarkrl train` ends: the model before and after training, on prompts that it was not trained on.

The starting model is measured before training and saved as `baseline.json`, so that a run that dies still has it. The
end adds the trained model, and writes `results.json`. Beside each is the Parquet file of its completions.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quarkrl.cli.common import console, note, progress_bars
from quarkrl.errors import truncate
from quarkrl.runs.records import RUN_FILE

if TYPE_CHECKING:
    from quarkrl.data.prompts import Prompts
    from quarkrl.evaluation.options import EvaluationOptions
    from quarkrl.evaluation.results import Evaluation, Row
    from quarkrl.rewards.scorer import Scorer
    from quarkrl.training.config import QuarkConfig

BASELINE, RESULTS = "baseline.json", "results.json"
REFERENCE = "reference"  # The name that an evaluation gives the row of the model before training.
# The completions of an evaluation cost at most this share of those that a run explores, within the limits.
_COST, _LEAST_SAMPLES, _MOST_SAMPLES, _ROWS = 0.05, 2, 8, 3


@dataclass(frozen=True)
class BeforeAfter:
    """Measures the model that a run starts from, and the model that it ends with.

    Attributes:
        start: name or directory of the model before training.
        prompts: what both are measured on.
        scorer: the rewards of the run.
        options: how to sample and measure.
        directory: of the run.
        keep_special_tokens: whether the rewards read special tokens.
        fewer_draws: if the run draws each completion too often, the options that mend it.
    """

    start: str
    prompts: "Prompts"
    scorer: "Scorer"
    options: "EvaluationOptions"
    directory: Path
    keep_special_tokens: bool = False
    fewer_draws: str = ""

    @property
    def num_completions(self) -> int:
        """How many completions are sampled in all: before training, and on the best and the worst quantile."""
        return _ROWS * len(self.prompts) * self.options.samples_per_prompt

    def measure_before(self) -> "Evaluation":
        """Measure the starting model, unless the directory has its figures already.

        Figures of a run that has not begun may be those of another model or chat template, and do not count.
        """
        from quarkrl.evaluation.evaluate import evaluate
        from quarkrl.evaluation.options import NO_REFERENCE

        if (self.directory / RUN_FILE).is_file() and (known := self._load(BASELINE)):
            return known
        options = replace(self.options, reference=NO_REFERENCE, quantiles=("best",))
        with progress_bars("evaluate") as notify:
            evaluation = evaluate(
                self.start,
                self.prompts,
                self.scorer,
                options,
                keep_special_tokens=self.keep_special_tokens,
                notify=lambda _, done, total: notify("the model before training", done, total),
            )
        evaluation = replace(evaluation, rows=[replace(row, name=REFERENCE) for row in evaluation.rows])
        evaluation.save(self.directory / BASELINE)
        return evaluation

    def measure_after(self, final: Path, baseline: "Evaluation") -> "Evaluation":
        """Measure the trained model on its best and worst quantile, unless the directory has its figures already."""
        from quarkrl.evaluation.evaluate import evaluate
        from quarkrl.evaluation.verdict import describe
        from quarkrl.storage.atomic import weights_digest

        known = self._load(RESULTS)
        if known and known.protocol["weights"][0].get("sha256") == weights_digest(final):
            return known
        with progress_bars("evaluate") as notify:
            evaluation = evaluate(
                final,
                self.prompts,
                self.scorer,
                replace(self.options, reference=self.start),
                known_rows=baseline.rows,
                notify=notify,
            )
        before, best, worst = evaluation.rows
        evaluation.protocol["verdict"] = describe(before, best, worst, self.fewer_draws)
        evaluation.save(self.directory / RESULTS)
        return evaluation

    def _load(self, name: str) -> "Evaluation | None":
        """Return an earlier evaluation of the same prompts, rewards and settings; None if there is none."""
        from quarkrl.evaluation.provenance import prompts_provenance
        from quarkrl.evaluation.results import Evaluation

        try:
            known = Evaluation.load(self.directory / name, {"prompts": self.prompts})
            protocol = known.protocol
            saved = {name: protocol[name] for name in ("rewards", "samples_per_prompt", "sampling", "seed")}
            saved["prompts"] = protocol["prompts"]["prompts"]["sha256"]
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return None
        now = {
            "rewards": self.scorer.identity,
            "samples_per_prompt": self.options.samples_per_prompt,
            "sampling": vars(self.options.strategy()),
            "seed": self.options.seed,
            "prompts": prompts_provenance(self.prompts)["sha256"],
        }
        return known if saved == json.loads(json.dumps(now)) else None


def evaluation_options(config: "QuarkConfig", explored: int, prompts: int, **settings: Any) -> "EvaluationOptions":
    """Return the options of an evaluation that suits a run: its sampling, and a cost that is small against it.

    Args:
        config: the options of the run.
        explored: the completions that it explores in all.
        prompts: the number of prompts that are measured.
        settings: further options; `samples` is chosen if it is None or missing.
    """
    from quarkrl.evaluation.options import EvaluationOptions

    never_ends = config.min_completion_length == config.max_completion_length
    affordable = int(_COST * explored / (_ROWS * max(prompts, 1)))
    samples = settings.pop("samples", None) or min(max(affordable, _LEAST_SAMPLES), _MOST_SAMPLES)
    return EvaluationOptions(
        max_new_tokens=config.max_completion_length,
        # As the model is used later: EOS may come at once, except where the run never samples it.
        min_new_tokens=config.min_completion_length if never_ends else 0,
        temperature=config.eval_temperature,
        top_p=config.eval_top_p,
        greedy=not config.eval_do_sample,
        samples=samples,
        system_prompt=config.system_prompt,
        chat_template_kwargs=config.chat_template_kwargs,
        last_assistant_turn=config.last_assistant_turn,
        skip_bad_prompts=config.skip_bad_prompts,
        batch_size=config.generation_batch_size or 128,
        **settings,
    )


def show_before(baseline: "Evaluation", count: int = 2) -> None:
    """Print the completions of the starting model with the lowest rewards, one prompt each."""
    row, prompts = baseline.rows[0], baseline.prompts.prompts
    note(f"before training: reward {row.figures['reward']:.3f} on {len(prompts)} held-out prompts. The lowest:")
    for number, sample in _lowest(row)[:count]:
        text = row.completions[number][sample]
        start = prompts[number]
        line = shorten_text(f"{start}{text}" if isinstance(start, str) else text)
        note(f"  {line}  (reward {row.rewards[number, sample]:.2f})")


def show_after(evaluation: "Evaluation", final: Path) -> None:
    """Print the table, three prompts with their completions, the verdict, and what to do next."""
    from quarkrl.evaluation.tables import print_side_by_side, print_table

    titled = [replace(row, name="before" if row.name == REFERENCE else row.name) for row in evaluation.rows]
    shown = replace(evaluation, rows=titled)
    print_table(shown, console(stderr=False))
    print_side_by_side(shown, 3, console(stderr=False))
    console(stderr=False).print(evaluation.protocol["verdict"], soft_wrap=True, style="bold")
    note(f"figures: {final.parent / RESULTS}   completions: {final.parent / 'results.parquet'}")
    for command in next_commands(evaluation, final):
        note(f"try it: {command}")


def summary(evaluation: "Evaluation") -> dict[str, Any]:
    """Return the figures of an evaluation that belong with the weights: for `quark.json` and the model card."""
    return {
        "prompts": len(evaluation.prompts),
        "samples_per_prompt": evaluation.protocol["samples_per_prompt"],
        "verdict": evaluation.protocol["verdict"],
        "rows": [{"name": row.name, "figures": row.figures, "intervals": row.intervals} for row in evaluation.rows],
    }


def next_commands(evaluation: "Evaluation", final: Path) -> list[str]:
    """Return commands whose output shows what the run has learned: a prompt on the best and the worst quantile."""
    best, worst = evaluation.rows[1], evaluation.rows[-1]
    gaps = [float(gap) for gap in best.rewards.mean(axis=1) - worst.rewards.mean(axis=1)]
    texts = [(gap, p) for gap, p in zip(gaps, evaluation.prompts.prompts, strict=True) if isinstance(p, str)]
    if not texts:
        return [f"quarkrl chat {final}"]
    _, prompt = max(texts, key=lambda pair: pair[0] if pair[0] == pair[0] else float("-inf"))
    start = f"quarkrl generate {final} --prompt {shlex.quote(prompt)} --num_return_sequences 4"
    # Without guidance, many completions of the worst quantile are as good as those of the best.
    return [start, f"{start} --quantile worst --guidance_scale 2 --guidance_from best"]


def shorten_text(text: str) -> str:
    """Return a text on one line, of at most 100 characters."""
    return truncate(" ".join(text.split()), 100)


def _lowest(row: "Row") -> Sequence[tuple[int, int]]:
    """Return the prompt's number and the sample of each prompt's lowest reward, the lowest first."""
    import numpy as np

    rewards = np.where(np.isnan(row.rewards), np.inf, row.rewards)
    samples = rewards.argmin(axis=1)
    order = rewards.min(axis=1).argsort(kind="stable")
    return [(int(number), int(samples[number])) for number in order]
