"""`SamplingEngine`: what completes prompts while a policy is trained. `BuiltinEngine` samples with the policy itself.

`vllm_engine.VllmEngine` is the other one: a copy of the weights in vLLM, which is synchronized before it samples.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np
from transformers import PreTrainedModel

from quarkrl.models.conditioning import Conditioning
from quarkrl.sampling.guidance import GuidanceOptions, make_contrast
from quarkrl.sampling.options import GuidanceRule, GuidanceScale
from quarkrl.sampling.prepared_weights import prepare_weights_once
from quarkrl.sampling.recorded_steps import RecordedSteps
from quarkrl.sampling.sampler import sample
from quarkrl.sampling.strategy import Sampling

# Completes plain prompts: (prompt ids, sampling options, random numbers) to completions as token ids.
Complete: TypeAlias = Callable[[list[list[int]], Sampling, np.ndarray | None], list[list[int]]]


class SamplingEngine(Protocol):
    """Completes prompts, given as token ids without reward tokens, while a policy is trained."""

    def synchronize(self) -> None:
        """Take over the weights of the policy. Called before each rollout.

        Raises:
            UserError: the engine does not have the policy's weights afterwards.
        """

    def reference(self) -> AbstractContextManager[Complete]:
        """Yield what completes prompts with p_0. Iteration 0 explores so, before the policy has learned."""

    def policy(
        self, guidance_scale: GuidanceScale, guidance_rule: GuidanceRule = "both"
    ) -> AbstractContextManager[Complete]:
        """Yield what completes prompts with the policy on its best reward tokens.

        Args:
            guidance_scale: γ, or "NAME=γ,NAME=γ"; 1 is without guidance.
            guidance_rule: both, or lower.
        """


@dataclass(frozen=True)
class BuiltinEngine:
    """Samples with the policy and the reference themselves, in batches of one prompt length after another.

    Attributes:
        policy_model: returns the policy.
        ref_model: the reference, if it is a model of its own.
        reference_model: a context with the reference p_0.
        conditioning: the policy's reward tokens.
        end_ids: EOS ids.
        guidance_from: what guidance moves away from.
        autocast: a context for forward passes.
        merges_adapters: whether the policy's adapters are merged while it samples.
    """

    policy_model: Callable[[], Any]
    ref_model: PreTrainedModel | None
    reference_model: Callable[[], AbstractContextManager[PreTrainedModel]]
    conditioning: Conditioning
    end_ids: Sequence[int]
    guidance_from: str
    autocast: Callable[[], AbstractContextManager[Any]]
    merges_adapters: bool

    def synchronize(self) -> None:
        """Do nothing: the policy itself samples."""

    @contextmanager
    def reference(self) -> Iterator[Complete]:
        """Yield what completes prompts with p_0."""
        vocab_size, steps = self.conditioning.vocab_size, RecordedSteps()
        with self._ready_to_sample(), self.reference_model() as reference:
            yield partial(sample, reference, end_ids=self.end_ids, vocab_size=vocab_size, steps=steps)

    @contextmanager
    def policy(self, guidance_scale: GuidanceScale, guidance_rule: GuidanceRule = "both") -> Iterator[Complete]:
        """Yield what completes prompts with the policy on its best reward tokens."""
        guidance = GuidanceOptions(guidance_scale, self.guidance_from, guidance_rule)
        # Guidance away from the reference switches the adapter off and on within each token.
        merges = self.merges_adapters and (guidance_scale == 1 or self.guidance_from != "reference")
        with self._ready_to_sample(merges):
            yield partial(self._complete_best, guidance, RecordedSteps())

    def _complete_best(
        self,
        guidance: GuidanceOptions,
        steps: RecordedSteps,
        prompt_ids: list[list[int]],
        sampling: Sampling,
        uniforms: np.ndarray | None,
    ) -> list[list[int]]:
        return sample(
            self.policy_model(),
            [self.conditioning.prefix_named(ids, "best") for ids in prompt_ids],
            sampling,
            uniforms,
            end_ids=self.end_ids,
            vocab_size=self.conditioning.vocab_size,
            contrast=make_contrast(self.conditioning, prompt_ids, guidance, reference=self.reference_model),
            steps=steps,
        )

    @contextmanager
    def _ready_to_sample(self, merge_adapters: bool = False) -> Iterator[None]:
        models = self.policy_model(), self.ref_model
        with self.autocast(), prepare_weights_once(*models, merge_adapters=merge_adapters):
            yield
