"""Guidance in vLLM: the scheduler, which makes a pair of each guided request and keeps the two requests in step.

Both requests of a pair must sample in the same step of the engine, because their token depends on both. vLLM's
scheduler knows no pairs. It can run out of token budget or memory between the two, and it preempts single requests.
Then one of them samples alone. `GuidedScheduler` preempts that one, and has vLLM drop the token. It is scheduled again
beside its partner, and the prefix cache holds what both have computed.

    vllm serve runs/x/final --scheduler-cls quarkrl.sampling.vllm_scheduler.GuidedScheduler

This module needs vLLM. Its scheduler has no public interface for subclasses. tests/sampling/test_vllm_guidance.py
checks the names that are used here.
"""

import logging
import random
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from quarkrl.errors import UserError
from quarkrl.models.conditioning import Conditioning
from quarkrl.sampling.engine_guidance import PairMember, read_guidance
from quarkrl.sampling.guidance import GuidanceOptions, contrast_prompts
from quarkrl.sampling.vllm_guidance import PAIR

logger = logging.getLogger("vllm.quarkrl")  # Below vLLM's logger, which has a handler.


class GuidedScheduler(Scheduler):
    """vLLM's scheduler with pairs of requests.

    Raises:
        UserError: the engine is too small for a pair, or has a feature that excludes pairs.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._conditioning = Conditioning.load(self.vllm_config.model_config.model)
        self._contrasts: dict[str, str] = {}  # The contrast's request id, by that of the main request.
        self._refused: list[Request] = []
        self._check_engine()

    def add_request(self, request: Request) -> None:
        """Add a request and, if it is guided, its contrast. A request that cannot be guided ends with an error."""
        params = request.sampling_params
        guidance = None if params is None else read_guidance(params.extra_args)
        if guidance is None or request.request_id in self.requests:
            super().add_request(request)
            return
        try:
            prompts = [request.prompt_token_ids or []]
            (contrast_ids,) = contrast_prompts(self._conditioning, prompts, guidance.guidance_from)
        except UserError as error:
            logger.error("request %s: %s", request.request_id, error)
            super().add_request(request)
            super().finish_requests(request.request_id, RequestStatus.FINISHED_ERROR)
            self._refused.append(request)
            return
        contrast = self._make_pair(request, guidance, contrast_ids)
        super().add_request(request)
        super().add_request(contrast)
        self._contrasts[request.request_id] = contrast.request_id

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule a step, and preempt each request that samples in it without its partner."""
        output = super().schedule(*args, **kwargs)
        for main_id, contrast_id in self._contrasts.items():
            pair = [self.requests[i] for i in (main_id, contrast_id) if i in self.requests]
            sampling = [
                request
                for request in pair
                if request.request_id in output.num_scheduled_tokens and not request.is_prefill_chunk
            ]
            if len(sampling) == 1:
                self._drop_step(sampling[0])
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, EngineCoreOutputs]:
        """Read the sampled tokens; clients get those of main requests only."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if not self._contrasts and not self._refused:
            return outputs
        contrast_ids = set(self._contrasts.values())
        for client_outputs in outputs.values():
            client_outputs.outputs = [o for o in client_outputs.outputs if o.request_id not in contrast_ids]
        finished = [main_id for main_id in self._contrasts if main_id not in self.requests]
        # The contrast ends by the same token, unless only the main request has a grammar that ends it.
        super().finish_requests([self._contrasts.pop(main_id) for main_id in finished], RequestStatus.FINISHED_ABORTED)
        for request in self._refused:
            error = EngineCoreOutput(request.request_id, [], finish_reason=request.get_finished_reason())
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(error)
        self._refused.clear()
        return outputs

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        """End requests, and with each main request its contrast."""
        if request_ids is None:
            self._contrasts.clear()
            return super().finish_requests(None, finished_status)
        ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        contrasts = [self._contrasts.pop(i) for i in ids if i in self._contrasts]
        ended = super().finish_requests([*ids, *contrasts], finished_status)
        return [request for request in ended if request.request_id not in contrasts]

    def _make_pair(self, request: Request, guidance: GuidanceOptions, contrast_ids: list[int]) -> Request:
        """Mark a request as the main one of a pair, and return its contrast."""
        params, conditioning = request.sampling_params, self._conditioning
        assert params is not None and conditioning is not None
        main = PairMember(
            pair_id=request.request_id,
            is_main=True,
            scale=float(guidance.guidance_scale),
            vocab_size=conditioning.vocab_size,
            seed=random.getrandbits(63) if params.seed is None else params.seed,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
        )
        # The client's own parameters stay as they are: in one process the engine shares them.
        params = params.clone()
        params.extra_args = {**(params.extra_args or {}), PAIR: main}
        # The processor has the seed. vLLM 0.32 on a CPU stops at a seeded request whose prompt it reads in chunks.
        params.seed = None
        request.sampling_params = params
        contrast_params = params.clone()
        contrast_params.extra_args = {PAIR: replace(main, is_main=False)}
        # A grammar rules out tokens in the main request, which is enough.
        contrast_params.structured_outputs = None
        contrast_params.logprobs = None
        return Request(
            request_id=f"{request.request_id}-contrast",
            prompt_token_ids=contrast_ids,
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
        """Refuse an engine in which two requests might never meet."""
        config = self.vllm_config
        concurrency = get_max_concurrency_for_kv_cache_config(config, self.kv_cache_config)
        block_size = self.block_size
        if config.speculative_config is not None:
            raise UserError("--speculative-config: must be unset with GuidedScheduler. Remove it.")
        if config.kv_transfer_config is not None:
            raise UserError("--kv-transfer-config: must be unset with GuidedScheduler. Remove it.")
        if not config.cache_config.enable_prefix_caching:
            raise UserError("--no-enable-prefix-caching: must be unset with GuidedScheduler. Remove it.")
        if self.max_num_running_reqs < 2:
            raise UserError(f"--max-num-seqs {self.max_num_running_reqs}: must be at least 2 with GuidedScheduler.")
        if self.max_num_scheduled_tokens < 2 * block_size:
            raise UserError(
                f"--max-num-batched-tokens {self.max_num_scheduled_tokens}: must be at least {2 * block_size}, "
                "two blocks, with GuidedScheduler."
            )
        if concurrency < 2:
            raise UserError(
                f"--max-model-len {self.max_model_len}: must leave memory for 2 requests of this length with "
                f"GuidedScheduler, and the cache has memory for {concurrency:.1f}. Lower it, or raise "
                "--kv-cache-memory-bytes."
            )
