"""Guidance baked in: the last iterations of a run distil the guided sampler into the best quantile.

The teacher p_T is the policy as it was before these iterations; its weights stay as they are. Several scales are for
one stage each: the teacher of a stage is the policy as the stage before has left it. Guidance makes from it

    g(v)  ∝  p_T(v | best) (p_T(v | best) / p_T(v | contrast))^(γ - 1)         (sampling/guidance.py)

Each iteration samples completions y ~ g for its prompts. No reward is called. At each of their tokens the policy, on
its best quantile and without guidance, learns the teacher's whole distribution (`algorithm.loss.distillation_loss`):

    minimise  KL(g || p_θ( . | x, best))

`distill_temperature` T makes it learn g^(1/T), which is normalised. T above 1 keeps completions diverse.

The NLL of the sampled tokens has the same minimum, but overfits few samples.

Source: our own combination of guidance and distillation (Hinton et al. 2015, arXiv 1503.02531). Context distillation
(Askell et al. 2021, arXiv 2112.00861) bakes in a prompt in the same way.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from quarkrl.algorithm.pool import Sample
from quarkrl.algorithm.schedule import bucket_by_length
from quarkrl.errors import UserError
from quarkrl.models.eval_mode import eval_mode
from quarkrl.sampling.strategy import Sampling
from quarkrl.storage.atomic import atomic_file
from quarkrl.training.config import QuarkConfig, at_iteration


@dataclass(frozen=True)
class Stage:
    """A stage of distillation: iterations with the same teacher.

    Attributes:
        number: from 0.
        first_iteration: of the run.
        guidance_scale: γ.
        temperature: T.
    """

    number: int
    first_iteration: int
    guidance_scale: float
    temperature: float

    @classmethod
    def at(cls, iteration: int, args: QuarkConfig) -> "Stage":
        """Return the stage of an iteration."""
        number = (iteration - args.num_iterations) // args.distill_iterations
        return cls(
            number,
            args.num_iterations + number * args.distill_iterations,
            args.distill_guidance_scale[number],
            at_iteration(args.distill_temperature, number),
        )

    def sampling(self, options: Sampling) -> Sampling:
        """Return how the teacher samples: from the distribution that is learned, without nucleus."""
        return replace(options, temperature=self.temperature, top_p=1.0, do_sample=True)

    def metrics(self, completions: Sequence[Sequence[int]], end_ids: Sequence[int]) -> dict[str, float]:
        """Return what is logged about an iteration's completions."""
        return {
            "distill_guidance_scale": self.guidance_scale,
            "completion_length": float(np.mean([len(ids) for ids in completions])),
            "eos_share": float(np.mean([ids[-1] in end_ids for ids in completions])),
        }


class Teacher:
    """The trained weights of a policy when a stage of distillation begins.

    Args:
        weights: by name, as in `named_parameters` of the policy.
        stage: the iterations that learn from it.
    """

    def __init__(self, weights: dict[str, Tensor], stage: Stage):
        self.weights = weights
        self.stage = stage

    @classmethod
    def of(cls, policy: torch.nn.Module, stage: Stage) -> "Teacher":
        """Copy the trained weights of a policy."""
        trained = {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
        return cls({name: weight.detach().clone() for name, weight in trained.items()}, stage)

    @contextmanager
    def within(self, policy: Any) -> Iterator[Any]:
        """Yield the policy with the teacher's weights, in evaluation mode; afterwards it has its own again."""
        weights = {name: weight for name, weight in policy.named_parameters() if name in self.weights}
        own = {name: weight.data for name, weight in weights.items()}
        try:
            self._set(weights, self.weights)
            with eval_mode(policy):
                yield policy
        finally:
            self._set(weights, own)

    @staticmethod
    def _set(weights: dict[str, Tensor], values: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            weight.data = values[name]
        torch.clear_autocast_cache()  # Its keys are the parameters, which stay the same objects.


def find_teacher(policy: torch.nn.Module, stage: Stage, run: Path, begins: bool, writes: bool) -> Teacher:
    """Return the teacher of a stage: the policy if the stage begins, and otherwise that of the file.

    Args:
        policy: the policy.
        stage: the stage.
        run: the directory of the run, which has a file for each stage.
        begins: whether the next step is the stage's first.
        writes: whether this process writes the file.

    Raises:
        UserError: the run resumes within the stage, and has no file of the teacher or one of another policy.
    """
    file = run / f"teacher-{stage.number}.safetensors"
    if begins:
        teacher = Teacher.of(policy, stage)
        if writes:
            with atomic_file(file) as stream:
                stream.write(save(teacher.weights))
        return teacher
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: must hold the teacher to resume. Resume from an earlier checkpoint.") from error
    trained = {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
    if {name: weight.shape for name, weight in trained.items()} != {n: w.shape for n, w in weights.items()}:
        raise UserError(f"{file}: must hold the weights that the run trains. Resume from an earlier checkpoint.")
    return Teacher({name: weight.to(trained[name]) for name, weight in weights.items()}, stage)


def draw_completions(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    best: Sequence[int],
    iteration: int,
    args: QuarkConfig,
) -> tuple[list[Sample], np.ndarray]:
    """Return the samples that an iteration of distillation learns from, and the order of its draws.

    Each sample is drawn once before one is drawn again. The draws of a step have similar lengths.

    Args:
        prompts, completions: token ids, one prompt for each completion.
        best: the best quantile of each attribute.
        iteration: of the run; it seeds the order.
        args: the options of the run.
    """
    quantiles, rng = np.array(best), np.random.default_rng((args.seed, iteration, 1))
    pairs = list(zip(prompts, completions, strict=True))
    samples = [Sample(np.array(prompt), np.array(ids), quantiles) for prompt, ids in pairs]
    passes = [rng.permutation(len(samples)) for _ in range(-(-args.draws_per_iteration // len(samples)))]
    draws, lengths = np.concatenate(passes)[: args.draws_per_iteration], np.array([len(p) + len(c) for p, c in pairs])
    return samples, bucket_by_length(draws, lengths[draws], args.draws_per_step, rng)
