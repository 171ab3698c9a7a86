"""Guidance in vLLM: the scheduler, which adds the contrasts of each guided request and keeps this group in step.

All requests of a group must sample in the same step, because their token depends on all of them. vLLM's scheduler knows
no groups. It can run out of token budget or memory within one, and it preempts single requests. Then
only some of them sample. `GuidedScheduler` preempts these, and has vLLM drop the tokens. They are scheduled again
beside the others, and the prefix cache holds what all have computed.

    vllm serve runs/x/final --scheduler-cls quarkrl.sampling.vllm_scheduler.GuidedScheduler

This module needs vLLM. Its scheduler has no public interface for subclasses. tests/sampling/test_vllm_guidance.py
checks the names that are used here.
"""

import logging
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from quarkrl.errors import UserError
from quarkrl.models.conditioning import Conditioning
from quarkrl.sampling.engine_guidance import GroupMember, read_guidance
from quarkrl.sampling.guidance import Contrast, find_contrast
from quarkrl.sampling.vllm_guidance import GROUP, PROCESSOR, processors_to_name

logger = logging.getLogger("vllm.quarkrl")  # Below vLLM's logger, which has a handler.


class GuidedScheduler(Scheduler):
    """vLLM's scheduler with groups of requests.

    Raises:
        UserError: the engine is too small for a group, or has a feature that excludes groups.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._conditioning = Conditioning.load(self.vllm_config.model_config.model)
        self._contrasts: dict[str, list[str]] = {}  # The contrasts' request ids, by that of the main request.
        self._refused: list[Request] = []
        self._check_engine()

    def add_request(self, request: Request) -> None:
        """Add a request and, if it is guided, its contrasts. A request that cannot be guided ends with an error."""
        params = request.sampling_params
        guidance = None if params is None else read_guidance(params.extra_args)
        if guidance is None or request.request_id in self.requests:
            super().add_request(request)
            return
        try:
            contrast = find_contrast(self._conditioning, request.prompt_token_ids or [], guidance)
        except UserError as error:
            logger.error("request %s: %s", request.request_id, error)
            super().add_request(request)
            super().finish_requests(request.request_id, RequestStatus.FINISHED_ERROR)
            self._refused.append(request)
            return
        contrasts = self._make_group(request, contrast)
        for member in (request, *contrasts):
            super().add_request(member)
        self._contrasts[request.request_id] = [member.request_id for member in contrasts]

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule a step, and preempt each request that samples in it without its whole group."""
        output = super().schedule(*args, **kwargs)
        for main_id, contrast_ids in reversed(self._contrasts.items()):  # The first group is to wait before others.
            group = [self.requests[i] for i in (main_id, *contrast_ids) if i in self.requests]
            sampling = [
                request
                for request in group
                if request.request_id in output.num_scheduled_tokens and not request.is_prefill_chunk
            ]
            if len(sampling) <= len(contrast_ids):
                for request in reversed(sampling):
                    self._drop_step(request)
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, EngineCoreOutputs]:
        """Read the sampled tokens; clients get those of main requests only."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if not self._contrasts and not self._refused:
            return outputs
        contrast_ids = {i for ids in self._contrasts.values() for i in ids}
        for client_outputs in outputs.values():
            client_outputs.outputs = [o for o in client_outputs.outputs if o.request_id not in contrast_ids]
        finished = [main_id for main_id in self._contrasts if main_id not in self.requests]
        # Contrasts end by the same token, unless only the main request has a grammar that ends it.
        for main_id in finished:
            super().finish_requests(self._contrasts.pop(main_id), RequestStatus.FINISHED_ABORTED)
        for request in self._refused:
            error = EngineCoreOutput(request.request_id, [], finish_reason=request.get_finished_reason())
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(error)
        self._refused.clear()
        return outputs

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        """End requests, and with each main request its contrasts."""
        if request_ids is None:
            self._contrasts.clear()
            return super().finish_requests(None, finished_status)
        ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        contrasts = [contrast for i in ids for contrast in self._contrasts.pop(i, ())]
        ended = super().finish_requests([*ids, *contrasts], finished_status)
        return [request for request in ended if request.request_id not in contrasts]

    def _make_group(self, request: Request, contrast: Contrast) -> list[Request]:
        """Mark a request as the main one of a group, and return its contrasts."""
        params, conditioning = request.sampling_params, self._conditioning
        assert params is not None and conditioning is not None
        main = GroupMember(
            group_id=request.request_id,
            part=0,
            scales=contrast.scales,
            rule=contrast.rule,
            vocab_size=conditioning.vocab_size,
            end_ids=tuple(i for i in params.all_stop_token_ids if i < conditioning.vocab_size),
            ends_from=request.num_prompt_tokens + params.min_tokens,
            seed=random.getrandbits(63) if params.seed is None else params.seed,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
        )
        # The client's own parameters stay as they are: in one process the engine shares them.
        params = params.clone()
        params.extra_args = {**(params.extra_args or {}), GROUP: main}
        # The processor has the seed. vLLM 0.32 on a CPU stops at a seeded request whose prompt it reads in chunks.
        params.seed = None
        # vLLM would rule out EOS before guidance, which changes what the rule `lower` compares.
        params.min_tokens = 0
        request.sampling_params = params
        return [
            self._make_contrast(request, replace(main, part=i), ids) for i, ids in enumerate(contrast.prompt_ids, 1)
        ]

    def _make_contrast(self, request: Request, member: GroupMember, prompt_ids: Sequence[int]) -> Request:
        assert request.sampling_params is not None
        contrast_params = request.sampling_params.clone()
        contrast_params.extra_args = {GROUP: member}
        # A grammar rules out tokens in the main request, which is enough.
        contrast_params.structured_outputs = None
        contrast_params.logprobs = None
        return Request(
            request_id=f"{request.request_id}-contrast-{member.part}",
            prompt_token_ids=list(prompt_ids),
            sampling_params=contrast_params,
            pooling_params=None,
            client_index=request.client_index,
            arrival_time=request.arrival_time,
            lora_request=request.lora_request,
            cache_salt=request.cache_salt,
            priority=request.priority,
            block_hasher=request._block_hasher,
        )

    def _drop_step(self, request: Request) -> None:
        """Undo the step that was just scheduled for a request; it waits, before all others."""
        self.running.remove(request)
        self._preempt_request(request, time.monotonic(), drop_stale_output=True)
        # As `reset_prefix_cache` does: the request may be resumed in the next step, so its worker must add it again.
        self.prev_step_scheduled_req_ids.discard(request.request_id)

    def _check_engine(self) -> None:
        """Refuse an engine in which the requests of a group might never meet, or in which nothing guides them."""
        config = self.vllm_config
        concurrency = get_max_concurrency_for_kv_cache_config(config, self.kv_cache_config)
        block_size, size = self.block_size, 1 + (len(self._conditioning.attributes) if self._conditioning else 1)
        named = config.model_config.logits_processors or ()
        if PROCESSOR not in named and processors_to_name():
            raise UserError(
                f"--logits-processors {list(named)}: must have {PROCESSOR} with GuidedScheduler, since quarkrl is not "
                "installed as a plugin."
            )
        if config.speculative_config is not None:
            raise UserError("--speculative-config: must be unset with GuidedScheduler. Remove it.")
        if config.kv_transfer_config is not None:
            raise UserError("--kv-transfer-config: must be unset with GuidedScheduler. Remove it.")
        if not config.cache_config.enable_prefix_caching:
            raise UserError("--no-enable-prefix-caching: must be unset with GuidedScheduler. Remove it.")
        if self.max_num_running_reqs < size:
            raise UserError(
                f"--max-num-seqs {self.max_num_running_reqs}: must be at least {size} with GuidedScheduler."
            )
        if self.max_num_scheduled_tokens < size * block_size:
            raise UserError(
                f"--max-num-batched-tokens {self.max_num_scheduled_tokens}: must be at least {size * block_size}, "
                f"{size} blocks, with GuidedScheduler."
            )
        if concurrency < size:
            raise UserError(
                f"--max-model-len {self.max_model_len}: must leave memory for {size} requests of this length with "
                f"GuidedScheduler, and the cache has memory for {concurrency:.1f}. Lower it, or raise "
                "--kv-cache-memory-bytes."
            )
