"""Guidance baked in: the last iterations of a run distil the guided sampler into the best token.

The teacher p_T is the policy as it was before these iterations; its weights stay as they are. Guidance makes from it

    g(v)  ∝  p_T(v | best) (p_T(v | best) / p_T(v | contrast))^(γ - 1)         (sampling/guidance.py)

Each iteration samples completions y ~ g for its prompts. No reward is called. At each of their tokens the policy, on
its best token and without guidance, learns the teacher's whole distribution (`algorithm.loss.distillation_loss`):

    minimise  KL(g || p_θ( . | x, best))

`distill_temperature` T makes it learn g^(1/T), which is normalised. T above 1 keeps completions diverse.

The NLL of the sampled tokens has the same minimum, but overfits few samples.

Source: our own combination of guidance and distillation (Hinton et al. 2015, arXiv 1503.02531). Context distillation
(Askell et al. 2021, arXiv 2112.00861) bakes in a prompt in the same way.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from quarkrl.algorithm.pool import Sample
from quarkrl.errors import UserError
from quarkrl.models.eval_mode import eval_mode
from quarkrl.sampling.strategy import Sampling
from quarkrl.storage.atomic import atomic_file
from quarkrl.training.config import QuarkConfig

TEACHER_FILE = "teacher.safetensors"


class Teacher:
    """The trained weights of a policy at one moment.

    Args:
        weights: by name, as in `named_parameters` of the policy.
    """

    def __init__(self, weights: dict[str, Tensor]):
        self.weights = weights

    @classmethod
    def of(cls, policy: torch.nn.Module) -> "Teacher":
        """Copy the trained weights of a policy."""
        return cls(
            {name: weight.detach().clone() for name, weight in policy.named_parameters() if weight.requires_grad}
        )

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


def find_teacher(policy: torch.nn.Module, run: Path, step: int, first_step: int, writes: bool) -> Teacher:
    """Return the teacher of a run: the policy as it is before the first step of distillation, or that of the file.

    Args:
        policy: the policy.
        run: the directory of the run.
        step: optimizer steps so far.
        first_step: those before distillation.
        writes: whether this process writes the file.

    Raises:
        UserError: the run resumes within distillation, and has no file of the teacher or one of another policy.
    """
    file = run / TEACHER_FILE
    if step == first_step:
        teacher = Teacher.of(policy)
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
    return Teacher({name: weight.to(trained[name]) for name, weight in weights.items()})


def teacher_sampling(args: QuarkConfig, iteration: int) -> Sampling:
    """Return how the teacher samples: from the distribution that is learned, without nucleus."""
    return replace(args.sampling(iteration), temperature=args.distill_temperature, top_p=1.0, do_sample=True)


def draw_completions(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    best: Sequence[int],
    count: int,
    rng: np.random.Generator,
) -> tuple[list[Sample], np.ndarray]:
    """Return the samples that an iteration of distillation learns from, and the order of its draws.

    Args:
        prompts, completions: token ids, one prompt for each completion.
        best: the best quantile of each attribute.
        count: draws; each sample is drawn once before one is drawn again.
        rng: shuffles them.
    """
    quantiles = np.array(best)
    pairs = zip(prompts, completions, strict=True)
    samples = [Sample(np.array(prompt), np.array(ids), quantiles) for prompt, ids in pairs]
    passes = [rng.permutation(len(samples)) for _ in range(-(-count // len(samples)))]
    return samples, np.concatenate(passes)[:count]
