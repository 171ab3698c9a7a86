"""Guided distributions that the policy is compared with: the teacher's in distillation, p_0's in the KL term."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quarkrl.models.completion_logits import completion_logits
from quarkrl.sampling.guidance import guided_logits
from quarkrl.sampling.options import GuidanceRule
from quarkrl.training.distillation import Teacher


@dataclass(frozen=True)
class GuidedTarget:
    """Guided logits at the T completion tokens of a batch, which the policy is compared with.

    Attributes:
        guidance_scale: γ.
        rule: both, or lower (`sampling.guidance`).
        vocab_size: V.
        temperature: divides the logits.
    """

    guidance_scale: float
    rule: GuidanceRule
    vocab_size: int
    temperature: float = 1.0

    @torch.no_grad()
    def of_teacher(
        self,
        policy: Any,
        teacher: Teacher,
        reference: Callable[[], AbstractContextManager[Any]] | None,
        inputs: Mapping[str, Tensor],
    ) -> Tensor:
        """Return the logits of a teacher with guidance.

        Args:
            policy: the policy, whose weights the teacher replaces for the moment.
            teacher: the weights before distillation.
            reference: a context with p_0, if guidance moves away from it; None if it moves away from a quantile.
            inputs: a batch of `Collator`.

        Returns:
            `(T, V)`.
        """
        with teacher.within(policy):
            wanted = completion_logits(policy, *_model_inputs(inputs))
        with reference() if reference else teacher.within(policy) as other:
            contrast = completion_logits(other, *_model_inputs(inputs, "ref_" if reference else "contrast_"))
        return self._combine(wanted, contrast, self.guidance_scale)

    @torch.no_grad()
    def of_reference(self, reference: Any, plain_logits: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the logits of the reference, guided away from the worst words where a sample is in the best quantile.

            log p_0(v | x)  +  (γ - 1) (log p_0(v | x)  -  log p_0(v | worst words, x))

        Args:
            reference: p_0.
            plain_logits: `(T, V)`, those of p_0 without prefix.
            inputs: a batch of `Collator` with a contrast.

        Returns:
            `(T, V)`.
        """
        contrast, labels = completion_logits(reference, *_model_inputs(inputs, "contrast_")), inputs["labels"]
        scales = 1 + (self.guidance_scale - 1) * inputs["is_best"].float()  # (batch, 1)
        return self._combine(plain_logits, contrast, scales.expand_as(labels)[labels != -100][:, None])

    def _combine(self, wanted: Tensor, contrast: Tensor, scale: float | Tensor) -> Tensor:
        wanted, contrast = (logits[:, : self.vocab_size].float() for logits in (wanted, contrast))
        return guided_logits(wanted, contrast, scale, self.rule) / self.temperature


def _model_inputs(inputs: Mapping[str, Tensor], prefix: str = "") -> list[Tensor]:
    return [inputs[f"{prefix}{name}"] for name in ("input_ids", "attention_mask", "labels")]
