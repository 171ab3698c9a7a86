"""`VllmEngine`: vLLM completes the prompts while a policy is trained, in this process or in a server.

vLLM holds a copy of the policy's weights. `synchronize` replaces it before each rollout, with adapters merged, and
checks it: vLLM's log-probabilities of a few fixed sequences must be those of the policy.
"""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from quarkrl.errors import UserError
from quarkrl.models.adapters import merge
from quarkrl.models.eval_mode import eval_mode
from quarkrl.sampling.engine import BuiltinEngine, Complete
from quarkrl.sampling.engine_guidance import FROM, RULE, SCALE
from quarkrl.sampling.options import GuidanceRule, GuidanceScale, count_passes
from quarkrl.sampling.strategy import Sampling
from quarkrl.sampling.vllm_backends import Backend

# How far a log-probability of vLLM may be from the policy's. Both round differently: in float32 by some 1e-5, in 16
# bits by some 0.1 at unlikely tokens.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}
_CHECKED_PROMPTS = 4


@dataclass(frozen=True)
class VllmEngine:
    """Completes prompts with vLLM; see `SamplingEngine`.

    Attributes:
        backend: vLLM.
        builtin: the policy, its reward tokens, and what samples a reference that vLLM does not have.
        shares_start: whether the policy starts with the weights of the reference, so that vLLM samples iteration 0.
        prompts: token ids of prompts, for the check.
        dtype: the data type of vLLM's weights, by name.
        differences: the largest difference of a log-probability in each check.
    """

    backend: Backend
    builtin: BuiltinEngine
    shares_start: bool
    prompts: Sequence[list[int]]
    dtype: str
    differences: list[float] = field(default_factory=list)

    def synchronize(self) -> None:
        """Take over the policy's weights, and check them.

        Raises:
            UserError: vLLM's log-probabilities are not the policy's.
        """
        policy = self.builtin.policy_model()
        model = merge(copy.deepcopy(policy)) if hasattr(policy, "merge_and_unload") else policy
        # Not named_parameters(), which lacks a tied output layer. vLLM would keep the old one without a message.
        self.backend.load(model, model.state_dict())
        self.check()

    def check(self) -> None:
        """Compare log-probabilities of fixed sequences with the policy's.

        Raises:
            UserError: they differ.
        """
        sequences = self._fixed_sequences()
        with self.builtin.autocast():
            expected = log_probs_of(self.builtin.policy_model(), sequences)
        pairs = zip(expected, self.backend.log_probs(sequences), strict=True)
        difference = max(float(np.abs(np.subtract(ours, theirs)).max()) for ours, theirs in pairs)
        self.differences.append(difference)
        if not difference <= TOLERANCE[self.dtype]:
            raise UserError(
                f"engine vllm: its log-probabilities differ from the policy's by {difference:.3g}; must be at most "
                f"{TOLERANCE[self.dtype]:g} in {self.dtype}. vLLM has other weights. Set --engine builtin."
            )

    @contextmanager
    def reference(self) -> Iterator[Complete]:
        """Yield what completes prompts with p_0: the policy without reward tokens, which has not learned yet."""
        if self.shares_start:
            yield partial(self._complete, False, {})
        else:
            with self.builtin.reference() as complete:
                yield complete

    @contextmanager
    def policy(self, guidance_scale: GuidanceScale, guidance_rule: GuidanceRule = "both") -> Iterator[Complete]:
        """Yield what completes prompts with the policy on its best reward tokens."""
        guidance = {SCALE: guidance_scale, FROM: self.builtin.guidance_from, RULE: guidance_rule}
        yield partial(self._complete, True, {} if count_passes(guidance_scale) == 1 else guidance)

    def _complete(
        self,
        conditioned: bool,
        guidance: dict[str, Any],
        prompt_ids: list[list[int]],
        sampling: Sampling,
        uniforms: np.ndarray | None,
    ) -> list[list[int]]:
        best = self.builtin.conditioning.best
        prompts = [self.builtin.conditioning.prefix(ids, best) if conditioned else list(ids) for ids in prompt_ids]
        common: dict[str, Any] = {
            "max_tokens": sampling.max_new_tokens,
            "min_tokens": sampling.min_new_tokens,
            "temperature": sampling.temperature if sampling.do_sample else 0.0,
            "top_p": sampling.top_p if sampling.do_sample else 1.0,
            "stop_token_ids": list(self.builtin.end_ids),
            "ignore_eos": True,  # The EOS ids of the run are in stop_token_ids.
        }
        seeds = [0] * len(prompts) if uniforms is None else map(seed_of, uniforms)
        completions = self.backend.generate(prompts, [{**common, "seed": seed} for seed in seeds], guidance)
        highest = max((token for ids in completions for token in ids), default=0)
        if highest >= self.builtin.conditioning.vocab_size or not all(completions):
            problem = (
                "an empty completion"
                if highest < self.builtin.conditioning.vocab_size
                else f"the reward token {highest}"
            )
            raise UserError(f"engine vllm: sampled {problem}; must sample tokens of the original vocabulary.")
        return completions

    def _fixed_sequences(self) -> list[list[int]]:
        """A few prompts with their best and with their worst reward tokens."""
        best = self.builtin.conditioning.best
        quantiles = [best, (0,) * len(best)]
        prompts = self.prompts[:_CHECKED_PROMPTS]
        return [self.builtin.conditioning.prefix(ids, quantile) for ids in prompts for quantile in quantiles]


def seed_of(uniforms: np.ndarray) -> int:
    """Return a seed for a completion from its own random numbers, so that it does not depend on its batch."""
    return int.from_bytes(hashlib.blake2b(uniforms.tobytes(), digest_size=8).digest(), "little") >> 1


@torch.no_grad()
def log_probs_of(model: Any, sequences: Sequence[list[int]]) -> list[list[float]]:
    """Return the log-probability of each token of a sequence but the first, over the model's whole vocabulary."""
    rows = []
    with eval_mode(model):
        for ids in sequences:
            tokens = torch.tensor([ids], device=model.device)
            log_probs = model(input_ids=tokens).logits[0, :-1].float().log_softmax(-1)
            rows.append(log_probs.gather(-1, tokens[0, 1:, None])[:, 0].tolist())
    return rows
