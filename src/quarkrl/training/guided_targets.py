"""Guided logits that the policy is compared with: the teacher's in distillation, p_0's in the KL term."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from quarkrl.models.completion_logits import completion_logits
from quarkrl.sampling.guidance import guided_logits
from quarkrl.sampling.options import GuidanceRule
from quarkrl.training.distillation import Teacher


@torch.no_grad()
def teacher_logits(
    policy: Any,
    teacher: Teacher,
    reference: Callable[[], AbstractContextManager[Any]] | None,
    inputs: Mapping[str, Tensor],
    rule: GuidanceRule,
    vocab_size: int,
) -> Tensor:
    """Return the `(T, V)` logits of a teacher with guidance, at the T completion tokens of a batch.

    Args:
        policy: the policy, whose weights the teacher replaces for the moment.
        teacher: the weights before distillation.
        reference: a context with p_0, if guidance moves away from it; None if it moves away from a quantile.
        inputs: a batch of `Collator`.
        rule: both, or lower (`sampling.guidance`).
        vocab_size: V.
    """
    with teacher.within(policy):
        wanted = completion_logits(policy, *_model_inputs(inputs))
    with reference() if reference else teacher.within(policy) as other:
        contrast = completion_logits(other, *_model_inputs(inputs, "ref_" if reference else "contrast_"))
    stage = teacher.stage
    return guided_logits(wanted, [contrast], [stage.guidance_scale], rule, vocab_size) / stage.temperature


@torch.no_grad()
def reference_logits(
    reference: Any,
    plain_logits: Tensor,
    inputs: Mapping[str, Tensor],
    guidance_scale: float,
    rule: GuidanceRule,
    vocab_size: int,
) -> Tensor:
    """Return the `(T, V)` logits of p_0, guided away from the worst words where a sample is in the best quantile.

        log p_0(v | x)  +  (γ - 1) (log p_0(v | x)  -  log p_0(v | worst words, x))

    Args:
        reference: p_0.
        plain_logits: `(T, V)`, those of p_0 without prefix.
        inputs: a batch of `Collator` with a contrast.
        guidance_scale: γ.
        rule: both, or lower.
        vocab_size: V.
    """
    contrast, labels = completion_logits(reference, *_model_inputs(inputs, "contrast_")), inputs["labels"]
    scales = 1 + (guidance_scale - 1) * inputs["is_best"].float()  # (batch, 1)
    scales = scales.expand_as(labels)[labels != -100][:, None]  # (T, 1)
    return guided_logits(plain_logits, [contrast], [scales], rule, vocab_size)


def _model_inputs(inputs: Mapping[str, Tensor], prefix: str = "") -> list[Tensor]:
    return [inputs[f"{prefix}{name}"] for name in ("input_ids", "attention_mask", "labels")]
